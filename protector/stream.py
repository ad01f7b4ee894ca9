"""Guard an answer while it is written: text is shown only after it was scored, and each token is scored once.

    chunks --> text --> tokens up to a safe cut --> growing KV cache --> running score s_t --> release, or alarm

A safe cut lies where white space follows a word: no token of the base's tokeniser crosses it, so the ids of the text so far
plus the ids of the rest are the ids of the whole, however the text was cut into chunks. The running score of a prefix is
therefore the score that `Protector.score` gives that prefix (to the rounding of the cache).

    alarm    if min(s_{t-3}, ..., s_t) >= stream threshold: one odd token raises no alarm
    release  text whose tokens lie at least `hold` tokens behind the last scored one
    end      the whole answer's score decides about what is still held back, as in guard()

Windows are those of template.windows: at a window's end the cache starts anew with the question and the overlap.
"""
import asyncio
import math
import re
import time
from dataclasses import dataclass

from .errors import ModelError
from .guard import Verdict, _checked, _sigmoid, _TooLong
from .normalise import normalised
from .template import well_formed

PATIENCE = 4  # neighbouring positions that must all be over the threshold for an alarm
VIEW_TOKENS = 32  # a disguised stream's normalised view is scored again each so many tokens
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n\t])")


@dataclass(frozen=True)
class Event:
    """One step of a guarded stream."""

    text: str  # may be shown; "" where only the verdict is new
    verdict: Verdict | None = None  # on the last event


class StreamGuard:
    """State of one guarded stream: push chunks, then finish.

    Args:
        protector: guard.Protector.
        q: the question; "" or None for none.
        history: earlier turns.
        hold: scored tokens that are still held back, so that an alarm a few words later can stop them.
    """

    def __init__(self, protector, q, history=None, hold=8):
        if not isinstance(hold, int) or hold < 0:
            raise ValueError(f"stream: hold must be an int >= 0, got {hold!r}.")
        self.protector, self.hold, self.q = protector, hold, _checked(q, "", history)[0]
        self.history = _checked(q, "", history)[2]
        self.text, self.released, self.done = "", 0, False
        self._scored = 0  # characters whose tokens were fed
        self._cuts = []  # (characters, answer tokens) at safe cuts that aren't released yet
        self._ids, self._recent, self._best, self._window_start = [], [], 0.0, 0
        self._view_at, self.usage_windows = 0, 1
        self.running = 0.0  # s_t
        self._start_s, self._deadline = time.monotonic(), protector._deadline()
        self._cursor = None
        kind = "pair" if self.q else "answer"
        self.threshold = protector.thresholds[kind]
        self.alarm_threshold = max(self.threshold, protector.stream_threshold)

    def push(self, chunk):
        """Take one chunk; returns the events that it makes due (none while text is held back)."""
        if not isinstance(chunk, str):
            raise TypeError(f"stream: chunk must be a str, got {type(chunk).__name__}.")
        if self.done or not chunk:
            return []
        self.text += chunk
        try:
            return self._advance(self._last_cut(), last=False)
        except Exception as error:
            return self._fail(error)

    def finish(self):
        """Score what is left and return the last events; the last one carries the verdict."""
        if self.done:
            return []
        try:
            if not self.text.strip():
                return self._end(Event(self.text, self.protector._verdict(
                    self.text, "pass", False, 0.0, self.threshold, self._usage(), self._start_s)))
            return self._advance(len(self.text), last=True)
        except Exception as error:
            return self._fail(error)

    def close(self):
        """Free the cache; called at the end, and when the client leaves in the middle."""
        self.done = True
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

    def _last_cut(self):
        last = self._scored
        for match in _SAFE_CUT.finditer(self.text, self._scored):
            last = match.start() if match.start() > self._scored else last
        return last

    def _advance(self, upto, last):
        if len(self.text) * 4 > self.protector.max_bytes and len(self.text.encode("utf-8", "replace")) > self.protector.max_bytes:
            raise _TooLong(f"input_too_long: answer must have at most {self.protector.max_bytes} bytes. Raise max_bytes.")
        if self._deadline:
            self._deadline()
        if upto > self._scored:
            piece = well_formed(self.text[self._scored:upto])
            self._feed(self.protector.detector.template.encode(piece))
            self._scored = upto
            self._cuts.append((upto, len(self._ids)))
        whole = max(self._best, self.running)
        if last or len(self._ids) - self._view_at >= VIEW_TOKENS:
            whole = max(whole, self._view_score(last))
        if self._alarmed or whole >= (self.threshold if last else self.alarm_threshold):
            score = whole if last else max(whole, self.running)
            if self.protector.on_flag != "report":
                return self._flag(score)
            if last:
                return self._pass(score, flagged=True)
        if last:
            return self._pass(whole, flagged=False)
        due = self.released
        while self._cuts and self._cuts[0][1] <= len(self._ids) - self.hold:
            due = self._cuts.pop(0)[0]
        text, self.released = self.text[self.released:due], max(due, self.released)
        return [Event(text)] if text else []

    @property
    def _alarmed(self):
        return len(self._recent) == PATIENCE and min(self._recent) >= self.alarm_threshold

    def _feed(self, ids):
        """Score new answer tokens on the growing cache, window by window."""
        template = self.protector.detector.template
        window, overlap = self.protector.window, self.protector.overlap
        if self._cursor is None:
            self._cursor = self.protector.detector.open()
            self._question_ids, _ = template.clip_question(self.q[-self.protector.max_bytes:])
            self._prefix = template.prefix(self._question_ids, self.protector._history(self.history)[0])
            self._cursor.start(self._prefix)
        while ids:
            room = self._window_start + window - len(self._ids)
            if room == 0:
                self._best = max(self._best, self.running)  # a finished window's score stays
                self._window_start += window - overlap
                self._cursor.start(self._prefix + self._ids[len(self._ids) - overlap:] if overlap else self._prefix)
                self.usage_windows += 1
                room = window - overlap
            part, ids = ids[:room], ids[room:]
            for logit in self._cursor.feed(part):
                score = _sigmoid(float(logit))
                if math.isnan(score):
                    raise ModelError("stream: score must be a number, got NaN. Check the model with `protector doctor`.")
                self._recent = (self._recent + [score])[-PATIENCE:]
                self.running = score
                if self._alarmed and self.protector.on_flag != "report":
                    self._ids += part  # the rewrite may see them
                    return
            self._ids += part

    def _view_score(self, last):
        """Score of the normalised view of the text's end, or of all of it at the end; 0 where there is no disguise."""
        self._view_at = len(self._ids)
        text = well_formed(self.text if last else self.text[max(0, self._scored - 2048):self._scored])
        view = normalised(text)
        if view == text or not view.strip():
            return 0.0
        return self.protector._score((self.q, view, self.history), self._deadline)[0]

    def _flag(self, score):
        """Nothing more of the answer leaves: the rewrite or the refusal ends the stream."""
        protector = self.protector
        if not self._ids:
            return self._end(Event(protector.refusal, None))
        usage = self._usage() | {"_rejected": (self._question_ids, self._ids, self._window_start)}
        verdict = protector._decide((self.q, self.text[:self._scored], self.history), max(score, self.threshold), usage,
                                    self._deadline, self._start_s)
        separator = "\n\n" if self.released else ""
        return self._end(Event(separator + verdict.text, verdict))

    def _pass(self, score, flagged):
        verdict = self.protector._verdict(self.text, "pass", flagged, score, self.threshold, self._usage(), self._start_s)
        return self._end(Event(self.text[self.released:], verdict))

    def _fail(self, error):
        """The error policy in mid-stream: held text leaves only under "pass"."""
        if self.protector.on_error == "raise":
            self.close()
            raise error
        verdict = self.protector._failed((self.q, self.text, self.history), error, self._start_s)
        if self.protector.on_error == "pass":
            return self._end(Event(self.text[self.released:], verdict))
        return self._end(Event(("\n\n" if self.released else "") + verdict.text, verdict))

    def _usage(self):
        detector = self.protector.detector
        return {"backend": detector.name, "quantisation": detector.quantisation, "input": "pair" if self.q else "answer",
                "tokens": len(self._ids), "windows": self.usage_windows, "shown_chars": self.released}

    def _end(self, event):
        self.close()
        return [event]


def stream(protector, q, chunks, history=None, hold=8):
    """Guard an iterator of text chunks.

    Args:
        protector: guard.Protector.
        q: the question.
        chunks: iterable of str; its close() is called at an alarm, so that the upstream stops.
        history: earlier turns.
        hold: scored tokens that are still held back.
    Yields:
        Event; the last one carries the verdict. Joined texts of a passed stream are the answer, byte for byte.
    """
    state = StreamGuard(protector, q, history, hold)
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


async def astream(protector, q, chunks, history=None, hold=8):
    """stream() for an async iterator of chunks; scoring runs in a thread, so the event loop goes on."""
    state = StreamGuard(protector, q, history, hold)
    try:
        async for chunk in chunks:
            for event in await asyncio.to_thread(state.push, chunk):
                yield event
            if state.done:
                return
        for event in await asyncio.to_thread(state.finish):
            yield event
    finally:
        await asyncio.to_thread(state.close)
        if hasattr(chunks, "aclose"):
            await chunks.aclose()


def stream_statistic(logits):
    """What the stream threshold is compared with, for one answer: max over t of min(s_{t-3}, ..., s_t).

    Args:
        logits: (T,) one per answer token.
    Returns:
        float; 0.0 for an answer of fewer than PATIENCE tokens.
    """
    scores = [_sigmoid(float(logit)) for logit in logits]
    return max((min(scores[i:i + PATIENCE]) for i in range(len(scores) - PATIENCE + 1)), default=0.0)
