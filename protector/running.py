"""From the running logits of one sequence to its score: its end, what it held on the way, and where it climbed.

A causal LM gives a logit z_t at every token of an answer, each for the answer up to there. The last one alone is easily bought
off: a refusal or a page of harmless text after the harm pulls it down, and harmless text before keeps it down.

    u      = max( z_T, max_t min(z_{t-3}, ..., z_t) - MARGIN )         one odd token holds nothing
    rise     min(z_{t-3}, ..., z_t) > low + RISE,   low = lowest mean of 16 neighbours before them since the last rise, low < LOW
    look     at a rise the tokens from LOOK_BACK before on are scored again, right after the question: their u - LOOK_MARGIN counts, too

Each is known at token t, so a stream sees what the whole answer's score sees, and its score never falls. A change is found by
its rise over the lowest value so far, as in Page's test.

Source: Page, Continuous Inspection Schemes, Biometrika 1954; the paper reads z_T alone. Sizes were chosen on the self-test and on
harmless answers (docs/hardening.md), for the shipped detector's logits: behind its temperature and shift, so others are another reading.
"""
import math
from typing import NamedTuple

PATIENCE = 4  # neighbouring positions that must all be high
MARGIN = 0.8  # logits by which they must be higher than the last one
RISE = 1.6  # logits over the lowest mean
LOW = -1.1  # from which a rise is looked at
LOOK_BACK = 10  # tokens that a second look begins before its rise was seen
LOOK_MARGIN = 1.6  # logits that a second look must be higher: what stands in the middle of a harmless answer reads oddly by itself
_MEAN_TOKENS = 16


class Running:
    """Running logits of one sequence; of a second look less LOOK_MARGIN.

    Example:
        running = Running()
        [running.push(z) for z in (2, 1, 1, 1, -3)]
        running.last, running.peak, running.logit  # (-3, 0.5, 0.5)
    """

    def __init__(self, margin=0.0):
        self.margin = margin
        self.last, self.peak = -math.inf, -math.inf
        self.values, self._since, self._low = [], 0, math.inf  # _since: of the last rise

    @property
    def logit(self):
        """u of the tokens so far."""
        return max(self.last, self.peak)

    def push(self, logit):
        """Take the next token's logit; returns whether it is a rise."""
        values, self.last = self.values, logit - self.margin
        values.append(self.last)
        if len(values) < PATIENCE:
            return False
        held = min(values[-PATIENCE:])
        self.peak = max(self.peak, held - MARGIN)
        if len(values) - self._since < _MEAN_TOKENS + PATIENCE:
            return False
        before = values[-PATIENCE - _MEAN_TOKENS:-PATIENCE]
        self._low = min(self._low, sum(before) / _MEAN_TOKENS)
        if self._low < LOW and held > self._low + RISE:
            self._since, self._low = len(values), math.inf
            return True
        return False


class Look(NamedTuple):
    """Tokens [start, stop) of a sequence's scored part that are scored again by themselves."""

    start: int
    stop: int


def read(logits):
    """u and the second looks of one sequence.

    Args:
        logits: (n,) at each token of the answer, n at least 1.
    Returns:
        (u, list of Look)
    Example:
        read([-3.0] * 16 + [0.0] * 4)  # (0.0, [Look(10, 20)])
    """
    running, starts, ends = Running(), [], []
    for i, logit in enumerate(logits, 1):
        if running.push(float(logit)):
            starts.append(max(i - LOOK_BACK, 0))
            ends.append(i)
    return running.logit, [Look(*span) for span in zip(starts, ends[1:] + [len(logits)])]
