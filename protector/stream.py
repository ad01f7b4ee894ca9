"""Guard an answer while it is written: text is shown only after it was scored, and each token of a window is scored once.

    chunks --> text --> tokens up to a safe cut --> growing KV cache --> running score s_t --> release, or alarm

A safe cut lies where white space follows a word (or a sign follows a Chinese, Japanese or Korean one): no token of the
base's tokeniser crosses it, so the ids of the text so far plus the ids of the rest are the ids of the whole, however the
text was cut into chunks. The running score of a prefix is therefore the score that `Protector.score` gives that prefix (to
the rounding of the cache). What has no safe cut is held back until one comes. A tokeniser keeps those kinds of cut that hold
for it: SentencePiece, which puts a mark before every text, has few of them or none, and then all is held until the end.

    alarm    if what the last tokens held is over the threshold (running.py): the whole answer's score would be, too;
             or if a part of the normalised view is LOOK_MARGIN over it: by itself it reads oddly, so the whole's may be lower
    release  text whose tokens lie at least `hold` tokens behind the last scored one, while s_t is below the threshold;
             what looks disguised also waits until a part of the view with it scored below the threshold, and what stands behind
             an override, which turns around any length of text, until the end
    look     where s_t climbs from a low, the latest tokens are scored a second time without what came before, on a cache of their own
    end      the whole answer's score decides about what is still held back, as in guard()

Text between safe cuts waits until a step of STEP_TOKENS tokens is full, or the next would be too many: one by one, each would take three
times as long. Each still has a score of its own, and steps are the same however the text was cut.

Windows are those of template.windows: at a window's end the cache starts anew with the question and the overlap.
"""
import asyncio
import inspect
import logging
import math
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial

from .errors import DeadlineExceeded, ModelError
from .guard import HOLD_TOKENS, Verdict, _check_length, _checked, _describe, _finite, _sigmoid, _TooLong, _views
from .normalise import normalised, turns
from .running import LOOK_BACK, LOOK_MARGIN, Running
from .template import well_formed

logger = logging.getLogger("protector")
# Scored in one step, while more text comes, if no part between two safe cuts has more; the last step takes what there is. llama.cpp's product on a
# CPU takes up to six tokens at once: on an EPYC 6 take twice as long as one, and 8 two and a half to three times.
STEP_TOKENS = 6
VIEW_TOKENS = 32  # a disguised stream's normalised view is scored at the step's end at which so many tokens have come
VIEW_CHARS = 1024  # of the text before these tokens are read with them, at most
VIEW_BACK_TOKENS = 320  # likewise, once a view was scored: a script of many tokens a character costs no more than another
_LOOK_CHARS = 64  # likewise where the view is only compared, not scored
_CJK = "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
# Trap: only where every Unicode version agrees on what is a letter, a sign and white space.
_WORDS, _SIGNS, _ENDS = ("a", "One two", "7", "\u4f60"), tuple(".,;:)}>"), ("\n", "\t", "\n\nb", "\n  b")
_CUTS = (  # (places, what stands before and behind them)
    (r"(?<=\S)(?= )", _WORDS + _SIGNS, (" ", " b", "  b", " 7", " .", " \u4f60")),
    (r"(?<=\S)(?=[\n\t])", _WORDS + _SIGNS, _ENDS),
    (rf"(?<=[A-Za-z0-9{_CJK}])(?=[\n\t])", _WORDS, _ENDS),  # Llama 3's and Qwen's tokenisers join a sign and the line's end
    (rf"(?<=[{_CJK}])(?=[\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b,.!?:;])", ("\u4f60", "\u306f"), ("\u3002", "\uff0c\u4f60", ".", ", b")),
)


def safe_cut(template):
    """Pattern of the places where no token of this template's tokeniser crosses, and where what follows is read as in the whole."""
    def holds(left, right):
        return template.encode(left) + template.encode(right) == template.encode(left + right)

    kept = [places for places, lefts, rights in _CUTS if all(holds(left, right) for left in lefts for right in rights)]
    return re.compile("|".join(kept) or "(?!)")


def check_streams(protector):
    """See that the guard's detector scores streams.

    Raises:
        ValueError: it is in int8, in which a stream's score isn't the whole answer's.
    """
    if getattr(protector.detector, "rounded", None):
        raise ValueError(f"stream: detector must score streams as the whole answer, got one in {protector.detector.rounded}, which can't. Choose another quantisation.")


def _deadline(protector, check):
    """What is called between the steps of an answer: the guard's deadline and the caller's check, where there are such; raises to stop."""
    calls = [call for call in (check, protector._deadline()) if call]
    return (lambda: [call() for call in calls]) if calls else None


def _less(score):
    """The score LOOK_MARGIN logits lower."""
    part = score * math.exp(-LOOK_MARGIN)
    return part / (1 - score + part)


class _Closed(BaseException):
    """Ends the step under way; no error, so that no policy sees it."""


@dataclass(frozen=True)
class Event:
    """One step of a guarded stream."""

    text: str = field(repr=False)  # may be shown; "" where only the verdict is new
    verdict: Verdict | None = None  # on the last event


class StreamGuard:
    """State of one guarded stream: begin if the answer is still to come, push chunks, then finish. close() may be called from another thread.

    Args:
        protector: guard.Protector.
        q: the question; "" or None for none.
        history: earlier turns.
        hold: scored tokens that are still held back, so that an alarm a few words later can stop them.
        check: called between parts of a step; raises to stop it. A BaseException goes to the caller, past the error policy.

    A verdict's usage is guard()'s, and shown_chars: of the answer, that were released; fragments: parts of its normalised view that
    were scored while it was written, in fragment_tokens.
    """

    def __init__(self, protector, q, history=None, hold=HOLD_TOKENS, check=None):
        if not isinstance(hold, int) or hold < 0:
            raise ValueError(f"stream: hold must be an int >= 0, got {hold!r}.")
        check_streams(protector)
        self.q, _, self.history = _checked(q, "", history)
        self.protector, self.hold, self.done = protector, hold, False
        self.threshold = protector.thresholds["pair" if self.q else "answer"]
        self.running = 0.0  # s_t
        self.released = 0  # characters
        self._chunks, self._n_bytes = [], 0
        self._pending, self._last_char = [], ""  # chunks without a safe cut, which weren't scored yet
        self._waiting, self._n_step = [], 0  # (text between safe cuts, its ids) of the step that fills; all its tokens
        self._due = []  # likewise, of full steps that weren't scored yet; None where a step ends
        self._held = deque()  # (text, answer tokens up to its end) that was scored and isn't released yet
        self._n_fed, self._n_looked, self._n_viewed = 0, 0, 0  # characters: scored, looked at for a disguise, and free of an unscored one
        self._tail, self._view_at, self._is_disguised = "", 0, False  # text of the next view; tokens at the last one; since it
        self._is_turned = False  # behind an override: no part of the view shows what a reader sees
        self._is_suspect = False  # the last part of the view is over the threshold, but not by its margin
        self._ids, self._window_start, self._n_windows = [], 0, 1
        self._main, self._look = Running(), None  # of this window, and since its last rise
        self._look_cursor, self._n_looks = None, 0
        self._best, self._view = 0.0, 0.0  # scores: of finished windows and looks; of parts of the view, less their margin
        self._n_fragments, self._fragment_tokens, self._view_usage = 0, 0, {}  # the latter: of the whole view
        self._view_window = None  # of the view, or the part of it, that was flagged
        self._is_flagged, self._unguarded = False, None  # the error's verdict once on_error="pass" lets everything through
        self._check_outside = check
        self.restart_clock()
        self._cursor, self._lock, self._is_closing = None, threading.RLock(), False
        self._dropped = {}

    @property
    def text(self):
        """The answer so far."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] if self._chunks else ""

    def begin(self):
        """Read the question while an upstream reads it, too, before the answer's first chunk comes: without this the first word's push does.

        A blank answer, which needs no model otherwise, costs that much then. What fails is left to the first push, which meets it again.
        """
        with self._lock:
            if self.done or self._cursor is not None or self._unguarded is not None:
                return
            try:
                self._check()
                self._open(reads=True)
            except _Closed:
                pass
            except Exception as error:
                logger.warning("reading a question ahead failed: %s", _describe(error))

    def restart_clock(self):
        """Count the answer's time, and its deadline, from now on: what was begun early isn't late."""
        self._start_s, self._deadline = time.monotonic(), _deadline(self.protector, self._check_outside)

    def push(self, chunk):
        """Take one chunk; returns the events that it makes due (none while text is held back)."""
        if not isinstance(chunk, str):
            raise TypeError(f"stream: chunk must be a str, got {type(chunk).__name__}.")
        return self._step(lambda: self._push(chunk))

    def finish(self):
        """Score what is left and return the last events; the last one carries the verdict."""
        events = self._step(self._finish)
        if events and not self.done:  # an error just now, under "pass"
            events = self._step(lambda: self._end(replace(events[0], verdict=self._unguarded)))
        return events

    def expire(self):
        """End by the error policy: the deadline passed while no chunk came."""
        return self._step(lambda: self._fail(DeadlineExceeded(
            f"stream: answer must end within {self.protector.deadline_ms} ms, got no end. Raise deadline_ms.")))

    def close(self):
        """Free the cache; called at the end, and when the client leaves in the middle. Waits for a step that runs."""
        self._is_closing = True  # seen by that step between windows and while it waits for the model
        with self._lock:
            self._end()

    def time_left_s(self):
        """Seconds until the deadline, or None."""
        is_free = self.done or self.protector.deadline_ms is None or self._unguarded is not None
        return None if is_free else self._start_s + self.protector.deadline_ms / 1e3 - time.monotonic()

    def _step(self, work):
        with self._lock:
            if self.done:
                return []
            try:
                events = work()
            except _Closed:
                return []
            except Exception as error:
                events = self._fail(error)
            return [] if self._is_closing else events

    def _check(self):
        """Called between parts of a step; raises to stop it."""
        if self._is_closing:
            raise _Closed
        if self._deadline:
            self._deadline()

    def _push(self, chunk):
        if chunk:
            self._chunks.append(chunk)
        if self._unguarded is not None:
            self.released += len(chunk)
            return [Event(chunk)] if chunk else []
        self._check()
        if not chunk:  # a server may send them for ever: the deadline counts
            return []
        # The whole is not encoded again for each chunk.
        _check_length(chunk, self.protector.max_bytes)
        self._n_bytes += len(chunk.encode("utf-8", "surrogatepass"))
        if self._n_bytes > self.protector.max_bytes:
            raise _TooLong(f"input_too_long: answer must have at most {self.protector.max_bytes} bytes. Raise max_bytes.")
        n_before = len(self._last_char)
        cuts = [match.start() - n_before for match in self.protector.safe_cut.finditer(self._last_char + chunk)]
        self._last_char = chunk[-1]
        if not cuts:
            self._pending.append(chunk)
            return []
        pieces = ["".join(self._pending) + chunk[:cuts[0]]]
        pieces += [chunk[start:stop] for start, stop in zip(cuts, cuts[1:])]
        self._pending = [chunk[cuts[-1]:]]
        for piece in filter(None, pieces):
            self._wait(piece)
        if not self._due:
            if self._cursor is None and self._waiting and self.text.strip():
                self._open(reads=True)  # so that no later push waits for it and a step together
            return []
        if self._due.count(None) > 1:  # a long chunk: its end isn't left until the next one comes
            self._take_waiting()
        self._feed_due()
        if self._alarm and self.protector.on_flag != "report":
            return self._flag(self._alarm)
        return self._release()

    def _finish(self):
        text = self.text
        if self._unguarded is not None:
            return self._end(Event("", replace(self._unguarded, text=text)))
        if not text.strip():  # no model call
            return self._pass(0.0, flagged=False)
        self._wait("".join(self._pending))
        self._take_waiting()
        self._feed_due()
        if not self._ids and not self._is_closing:
            raise ModelError("stream: answer must have tokens, got none. Use another tokeniser.")
        score = max(self._whole, self._alarm)
        if self._refuses(score):
            return self._flag(score)
        for view in _views(well_formed(text))[1:]:
            view_score, self._view_usage = self._score_view(view)
            score = max(score, view_score)
        return self._flag(score) if self._refuses(score) else self._pass(score, score >= self.threshold)

    def _refuses(self, score):
        """Whether an answer with this score is kept back."""
        return score >= self.threshold and self.protector.on_flag != "report"

    @property
    def _whole(self):
        """Score of the text so far, as it is."""
        return max(self._best, self._scored(lambda running: running.logit))

    @property
    def _alarm(self):
        """Score that ends the stream before its end, or 0: the whole answer's will be no lower, but for that of a part of its view."""
        score = max(self._best, self._view, self._scored(lambda running: running.peak))
        return score if score >= self.threshold else 0.0

    def _scored(self, part):
        """Score of a part of what runs: the larger one of the window's and the look's."""
        logits = [part(running) for running in (self._main, self._look) if running is not None]
        return max((_sigmoid(logit) for logit in logits if logit > -math.inf), default=0.0)

    @property
    def _stops(self):
        return self._is_closing or self._alarm and self.protector.on_flag != "report"

    def _wait(self, piece):
        ids = self.protector.detector.template.encode(piece)
        if 0 < self._n_step > STEP_TOKENS - len(ids):
            self._end_step()
        self._waiting.append((piece, ids))
        self._n_step += len(ids)
        if self._n_step >= STEP_TOKENS:
            self._end_step()

    def _end_step(self):
        self._take_waiting()
        self._due.append(None)
        self._n_step = 0

    def _take_waiting(self):
        self._due += self._waiting
        self._waiting = []

    def _feed_due(self):
        """Score the text that is due, and its view at the steps' ends wherever VIEW_TOKENS tokens have come: the same places for every chunking."""
        due, self._due, ids = self._due, [], []
        for part in due:
            if part is None:
                if len(self._ids) + len(ids) - self._view_at >= VIEW_TOKENS:
                    self._feed(ids)
                    ids = []
                    if self._stops:
                        return
                    self._check_view(at_mark=True)
                    if self._stops:
                        return
                continue
            piece, piece_ids = part
            ids += piece_ids
            self._tail += piece
            self._is_turned = self._is_turned or turns(piece)
            self._n_fed += len(piece)
            self._held.append((piece, len(self._ids) + len(ids)))
        if ids:
            self._feed(ids)
            self._check_view(at_mark=False)

    def _feed(self, ids):
        """Score new answer tokens on the growing cache, window by window."""
        window, overlap = self.protector.window, self.protector.overlap
        if self._cursor is None:
            self._open()
        while ids and not self._stops:
            self._check()
            room = self._window_start + window - len(self._ids)
            if room == 0:
                self._end_look()
                self._best = max(self._best, _sigmoid(self._main.logit))
                if self._stops:  # the rewrite reads this window
                    return
                self._window_start += window - overlap
                self._cursor.start(self._prefix)
                self._main, self._n_windows = Running(), self._n_windows + 1
                room = window - overlap
            part, ids = ids[:room], ids[room:]
            n_again = 0 if self._main.values else len(self._ids) - self._window_start  # of the overlap
            self._ids += part  # before an alarm: the rewrite may see them
            part = self._ids[len(self._ids) - len(part) - n_again:]
            self._take(part, self._logits(self._cursor, part))

    def _open(self, reads=False):
        """Begin with the question; it is read now, or with the first tokens."""
        template = self.protector.detector.template
        question_ids, turns, self._dropped = self.protector._context(self.q, self.history)
        self._prefix = template.prefix(question_ids, turns)
        self._cursor = self.protector.detector.open()
        try:
            self._cursor.start(self._prefix)
            if reads:
                self._logits(self._cursor, [])
        except BaseException:
            self._free()  # or a later push would score without the question
            raise

    def _logits(self, cursor, ids):
        logits = cursor.feed(ids, self._check)
        if len(logits) != len(ids):
            raise ModelError(f"stream: detector must return {len(ids)} logits, got {len(logits)}. Check its backend.")
        return logits

    def _take(self, ids, logits):
        """Read the logits of these ids of the window; what follows a rise is scored in a look, too."""
        begin = 0  # of the ids that the look hasn't seen
        for i, logit in enumerate(logits, 1):
            self.running = _sigmoid(logit)
            if self._main.push(float(logit)) and not self._stops:
                self._feed_look(ids[begin:i])
                self._end_look()
                self._look, self._look_cursor, self._n_looks = Running(LOOK_MARGIN), self.protector.detector.open(), self._n_looks + 1
                self._look_cursor.start(self._prefix)
                stop = len(self._ids) - len(ids) + i
                self._feed_look(self._ids[max(stop - LOOK_BACK, self._window_start):stop])
                begin = i
        self._feed_look(ids[begin:])

    def _feed_look(self, ids):
        if self._look is not None and ids:
            for logit in self._logits(self._look_cursor, ids):
                self._look.push(_finite(logit))

    def _end_look(self):
        if self._look is not None:
            self._best, self._look = max(self._best, _sigmoid(self._look.logit)), None
            self._look_cursor.close()

    def _check_view(self, at_mark):
        """Score the normalised view of the last text at a mark; between marks only see whether it looks disguised."""
        n_new, self._n_looked = self._n_fed - self._n_looked, self._n_fed
        if at_mark or not self._is_disguised:
            text = well_formed(self._tail if at_mark else self._tail[-n_new - _LOOK_CHARS:])
            view = normalised(text)
            self._is_disguised = view != text and bool(view.strip())
        self._is_suspect, n_kept = self._is_suspect and not at_mark, VIEW_CHARS
        if at_mark and self._is_disguised:
            score, usage = self._score_view(view)
            self._view = max(self._view, _less(score))
            self._n_fragments, self._fragment_tokens = self._n_fragments + 1, self._fragment_tokens + usage["tokens"]
            self._is_suspect = self._refuses(score)
            n_kept = min(n_kept, len(text) * VIEW_BACK_TOKENS // max(usage["tokens"], 1))
        if (at_mark or not self._is_disguised) and not self._is_suspect and not self._is_turned:
            self._n_viewed = self._n_fed
        if at_mark:
            self._view_at, self._tail, self._is_disguised = len(self._ids), self._tail[-n_kept:], False

    def _score_view(self, view):
        """(score, usage) of the whole normalised view or a part of it."""
        score, usage, window = self.protector._score((self.q, view, self.history), self._check, views=(view,))
        if self._refuses(score):
            self._view_window = window
        return score, usage

    def _release(self):
        if self._refuses(self._scored(lambda running: running.last)):
            return []
        due = []
        while (self._held and self._held[0][1] <= len(self._ids) - self.hold
               and self.released + len(self._held[0][0]) <= self._n_viewed):
            due.append(self._held.popleft()[0])
            self.released += len(due[-1])
        return [Event("".join(due))] if due else []

    def _flag(self, score):
        """Nothing more of the answer leaves: the rewrite or the refusal ends the stream."""
        self._is_flagged = True
        item, window = (self.q, self.text[:self._n_fed], self.history), (self._ids, self._window_start)
        if self._view_window and max(self._whole, self._scored(lambda running: running.peak)) < self.threshold:
            window = self._view_window  # what is flagged is read in the view alone, and that is rewritten
        verdict = self.protector._decide(item, max(score, self.threshold), self._usage(), window, self._check, self._start_s)
        return self._end(Event(self._separator + verdict.text, verdict))

    def _pass(self, score, flagged):
        text = self.text
        verdict = self.protector._verdict(text, "pass", flagged, score, self.threshold, self._usage(), self._start_s)
        return self._end(Event(text[self.released:], verdict))

    def _fail(self, error):
        """The error policy in mid-stream: held text leaves only under "pass", and never once the score reached the threshold."""
        protector, score = self.protector, max(self._whole, self._alarm)
        self._is_flagged = self._is_flagged or self._refuses(score)
        if protector.on_error == "raise" or not self._is_flagged:
            try:
                text = self.text if protector.on_error == "pass" else ""  # a huge one isn't joined to be thrown away
                verdict = protector._failed((self.q, text, self.history), error, self._start_s)
                verdict = replace(verdict, usage=self._usage() | verdict.usage)
            except Exception:
                self._end()
                raise
        else:
            logger.error("guard failed in a flagged stream: %s", _describe(error))
            verdict = protector._verdict(protector.refusal, "refuse", True, max(score, self.threshold), self.threshold, self._usage(),
                                         self._start_s, error=_describe(error))
        if protector.on_error == "pass" and not self._is_flagged:
            self._free()
            self._unguarded = verdict  # the rest of the answer goes out, too, and finish() says that it was an error
            event, self.released = Event(text[self.released:]), len(text)
            return [event]
        return self._end(Event(self._separator + verdict.text, verdict))

    @property
    def _separator(self):
        return "\n\n" if self.released else ""

    def _usage(self):
        usage, view, n = self.protector._usage(self.q), self._view_usage, self._n_fragments
        usage |= {"tokens": len(self._ids), "windows": self._n_windows if self._ids else 0, "views": bool(self._ids) + bool(view),
                  "looks": self._n_looks + view.get("looks", 0), "shown_chars": self.released, **(self._dropped if self._ids else {})}
        usage |= {"view_" + key: view[key] for key in ("tokens", "windows") if view}
        return usage | ({"fragments": n, "fragment_tokens": self._fragment_tokens} if n else {})

    def _free(self):
        for cursor in filter(None, (self._cursor, self._look_cursor)):
            cursor.close()
        self._cursor = self._look_cursor = None

    def _end(self, *events):
        self.done = True
        self._free()
        return list(events)


def stream(protector, q, chunks, history=None, hold=HOLD_TOKENS):
    """Guard an iterator of text chunks.

    Args:
        protector: guard.Protector.
        q: the question.
        chunks: iterable of str; its close() is called at an alarm, so that the upstream stops.
        history: earlier turns.
        hold: scored tokens that are still held back.
    Returns:
        iterator of Event; the last one carries the verdict. Joined texts of a passed stream are the answer, byte for byte.
        An exception of the upstream comes through, and what is held back then isn't shown.
    """
    return _events(StreamGuard(protector, q, history, hold), chunks)


def _events(state, chunks):
    try:
        for chunk in chunks:
            yield from state.push(chunk)
            if state.done:
                return
        yield from state.finish()
    finally:
        state.close()
        if hasattr(chunks, "close"):
            chunks.close()


def astream(protector, q, chunks, history=None, hold=HOLD_TOKENS):
    """stream() for an async iterator of chunks; scoring runs in a thread, so the event loop goes on.

    A deadline also ends the wait for a chunk that never comes; under on_error="pass" the guard is out of the way then, and waits on.
    """
    return _async_events(StreamGuard(protector, q, history, hold), chunks)


async def _async_events(state, chunks):
    upstream, coming = chunks.__aiter__(), None
    try:
        while not state.done:
            left_s = state.time_left_s()
            if coming is None:
                coming = upstream.__anext__() if left_s is None else asyncio.ensure_future(upstream.__anext__())
            if left_s is not None and not (await asyncio.wait([coming], timeout=left_s))[0]:
                step = state.expire  # the chunk isn't given up: where errors pass, it and the rest still go out
            else:
                try:
                    step, coming = partial(state.push, await coming), None
                except StopAsyncIteration:
                    break
            for event in await asyncio.to_thread(step):
                yield event
        for event in await asyncio.to_thread(state.finish):
            yield event
    finally:
        if isinstance(coming, asyncio.Future):  # a generator that runs can't be closed
            coming.cancel()
            await asyncio.wait([coming])
        await asyncio.to_thread(state.close)
        for source in (upstream, chunks):
            close = getattr(source, "aclose", None) or getattr(source, "close", None)
            closed = close() if close else None
            if inspect.isawaitable(closed):
                await closed
