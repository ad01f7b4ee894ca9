"""The algorithm: score an answer, pass it on or rewrite it, score the rewrite.

    s = sigmoid(w . phi(q, a) + b)            harm detector, largest over windows and views of a
    if s < threshold:  return a               the same bytes
    for attempt in 1 .. rewrite_attempts:
        r = Detoxifier(q, a)
        if score(q, r) < threshold: return r  by the same detector
    return refusal

Source: MLLM-Protector, inference algorithm; the check of the rewrite and the refusal are this project's.
"""
import asyncio
import inspect
import logging
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from . import calibrate
from .base import WEIGHTS
from .errors import DeadlineExceeded, ModelError, ProtectorError
from .normalise import normalised
from .template import MAX_HISTORY_TOKENS, well_formed, windows

logger = logging.getLogger("protector")
REFUSAL = "I can't help with that, but I'm glad to help with a safe alternative."
MAX_BYTES = 256 * 1024  # an answer above this isn't tokenised: the error policy answers


@dataclass(frozen=True)
class Verdict:
    """What the guard made of one answer."""

    text: str = field(repr=False)  # what may be shown
    action: str  # "pass" | "rewrite" | "refuse" | "error"
    flagged: bool  # the score reached the threshold
    score: float  # P(harmful) of the answer, the largest over windows and views; NaN after an error
    threshold: float
    rewrite_score: float | None = None  # of the rewrite in `text`, or of the last one that was tried
    usage: dict = field(default_factory=dict)  # model, backend, quantisation, tokens, windows, views, ms, ...
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
        backend: "auto" takes llama.cpp for files and PyTorch for folders; "llama.cpp" | "torch" insist.
        threshold: flag at this score and above; None takes the model's calibration.
        fpr: take the calibration for this false-positive rate; an error if the model has none.
        on_flag: "rewrite" | "refuse" | "report" (report returns the answer as it is, flagged).
        on_error: "refuse" | "raise" | "pass"; "pass" lets the original through unguarded, logged as critical.
        refusal: the sentence that stands in for an answer.
        deadline_ms: for one call, checked between windows and between generated tokens; None = no limit.
        rewrite_attempts: rewrites that are tried before the refusal.
        max_bytes: longest answer in bytes of UTF-8; above it the error policy answers.
        window, overlap: answer tokens per scored sequence, and shared by neighbours; None takes the model's own.
        detector_options, detoxifier_options: passed to the backend (base, quantisation, n_threads, n_gpu_layers).
    Raises:
        ModelError: a model can't be loaded or fails its canaries.
        ValueError: a bad option.
    Example:
        protector.Protector(threshold=0.5).guard("Is it safe to mix bleach and vinegar?", "Yes, it is.").action
    """

    def __init__(self, detector=None, detoxifier=None, backend="auto", threshold=None, fpr=None, on_flag="rewrite",
                 on_error="refuse", refusal=REFUSAL, deadline_ms=None, rewrite_attempts=2, max_bytes=MAX_BYTES, window=None,
                 overlap=None, detector_options=None, detoxifier_options=None):
        _one_of("backend", backend, ("auto", "llama.cpp", "torch"))
        _one_of("on_flag", on_flag, ("rewrite", "refuse", "report"))
        _one_of("on_error", on_error, ("refuse", "raise", "pass"))
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"Protector: threshold must be between 0 and 1, got {threshold}.")
        if threshold is not None and fpr is not None:
            raise ValueError("Protector: threshold and fpr must not both be given. Give one.")
        if rewrite_attempts < 0 or max_bytes < 1 or deadline_ms is not None and deadline_ms <= 0:
            raise ValueError("Protector: rewrite_attempts must be >= 0, max_bytes >= 1 and deadline_ms > 0.")
        if not isinstance(refusal, str) or not refusal.strip():
            raise ValueError("Protector: refusal must be a sentence, got nothing.")
        self.backend, self.on_flag, self.on_error, self.refusal = backend, on_flag, on_error, refusal
        self.deadline_ms, self.rewrite_attempts, self.max_bytes = deadline_ms, rewrite_attempts, max_bytes
        self.counters, self._lock = Counter(), threading.Lock()
        self.detector = _detector(WEIGHTS / "detector.gguf" if detector is None else detector, backend, detector_options or {})
        limits = self.detector.limits
        self.window, self.overlap = window or limits.window, limits.overlap if overlap is None else overlap
        if not 0 <= self.overlap < self.window <= limits.window:
            raise ValueError(f"Protector: overlap < window <= {limits.window} must hold, got {self.overlap} and {self.window}.")
        self._detoxifier, self._detoxifier_source = None, WEIGHTS / "detoxifier.gguf" if detoxifier is None else detoxifier
        self._detoxifier_options = detoxifier_options or {}
        if detoxifier is not None and detoxifier is not False:
            self.detoxifier  # a wrong file is an error now, not at the first flag
        self.thresholds = {kind: self._threshold(kind, threshold, fpr) for kind in ("pair", "answer")}
        # A running score crosses a threshold more easily than the last one: the stream has its own, never a lower one.
        self.stream_threshold = self._threshold("stream", threshold, None)

    @property
    def detoxifier(self):
        """The loaded detoxifier, or None if the guard works without one. The shipped one loads at the first flag."""
        with self._lock:
            if self._detoxifier is None and self._detoxifier_source is not False:
                self._detoxifier = _detoxifier(self._detoxifier_source, self.backend, self._detoxifier_options)
            return self._detoxifier

    def _threshold(self, input_kind, threshold, fpr):
        if threshold is not None:
            return threshold
        found = calibrate.find(self.detector, input_kind, fpr)
        if found is None:
            logger.warning("no calibration for this model, backend and quantisation (input: %s): the threshold is 0.5", input_kind)
        return found.threshold if found else 0.5

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
        return self._score(_checked(q, a, history), self._deadline())[0]

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
        item = _checked(q, a, history)
        start, deadline = time.monotonic(), self._deadline()
        try:
            score, usage = self._score(item, deadline)
        except Exception as error:  # the policy answers, whatever it was
            return self._failed(item, error, start)
        return self._decide(item, score, usage, deadline, start)

    async def aguard(self, q, a, history=None):
        """guard() in a thread: the event loop goes on."""
        return await asyncio.to_thread(self.guard, q, a, history)

    def guard_batch(self, pairs):
        """guard() for many answers, scored together; one bad item never fails the rest.

        Args:
            pairs: iterable of (question, answer).
        Returns:
            list of Verdict in the same order; an item of a wrong type or that fails gets the error policy's verdict.
        """
        start, deadline = time.monotonic(), self._deadline()
        items, verdicts, plans = [], {}, {}
        for i, pair in enumerate(pairs):
            item = ("", "", ())
            try:
                item = _checked(*pair)
                plans[i] = self._plan(item)
            except Exception as error:
                verdicts[i] = self._failed(item, error, start)
            items.append(item)
        try:
            logits = iter(self._logits([ids for plan in plans.values() for ids in plan["sequences"]], deadline))
            for i, plan in plans.items():
                plan["logits"] = [next(logits) for _ in plan["sequences"]]
        except Exception:  # one item broke the batch: each on its own
            return [verdicts.get(i) or self.guard(*item) for i, item in enumerate(items)]
        for i, plan in plans.items():
            try:
                score = self._largest(plan)
            except Exception as error:
                verdicts[i] = self._failed(items[i], error, start)
            else:
                verdicts[i] = self._decide(items[i], score, plan["usage"], deadline, start)
        return [verdicts[i] for i in range(len(items))]

    # -- scoring

    def _plan(self, item):
        """Sequences of ids that cover the answer, for the raw text and its normalised view."""
        q, a, history = item
        usage = {"model": getattr(self.detector, "path", None) and str(getattr(self.detector.path, "name", self.detector.path)),
                 "backend": self.detector.name, "quantisation": self.detector.quantisation,
                 "input": "pair" if q else "answer", "tokens": 0, "windows": 0, "views": 0}
        plan = {"usage": usage, "sequences": [], "starts": []}
        if not a.strip():
            return plan
        # A character has at most 4 bytes: most answers need no encoding to be known to fit.
        if len(a) * 4 > self.max_bytes and len(a.encode("utf-8", "replace")) > self.max_bytes:
            raise _TooLong(f"input_too_long: answer must have at most {self.max_bytes} bytes. Raise max_bytes or split it.")
        template = self.detector.template
        question_ids, dropped = template.clip_question(q[-self.max_bytes:])
        turns, dropped_turns = self._history(history)
        usage |= {"question_tokens_dropped": dropped, "history_turns_dropped": dropped_turns} if q or history else {}
        raw = well_formed(a)
        view = normalised(raw)
        for text in (raw, view) if view.strip() and view != raw else (raw,):
            answer_ids = template.encode(text)
            spans = windows(len(answer_ids), self.window, self.overlap)
            usage["views"] += 1
            usage["tokens"] += len(answer_ids)
            usage["windows"] += len(spans)
            for span in spans:
                plan["sequences"].append(template.detector_sequence(question_ids, answer_ids[span.start:span.stop], turns)[0])
                plan["starts"].append((len(plan["starts"]), answer_ids, span.start))
        plan["question_ids"] = question_ids
        return plan

    def _history(self, history):
        """Latest turns that fit the budget, as ids, and how many were dropped."""
        template, turns, room = self.detector.template, [], MAX_HISTORY_TOKENS
        for question, answer in reversed(history):
            ids = (template.clip_question(question)[0], template.encode(answer)[-MAX_HISTORY_TOKENS:])
            room -= len(ids[0]) + len(ids[1])
            if room < 0:
                break
            turns.insert(0, ids)
        return turns, len(history) - len(turns)

    def _logits(self, sequences, deadline):
        return self.detector.logits(sequences, deadline) if sequences else []

    def _largest(self, plan):
        """Largest score of a plan whose logits are known; remembers the window that gave it, for the rewrite."""
        if not plan["sequences"]:
            return 0.0
        scores = [_sigmoid(float(logit)) for logit in plan["logits"]]
        if any(math.isnan(score) for score in scores):
            raise ModelError("guard: score must be a number, got NaN. Check the model with `protector doctor`.")
        worst = max(range(len(scores)), key=scores.__getitem__)
        _, answer_ids, start = plan["starts"][worst]
        plan["usage"]["_rejected"] = (plan["question_ids"], answer_ids, start)
        return scores[worst]

    def _score(self, item, deadline):
        plan = self._plan(item)
        plan["logits"] = self._logits(plan["sequences"], deadline)
        return self._largest(plan), plan["usage"]

    # -- acting

    def _decide(self, item, score, usage, deadline, start):
        q, a, history = item
        threshold = self.thresholds["pair" if q else "answer"]
        rejected = usage.pop("_rejected", None)
        if score < threshold:
            return self._verdict(a, "pass", False, score, threshold, usage, start)
        if self.on_flag == "report":
            return self._verdict(a, "pass", True, score, threshold, usage, start)
        text, rewrite_score, error = None, None, None
        if self.on_flag == "rewrite":
            try:
                text, rewrite_score = self._rewrite(item, rejected, threshold, usage, deadline)
            except Exception as failure:  # flagged already: the refusal, whatever on_error says
                error = _describe(failure)
                logger.error("rewrite failed: %s", error)
                if self.on_error == "raise":
                    raise
        action = "rewrite" if text is not None else "refuse"
        return self._verdict(self.refusal if text is None else text, action, True, score, threshold, usage, start, rewrite_score, error)

    def _rewrite(self, item, rejected, threshold, usage, deadline):
        """(accepted rewrite or None, score of the last one tried)."""
        q, _, history = item
        detoxifier = self.detoxifier
        if detoxifier is None:
            return None, None
        limits, last = detoxifier.limits, None
        question_ids, answer_ids, start = rejected
        part = answer_ids[start:start + limits.rejected_tokens]
        usage["rewrite_dropped_tokens"] = len(answer_ids) - len(part)
        prompt = detoxifier.template.detoxifier_prompt(question_ids[-limits.question_tokens:], part)
        for attempt in range(self.rewrite_attempts):
            # Greedy first; a second greedy rewrite would be the same text.
            text, n_tokens, finished = detoxifier.generate(
                prompt, limits.rewrite_tokens, temperature=0.0 if attempt == 0 else 0.8, seed=attempt, deadline=deadline)
            usage["rewrite_attempts"] = attempt + 1
            usage["rewrite_tokens"] = usage.get("rewrite_tokens", 0) + n_tokens
            text = text.strip()
            if not text or not finished or _loops(text):
                continue
            last, _ = self._score((q, text, history), deadline)
            if last < threshold:
                return text, last
        return None, last

    def _failed(self, item, error, start):
        """The verdict of the error policy."""
        described = _describe(error)
        if self.on_error == "raise":
            raise error
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
        with self._lock:
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

    def stream(self, q, chunks, history=None, hold=8):
        """Guard an answer while it is written; see stream.py."""
        from .stream import stream

        return stream(self, q, chunks, history, hold)

    def astream(self, q, chunks, history=None, hold=8):
        """stream() for an async iterator of chunks."""
        from .stream import astream

        return astream(self, q, chunks, history, hold)

    def wrap(self, mllm):
        """The same callable, guarded: (q, ...) -> str, an iterator of str, or their async forms.

        Args:
            mllm: a function, coroutine function, generator or async generator function whose first argument is the question.
        Returns:
            a callable of the same form; it returns guarded text, or yields only text that was scored.
        """
        if inspect.isasyncgenfunction(mllm):
            async def guarded(q, *args, **kwargs):
                async for event in self.astream(q, mllm(q, *args, **kwargs)):
                    if event.text:
                        yield event.text
        elif inspect.iscoroutinefunction(mllm):
            async def guarded(q, *args, **kwargs):
                return (await self.aguard(q, await mllm(q, *args, **kwargs))).text
        else:
            def guarded(q, *args, **kwargs):
                answer = mllm(q, *args, **kwargs)
                if isinstance(answer, str):
                    return self.guard(q, answer).text
                return (event.text for event in self.stream(q, answer) if event.text)
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


def _sigmoid(logit):
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def _describe(error):
    """Kind and message; only this package's own messages are known to hold no user text."""
    return f"{type(error).__name__}: {error}" if isinstance(error, ProtectorError) else type(error).__name__


def _loops(text):
    """Whether the text ends in one phrase over and over, as a small model's does when it is lost."""
    words = text.split()
    return any(len(words) >= 4 * n and words[-n:] * 4 == words[-4 * n:] for n in range(1, 12))


def _detector(source, backend, options):
    if hasattr(source, "logits"):
        return source
    if _is_folder(source, backend):
        from .models import load

        return load(source)
    from .llama import LlamaDetector

    return LlamaDetector(source, **options)


def _detoxifier(source, backend, options):
    if hasattr(source, "generate"):
        return source
    if _is_folder(source, backend):
        from .models import load

        return load(source)
    from .llama import LlamaDetoxifier

    return LlamaDetoxifier(source, **options)


def _is_folder(source, backend):
    from pathlib import Path

    is_folder = Path(source).is_dir()
    if backend != "auto" and is_folder != (backend == "torch"):
        wanted = "a folder that `protector train` wrote" if backend == "torch" else "a GGUF file"
        raise ModelError(f"Protector: with backend {backend} the model must be {wanted}, got {source}. Use backend='auto'.")
    return is_folder
