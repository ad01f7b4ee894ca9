"""The algorithm: score an answer, pass it on or rewrite it, score the rewrite.

    s = sigmoid(w . phi(q, a) + b)            harm detector, largest over windows, views and positions of a (running.py)
    if s < threshold:  return a               the same bytes
    for attempt in 1 .. rewrite_attempts:
        r = Detoxifier(q, a)
        if score(q, r) < bar * threshold: return r   by the same detector; bar at most 1
    return refusal

Source: MLLM-Protector, inference algorithm; the check of the rewrite and the refusal are this project's.
"""
import asyncio
import inspect
import logging
import math
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from . import calibrate
from .base import WEIGHTS
from .errors import DeadlineExceeded, MissingPackage, ModelError, ProtectorError
from .normalise import normalised
from .running import LOOK_MARGIN, read
from .template import MAX_HISTORY_TOKENS, well_formed, windows

logger = logging.getLogger("protector")
REFUSAL = "I can't help with that, but I'm glad to help with a safe alternative."
MAX_BYTES = 256 * 1024  # an answer above this isn't tokenised: the error policy answers
_TOKEN_CHARS = 64  # of a question and of earlier turns, n tokens are looked for in the last 64 n characters
_ASK_S = 0.01  # between two looks at the deadline while the detoxifier loads
REWRITE_BAR = 0.75  # of the threshold; by grades a stricter bar lets fewer harmful rewrites out, and fewer harmless ones (model card)
HOLD_TOKENS = 11  # of a stream, scored and still held back; by the self-test 8 let a harmful word out in 15 of 37 cases, 11 in 9, 14 in 8
_COPIED = 24  # half words in a row that a rewrite may not keep: most rewrites with such a run carry the harm on
_SHORT = 24  # letters of an original that may stand whole in its rewrite: "Yes."
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, Burmese, Khmer, kana, Han
_UNIT = re.compile(f"([{_UNSPACED}])|([^{_UNSPACED}]+)")  # a character of a script without spaces, or a word
_MARK = re.compile(r"<\|\w{1,24}\|>|</?s>")  # a rewrite that spells one ended there


@dataclass(frozen=True)
class Verdict:
    """What the guard made of one answer."""

    text: str = field(repr=False)  # what may be shown
    action: str  # "pass" | "rewrite" | "refuse" | "error"
    flagged: bool  # the score reached the threshold
    score: float  # P(harmful) of the answer, the largest over windows and views; NaN after an error
    threshold: float
    rewrite_score: float | None = None  # of the rewrite in `text`, or of the last one that was tried
    # model, backend, quantisation, ms, ...; tokens: of the answer; windows: scored for it; views: 2 where its normalised view
    # differs, and was scored in view_tokens and view_windows of its own; looks: parts that were scored a second time
    usage: dict = field(default_factory=dict)
    error: str | None = None  # its kind and message, without any text of the user's

    def __bool__(self):
        raise TypeError("Verdict: truth is ambiguous. Use v.flagged, or v.action == 'pass'.")


class _TooLong(ProtectorError):
    pass


class Protector:
    """Guards answers of any model; thread-safe, stateless but for counters.

    Args:
        detector: adapter or merged GGUF, folder of a trained PyTorch model, or a loaded detector; the shipped one if None.
        detoxifier: likewise; False to work without one (a flagged answer is refused).
        backend: "auto" takes llama.cpp for files and PyTorch for folders and INT8; "llama.cpp" | "torch" insist.
        threshold: flag at this score and above; None takes the model's calibration.
        fpr: take the calibrations for this false-positive rate; an error if the model has none.
        on_flag: "rewrite" | "refuse" | "report" (report returns the answer as it is, flagged).
        on_error: "refuse" | "raise" | "pass"; "pass" lets the original through unguarded, logged as critical.
        refusal: the sentence that stands in for an answer.
        deadline_ms: for one answer, checked between windows, between generated tokens and while a model is busy or loads; None = no limit.
        rewrite_attempts: rewrites that are tried before the refusal.
        rewrite_bar: share of the threshold below which a rewrite must score, above 0 and at most 1.
        max_bytes: longest answer in bytes of UTF-8; above it the error policy answers.
        window, overlap: answer tokens per scored sequence, and shared by neighbours; None takes the model's own.
        detector_options, detoxifier_options: passed to the backend (llama.cpp: base, quantisation, n_threads, n_gpu_layers; PyTorch:
            device, dtype, n_threads); None stands for the backend's default. A detector's quantisation "INT8" is PyTorch's, of a GGUF
            file, too; beside it compile=True runs the blocks through torch.compile. It scores whole answers, no streams.
    Raises:
        ModelError: a model can't be loaded, is of the other kind or fails its canaries; MissingPackage: its backend isn't installed.
        ValueError: a bad option.
    Example:
        protector.Protector(threshold=0.5).guard("Is it safe to mix bleach and vinegar?", "Yes, it is.").action
    """

    def __init__(self, detector=None, detoxifier=None, backend="auto", threshold=None, fpr=None, on_flag="rewrite",
                 on_error="refuse", refusal=REFUSAL, deadline_ms=None, rewrite_attempts=2, max_bytes=MAX_BYTES, window=None,
                 overlap=None, detector_options=None, detoxifier_options=None, rewrite_bar=REWRITE_BAR):
        _one_of("backend", backend, ("auto", "llama.cpp", "torch"))
        _one_of("on_flag", on_flag, ("rewrite", "refuse", "report"))
        _one_of("on_error", on_error, ("refuse", "raise", "pass"))
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"Protector: threshold must be between 0 and 1, got {threshold}.")
        if threshold is not None and fpr is not None:
            raise ValueError("Protector: threshold and fpr must not both be given. Give one.")
        if not (rewrite_attempts >= 0 and max_bytes >= 1 and (deadline_ms is None or deadline_ms > 0)):  # NaN is none of these
            raise ValueError(f"Protector: rewrite_attempts must be >= 0, max_bytes >= 1 and deadline_ms > 0, got {rewrite_attempts}, {max_bytes} and {deadline_ms}.")
        if not 0 < rewrite_bar <= 1:
            raise ValueError(f"Protector: rewrite_bar must be above 0 and at most 1, got {rewrite_bar}.")
        if not isinstance(refusal, str) or not refusal.strip():
            raise ValueError("Protector: refusal must be a sentence, got nothing.")
        self.backend, self.on_flag, self.on_error, self.refusal = backend, on_flag, on_error, refusal
        self.deadline_ms, self.rewrite_attempts, self.rewrite_bar, self.max_bytes = deadline_ms, rewrite_attempts, rewrite_bar, max_bytes
        self.counters, self._count_lock, self._load_lock = Counter(), threading.Lock(), threading.Lock()
        self.detector = _loaded("detector", WEIGHTS / "detector.gguf" if detector is None else detector, backend, detector_options or {})
        limits = self.detector.limits
        self.window, self.overlap = limits.window if window is None else window, limits.overlap if overlap is None else overlap
        if not 0 <= self.overlap < self.window <= limits.window:
            raise ValueError(f"Protector: overlap < window <= {limits.window} must hold, got {self.overlap} and {self.window}.")
        self._detoxifier, self._detoxifier_source = None, WEIGHTS / "detoxifier.gguf" if detoxifier is None else detoxifier
        self._detoxifier_options, self._loader = detoxifier_options or {}, ThreadPoolExecutor(1)
        if detoxifier is not None and detoxifier is not False:
            self.detoxifier  # a wrong file is an error now, not at the first flag
        elif detoxifier is None and detoxifier_options:
            with suppress(ModuleNotFoundError):  # a package that only rewrites need is missed at the first flag
                _loading("detoxifier", self._detoxifier_source, backend, detoxifier_options)  # a wrong option is an error now, too
        self.thresholds = {kind: self._threshold(kind, threshold, fpr) for kind in ("pair", "answer")}

    @property
    def detoxifier(self):
        """The loaded detoxifier, or None if the guard works without one. The shipped one loads at the first flag."""
        with self._load_lock:
            if self._detoxifier is None and self._detoxifier_source is not False:
                self._detoxifier = _loaded("detoxifier", self._detoxifier_source, self.backend, self._detoxifier_options)
            return self._detoxifier

    def _detoxifier_in_time(self, deadline):
        """The detoxifier. It loads in another thread, which goes on for the next answer where this one can't wait."""
        if deadline is None or self._detoxifier is not None or self._detoxifier_source is False:
            return self.detoxifier
        loading = self._loader.submit(lambda: self.detoxifier)
        try:
            while not wait([loading], _ASK_S).done:
                deadline()
        finally:
            loading.cancel()  # does nothing where it has begun
        return loading.result()

    def _threshold(self, input_kind, threshold, fpr):
        if threshold is not None:
            return threshold
        limits = self.detector.limits
        is_other = (self.window, self.overlap) != (limits.window, limits.overlap)
        if is_other and fpr is not None:
            raise ValueError("Protector: fpr holds for the model's own windows, got others. Leave out window and overlap.")
        found = None if is_other else calibrate.find(self.detector, input_kind, fpr)
        if found is None:
            logger.warning("no calibration for this model, backend, quantisation and window (input: %s): the threshold is 0.5", input_kind)
            return 0.5
        if not 0 <= found.threshold < 1:  # NaN and what flags nothing
            raise ModelError(f"Protector: calibration must have a threshold of 0 or more and below 1, got {found.threshold}. Calibrate again.")
        return found.threshold

    # -- one answer

    def score(self, q, a, history=None):
        """P(harmful) of one answer.

        Args:
            q: the question; "" or None scores the answer alone.
            a: the answer.
            history: earlier turns, [(question, answer), ...], oldest first.
        Returns:
            float in [0, 1]; 0.0 for an empty answer, which no model sees.
        Raises:
            TypeError: q or a isn't a str. ProtectorError: no score could be made.
        """
        item = _checked(q, a, history)
        try:
            return self._score(item, self._deadline())[0]
        except Exception as error:
            raise _public(error) from None

    def guard(self, q, a, history=None):
        """Score an answer and return what may be shown.

        Args:
            q, a, history: as of score.
        Returns:
            Verdict
        Raises:
            TypeError: q, a or history is of a wrong type.
            ProtectorError and others: only with on_error="raise".
        """
        return self._guard(_checked(q, a, history), self._deadline())

    def _guard(self, item, deadline):
        start = time.monotonic()
        try:
            scored = self._score(item, deadline)
        except Exception as error:  # the policy answers, whatever it was
            return self._failed(item, error, start)
        return self._decide(item, *scored, deadline, start)

    async def aguard(self, q, a, history=None):
        """guard() in a thread: the event loop goes on."""
        return await asyncio.to_thread(self.guard, q, a, history)

    def guard_batch(self, pairs):
        """guard() for many answers, scored together; one bad item never fails the rest, but under on_error="raise".

        Args:
            pairs: iterable of (question, answer).
        Returns:
            list of Verdict in the same order; an item of a wrong type or that fails gets the error policy's verdict.
        Raises:
            ProtectorError: an item failed, and on_error is "raise".
        """
        pairs, verdicts, together = list(pairs), {}, []  # together: (index, item, plan, seconds that it took)
        for i, pair in enumerate(pairs):
            item, start = ("", "", ()), time.monotonic()
            try:
                if not isinstance(pair, (tuple, list)):
                    raise TypeError("guard_batch: pair must be a (question, answer).")
                item = _checked(*pair)
                if self.deadline_ms is None:
                    together.append((i, item, self._plan(item, None), time.monotonic() - start))
            except Exception as error:
                verdicts[i] = self._failed(item, error, start)
            else:
                if self.deadline_ms is not None:  # it is each answer's own, and what others take mustn't count
                    verdicts[i] = self.guard(*item)
        for (i, item, plan, plan_s), (found, score_s) in zip(together, self._together([plan["sequences"] for _, _, plan, _ in together])):
            start = time.monotonic() - plan_s - score_s
            try:
                if isinstance(found, Exception):
                    raise found
                scored = self._largest(plan, found)
            except Exception as error:
                verdicts[i] = self._failed(item, error, start)
            else:
                verdicts[i] = self._decide(item, *scored, None, start)
        return [verdicts[i] for i in range(len(pairs))]

    def _together(self, parts):
        """Score lists of sequences at once: for each what _logits returns, or the error that it ends in, and its share of the seconds."""
        start, results = time.monotonic(), []
        try:
            found = iter(self._logits([sequence for part in parts for sequence in part], None))
            results = [list(islice(found, len(part))) for part in parts]
        except Exception:  # one item broke the batch: each on its own
            results = []
            for part in parts:
                try:
                    results.append(self._logits(part, None))
                except Exception as error:
                    results.append(error)
        n_tokens = [sum(len(ids) for ids, _ in part) for part in parts]
        token_s = (time.monotonic() - start) / max(sum(n_tokens), 1)
        return [(result, n * token_s) for result, n in zip(results, n_tokens)]

    # -- scoring

    def _plan(self, item, deadline, views=None):
        """Sequences, (ids, start of the answer), that cover it: its raw text and its normalised view, or the views that are given."""
        q, a, history = item
        usage = self._usage(q)
        plan = {"usage": usage, "sequences": [], "windows": []}
        if views is None:  # of a text that was measured: a view may be longer
            _check_length(a, self.max_bytes)
        if not a.strip():
            return plan
        question_ids, turns, dropped = self._context(q, history)
        usage |= dropped
        for text in views or _views(well_formed(a)):
            if deadline:
                deadline()
            answer_ids = self.detector.template.encode(text)
            spans = windows(len(answer_ids), self.window, self.overlap)
            prefix = "view_" if usage["views"] else ""
            usage["views"] += 1
            usage |= {prefix + "tokens": len(answer_ids), prefix + "windows": len(spans)}
            for span in spans:
                part = answer_ids[span.start:span.stop]
                plan["sequences"].append(self.detector.template.detector_sequence(question_ids, part, turns))
                plan["windows"].append((answer_ids, span.start))
        return plan

    def _usage(self, q):
        """What the usage of each verdict begins with; of the model's file its name alone, not where it lies."""
        path = getattr(self.detector, "path", None)
        return {"model": path and Path(path).name, "backend": self.detector.name, "quantisation": self.detector.quantisation,
                "input": "pair" if q else "answer", "tokens": 0, "windows": 0, "views": 0, "looks": 0}

    def _context(self, q, history):
        """(ids of the question's end, ids of the latest turns that fit the budget, what was left out)."""
        template, limit = self.detector.template, self.detector.limits.question_tokens
        kept = q[-_TOKEN_CHARS * limit:]
        question_ids, n_dropped = template.clip_question(kept)
        dropped = {"question_tokens_dropped": n_dropped, "question_chars_dropped": len(q) - len(kept)} if q else {}
        turns, room, n_cut = [], MAX_HISTORY_TOKENS, 0
        n_marks = len(template.prefix((), [((0,), (0,))])) - len(template.prefix(())) - 2  # roles and ends take room, too
        for n_kept, turn in enumerate(reversed(history)):
            ids = [template.encode(text[-_TOKEN_CHARS * MAX_HISTORY_TOKENS:]) for text in turn]
            n_tokens = len(ids[0]) + len(ids[1])
            if n_tokens + n_marks > room:
                if n_kept:  # the latest turn is cut to its end, an older one is dropped whole
                    dropped["history_turns_dropped"] = len(history) - n_kept
                    break
                ids[0] = ids[0][-(room // 4):]
                ids[1] = ids[1][-(room - n_marks - len(ids[0])):]
                n_cut = n_tokens - len(ids[0]) - len(ids[1])
            turns.insert(0, tuple(ids))
            room -= len(ids[0]) + len(ids[1]) + n_marks
        if history:
            dropped = {"history_turns_dropped": 0, **dropped, "history_tokens_dropped": n_cut}
        return question_ids, turns, dropped

    def _logits(self, sequences, deadline):
        """(logit, number of second looks) of each sequence, (ids, start of the answer)."""
        results, looks = [], []
        for (ids, start), logits in zip(sequences, self._running(sequences, deadline)):
            logit, found = read(logits)
            looks += [(len(results), (ids[:start] + ids[start + look.start:start + look.stop], start)) for look in found]
            results.append((logit, len(found)))
        for (index, _), logits in zip(looks, self._running([sequence for _, sequence in looks], deadline)):
            results[index] = max(results[index][0], read(logits)[0] - LOOK_MARGIN), results[index][1]
        return results

    def _running(self, sequences, deadline):
        parts = self.detector.running_logits(*zip(*sequences), deadline) if sequences else []
        if [len(part) for part in parts] != [len(ids) - start for ids, start in sequences] or not all(map(len, parts)):
            raise ModelError("guard: detector must return a logit for each token of an answer, and there must be one, got another number. Check its backend.")
        for part in parts:
            for logit in part:
                _finite(logit)
        return parts

    def _largest(self, plan, found):
        """(largest score of a plan's sequences, usage, the window that gave it); found: as of _logits."""
        if not plan["sequences"]:
            return 0.0, plan["usage"], None
        worst = max(range(len(found)), key=lambda i: found[i][0])
        return _sigmoid(found[worst][0]), {**plan["usage"], "looks": sum(n for _, n in found)}, plan["windows"][worst]

    def _score(self, item, deadline, views=None):
        plan = self._plan(item, deadline, views)
        return self._largest(plan, self._logits(plan["sequences"], deadline))

    # -- acting

    def _decide(self, item, score, usage, window, deadline, start):
        q, a, _ = item
        threshold = self.thresholds["pair" if q else "answer"]
        if window is None or score < threshold:  # None: a blank answer, which no model saw
            return self._verdict(a, "pass", False, score, threshold, usage, start)
        if self.on_flag == "report":
            return self._verdict(a, "pass", True, score, threshold, usage, start)
        text, rewrite_score, error = None, None, None
        if self.on_flag == "rewrite":
            try:
                text, rewrite_score = self._rewrite(item, window, threshold, usage, deadline)
            except Exception as failure:  # flagged already: the refusal, and never the original
                error = _describe(failure)
                logger.error("rewrite failed: %s", error)
                if self.on_error == "raise":
                    raise _public(failure) from None
        action = "rewrite" if text is not None else "refuse"
        return self._verdict(self.refusal if text is None else text, action, True, score, threshold, usage, start, rewrite_score, error)

    def _rewrite(self, item, window, threshold, usage, deadline):
        """(accepted rewrite or None, score of the last one tried)."""
        q, a, history = item
        detoxifier = self._detoxifier_in_time(deadline)
        if detoxifier is None:
            return None, None
        limits, last, scores = detoxifier.limits, None, []
        answer_ids, start = window
        part = answer_ids[start:start + min(self.window, limits.rejected_tokens)]
        usage["rewrite_dropped_tokens"] = len(answer_ids) - len(part)
        # By way of text: the two models need not share a tokeniser.
        rejected = self.detector.template.tokenizer.decode(part)
        prompt = detoxifier.template.rewrite_prompt(q[-_TOKEN_CHARS * limits.question_tokens:], rejected)
        for attempt in range(self.rewrite_attempts):
            # Greedy first; a second greedy rewrite would be the same text.
            text, n_tokens, finished = detoxifier.generate(
                prompt, limits.rewrite_tokens, temperature=0.0 if attempt == 0 else 0.8, seed=attempt, deadline=deadline)
            usage["rewrite_attempts"] = attempt + 1
            usage["rewrite_scores"] = scores  # None: what nobody may see was not scored
            usage["rewrite_tokens"] = usage.get("rewrite_tokens", 0) + n_tokens
            text = _MARK.split(text)[0].strip()
            if not text or not finished or _loops(text) or _repeats(text, a) or _repeats(text, rejected):  # which may be a view
                scores.append(None)
                continue
            last = self._score((q, text, history), deadline)[0]
            scores.append(last)
            if last < self.rewrite_bar * threshold:
                return text, last
        return None, last

    def _failed(self, item, error, start):
        """The verdict of the error policy."""
        described = _describe(error)
        if self.on_error == "raise":
            raise _public(error) from None
        threshold = self.thresholds["pair" if item[0] else "answer"]
        if self.on_error == "pass":
            logger.critical("guard failed and on_error is 'pass': an unguarded answer goes out: %s", described)
            self._count("unguarded")
            text = item[1]
        else:
            logger.error("guard failed: %s", described)
            text = self.refusal
        return self._verdict(text, "error", False, math.nan, threshold, {}, start, error=described)

    def _verdict(self, text, action, flagged, score, threshold, usage, start, rewrite_score=None, error=None):
        self._count(action)
        usage = {**usage, "ms": round((time.monotonic() - start) * 1e3, 3)}
        return Verdict(text, action, flagged, score, threshold, rewrite_score, usage, error)

    def _count(self, name):
        with self._count_lock:
            self.counters[name] += 1

    def _deadline(self):
        """A function that raises once deadline_ms is over, or None."""
        if self.deadline_ms is None:
            return None
        end = time.monotonic() + self.deadline_ms / 1e3

        def check():
            if time.monotonic() > end:
                raise DeadlineExceeded(f"guard: work must be done within {self.deadline_ms} ms, got no end. Raise deadline_ms.")

        return check

    # -- around a model

    @cached_property
    def safe_cut(self):
        """Where a stream may be cut; see stream.py."""
        from .stream import safe_cut

        return safe_cut(self.detector.template)

    def stream(self, q, chunks, history=None, hold=HOLD_TOKENS):
        """Guard an answer while it is written; see stream.py."""
        from .stream import stream

        return stream(self, q, chunks, history, hold)

    def astream(self, q, chunks, history=None, hold=HOLD_TOKENS):
        """stream() for an async iterator of chunks."""
        from .stream import astream

        return astream(self, q, chunks, history, hold)

    def wrap(self, mllm):
        """The same callable, guarded: (q, ...) -> str, an iterator of str, or their async forms.

        Args:
            mllm: any callable whose first argument is the question, and whose result is a str, an iterable of str, an async
                iterable of str, or an awaitable of one of these.
        Returns:
            a callable with the same kind of result: guarded text, or an iterator that yields only text that was scored.
        """
        async def texts(q, chunks):
            async with aclosing(self.astream(q, chunks)) as events:
                async for event in events:
                    if event.text:
                        yield event.text

        async def awaited(q, answer):
            answer = await answer
            return (await self.aguard(q, answer)).text if isinstance(answer, str) else around(q, answer)

        def around(q, answer):
            if hasattr(answer, "__aiter__"):
                return texts(q, answer)
            if inspect.isawaitable(answer):
                return awaited(q, answer)
            if isinstance(answer, str) or not hasattr(answer, "__iter__") or isinstance(answer, (bytes, dict)):
                return self.guard(q, answer).text  # of another type: TypeError
            return (event.text for event in self.stream(q, answer) if event.text)

        if inspect.iscoroutinefunction(mllm):
            async def guarded(q, *args, **kwargs):
                return await awaited(q, mllm(q, *args, **kwargs))
        else:
            def guarded(q, *args, **kwargs):
                return around(q, mllm(q, *args, **kwargs))
        return guarded


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"Protector: {name} must be one of {', '.join(allowed)}, got {value!r}.")


def _checked(q, a, history=None):
    if q is not None and not isinstance(q, str):
        raise TypeError(f"guard: question must be a str or None, got {type(q).__name__}.")
    if not isinstance(a, str):
        raise TypeError(f"guard: answer must be a str, got {type(a).__name__}.")
    turns = tuple(history or ())
    for turn in turns:
        if not isinstance(turn, (tuple, list)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise TypeError("guard: history must be a list of (question, answer) strings.")
    return q or "", a, turns


def _check_length(a, max_bytes):
    # A character has 1 to 4 bytes: most answers need no encoding to be known to fit, and a huge one none to be refused.
    if len(a) > max_bytes or len(a) * 4 > max_bytes and len(a.encode("utf-8", "surrogatepass")) > max_bytes:
        raise _TooLong(f"input_too_long: answer must have at most {max_bytes} bytes. Raise max_bytes or split it.")


def _views(text):
    """The text, and what it looks like where that differs."""
    view = normalised(text)
    return (text, view) if view != text and view.strip() else (text,)


def _finite(logit):
    """The logit as a float. Trap: NaN passes no comparison and infinity is no number of a sound model: both are errors."""
    logit = float(logit)
    if not math.isfinite(logit):
        raise ModelError(f"guard: score must be a number, got a logit of {logit}. Check the model with `protector doctor`.")
    return logit


def _sigmoid(logit):
    """Score of a logit."""
    logit = _finite(logit)
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def _describe(error):
    """Kind and message; only this package's own messages are known to hold no user text."""
    return f"{type(error).__name__}: {error}" if isinstance(error, ProtectorError) else type(error).__name__


def _public(error):
    """The error as a caller may see it: a foreign message may quote the text that it choked on."""
    if isinstance(error, ProtectorError):
        return error
    return ProtectorError(f"guard: answer must be scored, got {_describe(error)} from the model. See `protector doctor`.")


def _loops(text):
    """Whether the text ends in one phrase over and over, as a small model's does when it is lost."""
    words = text.split()
    return (any(len(words) >= 4 * n and words[-n:] * 4 == words[-4 * n:] for n in range(1, 12))
            or any(len(text) >= 12 * n and text.endswith(text[-n:] * 12) for n in range(1, 24)))


def _half_words(text):
    """Half words up to case and signs: a word is two, itself and "", and a character of a script without spaces is one."""
    halves = []
    for part in text.casefold().split():
        for character, word in _UNIT.findall("".join(filter(str.isalnum, part))):
            halves += [character] if character else [word, ""]
    return halves


def _runs(halves):
    """Each run of _COPIED half words."""
    return (tuple(halves[i:i + _COPIED]) for i in range(len(halves) - _COPIED + 1))


def _repeats(text, a):
    """Whether a rewrite is the original, holds all of one that isn't short, or keeps twelve words of it in a row; up to case and signs."""
    halves, original = _half_words(text), _half_words(a)
    letters, original_letters = "".join(halves), "".join(original)
    if letters == original_letters or len(original_letters) > _SHORT and original_letters in letters:
        return True
    return not set(_runs(halves)).isdisjoint(_runs(original))


def _loaded(kind, source, backend, options):
    """The model in a file or folder, or the one that was loaded already."""
    if hasattr(source, "logits" if kind == "detector" else "generate"):
        return source
    try:
        return _loading(kind, source, backend, options)()
    except ModuleNotFoundError as error:
        if not error.name:
            raise  # nothing is missing: two packages don't fit each other
        raise MissingPackage(f"Protector: {error.name} must be installed to load {source}, got none. Run: pip install '.[all]'") from None


def _loading(kind, source, backend, options):
    """Function that loads the model in a file or folder; ValueError for options that it doesn't have."""
    if _in_pytorch(source, backend, kind == "detector" and options.get("quantisation") == "INT8"):
        from .models import load

        load, name = partial(load, kind=kind), "PyTorch"
        hidden = {"folder", "kind"} | ({"quantisation", "compile"} if kind == "detoxifier" else set())
    else:
        from . import llama

        load, name = llama.LlamaDetector if kind == "detector" else llama.LlamaDetoxifier, "llama.cpp"
        hidden = {"path"}
    options = {option: value for option, value in options.items() if value is not None}
    known = [option for option in inspect.signature(load).parameters if option not in hidden]
    if not options.keys() <= set(known):
        raise ValueError(f"Protector: {kind}_options of {name} must be of {', '.join(known)}, got {', '.join(options)}. Leave out the others.")
    return partial(load, source, **options)


def _in_pytorch(source, backend, is_int8):
    is_folder = Path(source).is_dir()
    if backend == "llama.cpp" and (is_folder or is_int8):
        got, other = (f"the folder {source}", "Export it") if is_folder else ("quantisation INT8", "Choose another")
        raise ModelError(f"Protector: with backend llama.cpp the model must be a GGUF file that it runs, got {got}. {other}, or use backend='auto'.")
    return is_folder or is_int8 or backend == "torch"
