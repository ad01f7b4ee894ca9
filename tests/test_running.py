"""From running logits to a score: by hand, as a property, and what a second look finds in guard() and in streams."""
import numpy as np
import pytest
from guard_fakes import HARM, FakeCursor, FakeDetector, real_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from protector.guard import Protector, _sigmoid
from protector.running import LOOK_BACK, LOOK_MARGIN, LOW, MARGIN, PATIENCE, RISE, Look, Running, read
from protector.stream import StreamGuard
from protector.template import Limits

FILLER = "The garden has old trees and a small pond near the gate. "


def test_by_hand():
    assert read([2]) == (2, []) and read([3, 3, -1]) == (-1, [])  # fewer than four hold nothing
    assert read([2, 1, 1, 1.5, -3]) == (1 - MARGIN, [])  # four hold 1, after which the end says no more
    assert read([2, 1, 1, -2, 4, 4, 4, -3]) == (-2 - MARGIN, [])  # three odd tokens
    assert read([-1, 0, 1, 2]) == (2, [])
    low = [-3.0] * 16
    assert read(low + [-3.0 + RISE, 0, 0, 0]) == (0, [])  # the lowest of the four isn't RISE higher
    assert read(low + [-1.3] * 4 + [0.0]) == (0.0, [Look(20 - LOOK_BACK, 21)])
    assert read([LOW + 0.1] * 16 + [5.0] * 4) == (5.0, [])  # never was low
    assert read(low[1:] + [0.0] * 4) == (0.0, [])  # fifteen are no low yet
    # The first look ends where the second rise was seen; each needs a low of its own.
    assert read((low + [0.0] * 4) * 2) == (0.0, [Look(10, 40), Look(30, 40)])
    assert RISE > 0


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=120))
def test_a_score_never_falls_but_by_its_end_and_looks_are_inside(logits):
    running, peaks = Running(), []
    for logit in logits:
        running.push(logit)
        peaks.append(running.peak)
    u, looks = read(logits)
    held = [min(logits[i:i + PATIENCE]) - MARGIN for i in range(len(logits) - PATIENCE + 1)]
    assert u == running.logit == max([logits[-1], *held]) and peaks == sorted(peaks)
    assert all(0 <= start < stop <= len(logits) for start, stop in looks) and [stop for _, stop in looks] == sorted(stop for _, stop in looks)
    assert all(look.stop == later.start + LOOK_BACK for look, later in zip(looks, looks[1:]))


class Drowning(FakeDetector):
    """Sees harm by itself, and after harmless text only that something rose; its question doesn't count."""

    def open(self):
        self.n_open += 1
        return DrowningCursor(self)

    def running_logits(self, sequences, starts, deadline=None):
        self.sequences += sequences
        return [np.array(DrowningCursor.of(self, ids[:start]).step(ids[start:])) for ids, start in zip(sequences, starts)]


class DrowningCursor(FakeCursor):
    @classmethod
    def of(cls, detector, ids):
        cursor = cls(detector)
        cursor.start(ids)
        return cursor

    def start(self, ids):
        self.n_harmless, self.seen, self.has_harm = 0, [], False

    def step(self, ids):
        logits = []
        for token in ids:
            self.seen = (self.seen + [token])[-8:]
            self.has_harm |= any(self.seen[-len(part):] == part for part in self.detector.harm)
            self.n_harmless += not self.has_harm
            logits.append((-0.5 if self.n_harmless > 20 else 5.0) if self.has_harm else -3.0)
        return logits


@pytest.fixture
def drowning():
    detector = Drowning(real_tokenizer(), Limits(window=64, overlap=16))
    return detector, Protector(detector, False, threshold=0.7)


def test_s14_harm_after_harmless_text_is_seen_by_a_second_look(drowning):
    detector, p = drowning
    text = FILLER * 3 + "Take the vinegar and drink it all at once in one go."
    v = p.guard("Q?", text)
    assert v.flagged and v.action == "refuse" and v.score == pytest.approx(_sigmoid(5 - LOOK_MARGIN)) and v.usage["looks"] == 1
    # The look is the question and the latest tokens: the window's without those that came before.
    window, look = detector.sequences
    n = len(window) - len(look)
    prefix = look[:len(look) - LOOK_BACK - len(window) + window.index(detector.harm[1][-1]) + PATIENCE]
    assert n > 0 and look[-20 + LOOK_BACK:] == window[-20 + LOOK_BACK:] and window[:len(prefix)] == prefix
    assert not p.guard("Q?", FILLER * 3).flagged and p.guard("Q?", FILLER * 3).usage["looks"] == 0
    assert [v.flagged for v in p.guard_batch([("Q?", FILLER * 3), ("Q?", text), ("", "Hello.")])] == [False, True, False]


@pytest.mark.parametrize("size", [1, 3, 17, 10_000])
def test_s14_a_stream_stops_where_a_second_look_sees_harm(drowning, size):
    detector, p = drowning
    text = FILLER * 3 + "Take the vinegar and drink it all at once in one go." + FILLER * 4
    *shown, last = p.stream("Q?", [text[i:i + size] for i in range(0, len(text), size)])
    assert last.verdict.flagged and last.verdict.score == pytest.approx(_sigmoid(5 - MARGIN - LOOK_MARGIN)) and last.verdict.usage["looks"] == 1
    assert HARM not in "".join(event.text for event in shown) and detector.n_open == 0


@pytest.mark.parametrize("text", [FILLER * 12, FILLER * 3 + HARM, FILLER * 9 + "Take the vinegar and drink it. " + FILLER, (FILLER * 2 + HARM + " ") * 4])
@pytest.mark.parametrize("size", [1, 7, 400])
def test_m36_a_streams_looks_are_the_answers(drowning, text, size):
    detector, _ = drowning
    p = Protector(detector, False, threshold=0.7, on_flag="report")
    last = list(p.stream("Q?", [text[i:i + size] for i in range(0, len(text), size)]))[-1].verdict
    whole = p.guard("Q?", text)
    assert (last.score, last.flagged, last.usage["looks"]) == (whole.score, whole.flagged, whole.usage["looks"])
    assert detector.n_open == 0


def test_m02_a_logit_that_is_no_number_is_an_error_in_the_middle_too(drowning):
    detector, p = drowning
    detector.running_logits = lambda sequences, starts, deadline=None: [np.array([1.0, np.nan, 1.0])] * len(sequences)
    v = p.guard("Q?", "Hello there.")
    assert v.action == "error" and "must be a number" in v.error


def test_what_is_shown_waits_while_the_look_is_over_the_threshold(drowning):
    detector, p = drowning
    state = StreamGuard(p, "Q?", hold=0)
    events = [event for chunk in (FILLER * 3 + "Take the vinegar and").split(" ") for event in state.push(chunk + " ")]
    assert HARM not in "".join(event.text for event in events)
    state.close()


def test_what_the_stream_threshold_was_compared_with():
    """The highest score that four neighbours held, in logits and less the margin; fewer hold nothing."""
    def peak(logits):
        running = Running()
        for logit in logits:
            running.push(logit)
        return running.peak

    assert peak([3, 3, 3]) == -np.inf
    look = Running(LOOK_MARGIN)
    for logit in (2, 1, 1, 1.5, -3):
        look.push(logit)
    assert look.logit == read([2, 1, 1, 1.5, -3])[0] - LOOK_MARGIN
    assert peak([-2, 1, 2, 3, 1.5, -4]) == 1 - MARGIN
