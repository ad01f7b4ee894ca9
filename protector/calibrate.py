"""A threshold with a stated false-positive rate.

Let s_(1) >= s_(2) >= ... >= s_(n) be the scores of n harmless answers and flag what scores above s_(k+1). The true
false-positive rate of that rule is distributed Beta(k+1, n-k), whatever the scores' distribution, so

    P( rate > fpr ) = P( Binomial(n, fpr) <= k )

The largest k for which this is at most 1 - confidence gives the lowest threshold that keeps the promise.

Source: order-statistic tolerance limits (Wilks 1941); the same k as from Clopper-Pearson's bound.
"""
import math
from dataclasses import asdict, dataclass

import numpy as np

from .errors import ModelError

DEFAULT_FPR, DEFAULT_CONFIDENCE = 0.01, 0.95
ROUNDING = 1e-3  # by which a score may differ in another batch, or as a stream


@dataclass(frozen=True)
class Calibration:
    """One threshold and all that its promise depends on."""

    threshold: float  # flag at this score and above
    fpr: float  # bound on the share of harmless answers that are flagged
    confidence: float  # with which the bound holds
    n: int  # harmless answers it was computed from
    above: int  # of them, at or above the threshold
    input: str  # "pair" | "answer": scored with or without a question
    backend: str
    quantisation: str
    model_sha256: str
    data_sha256: str

    def __post_init__(self):
        for name in ("threshold", "fpr", "confidence"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"Calibration: {name} must be a number, got {type(getattr(self, name)).__name__}. Calibrate again.")


def most_above(n, fpr, confidence):
    """Largest k with P(Binomial(n, fpr) <= k) <= 1 - confidence, or -1 if n is too small for any.

    Example:
        most_above(299, 0.01, 0.95)  # 0: 0.99^299 = 0.0495 <= 0.05, while 298 answers are too few
    """
    if not 0 < fpr < 1 or not 0 < confidence < 1:
        raise ValueError(f"most_above: fpr and confidence must be between 0 and 1, got {fpr} and {confidence}.")
    total, k = 0.0, -1
    while k < n:
        i = k + 1
        log_p = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                 + i * math.log(fpr) + (n - i) * math.log1p(-fpr))
        total += math.exp(log_p)
        if total > 1 - confidence:
            break
        k = i
    return k


def threshold(scores, fpr=DEFAULT_FPR, confidence=DEFAULT_CONFIDENCE, margin=0.0):
    """The lowest threshold whose false-positive rate is at most fpr with this confidence.

    Args:
        scores: (n,) scores of harmless answers like those that will be guarded, none of them seen in training.
        fpr: bound on the rate.
        confidence: with which the bound holds over draws of the n answers.
        margin: added to the threshold.
    Returns:
        (threshold, number of scores at or above it)
    Raises:
        ValueError: too few scores for the bound, a score that isn't finite, or no threshold below 1 keeps it.
    Example:
        threshold([0.1] * 298 + [0.6])  # (0.6000000000000001, 0)
    """
    scores = np.sort(np.asarray(scores, np.float64))[::-1]
    if not np.isfinite(scores).all():
        raise ValueError("threshold: scores must be finite, got NaN or Inf.")
    k = most_above(len(scores), fpr, confidence)
    if k < 0:
        needed = math.ceil(math.log(1 - confidence) / math.log1p(-fpr))
        raise ValueError(f"threshold: scores must be at least {needed} for a rate of {fpr} at confidence {confidence}, got "
                         f"{len(scores)}. Add harmless answers or allow a higher rate.")
    # Strictly above s_(k+1): ties must not push the rate over the bound.
    value = float(np.nextafter(scores[k], 2.0)) + margin
    if value >= 1:  # flags nothing but what no sound model scores
        raise ValueError(f"threshold: scores must leave all but {k} harmless answers below {1 - margin:g}, got more that score so high. The "
                         "model is saturated: set its temperature or train it again.")
    return value, int((scores >= value).sum())


def calibrate(detector, scores_by_source, input_kind, data_sha256, fpr=DEFAULT_FPR, confidence=DEFAULT_CONFIDENCE):
    """Calibration that holds on every source of harmless answers: the largest of the sources' thresholds, and ROUNDING more.

    Args:
        detector: a backend's detector; its name, quantisation and hash are written down.
        scores_by_source: {source: scores}.
        input_kind: "pair" or "answer".
        data_sha256: data.fingerprint of the answers.
    Returns:
        Calibration
    """
    if not scores_by_source:
        raise ValueError("calibrate: scores_by_source must hold a source, got none. Add harmless answers.")
    value = max(threshold(scores, fpr, confidence, ROUNDING)[0] for scores in scores_by_source.values())
    everything = np.concatenate([np.asarray(scores) for scores in scores_by_source.values()])
    return Calibration(value, fpr, confidence, len(everything), int((everything >= value).sum()), input_kind, detector.name,
                       detector.quantisation, detector.model_sha256, data_sha256)


def find(detector, input_kind, fpr=None):
    """The detector's own calibration for this kind of input, or None.

    Raises:
        ModelError: fpr is given and no calibration was made for it with this very model, backend and quantisation.
    """
    wanted = DEFAULT_FPR if fpr is None else fpr
    entries = [Calibration(**entry) for entry in detector.calibration]
    for entry in entries:
        if (entry.model_sha256, entry.backend, entry.quantisation, entry.input) == (
                detector.model_sha256, detector.name, detector.quantisation, input_kind) and math.isclose(entry.fpr, wanted):
            return entry
    if fpr is not None:
        raise ModelError(f"find: fpr must have a calibration for {detector.name}, {detector.quantisation} and input {input_kind}, "
                         f"got none for {fpr}. Run: protector calibrate HARMLESS.jsonl --fpr {fpr}")
    return None


def fit_platt(logits, labels, weights=None):
    """T > 0 and b that minimise the cross-entropy of sigmoid(logit / T + b): T on a log grid, refined once, the best b of each by bisection.

    Args:
        logits: (n,) float. labels: (n,) 0 or 1, both among them. weights: (n,) >= 0, or None for equal ones.
    Returns:
        (T, b)
    Source: Platt, Probabilistic outputs for support vector machines, 1999; with b = 0 temperature scaling (Guo et al., 2017).
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    harmful = np.average(labels, weights=weights)

    def shift(temperature):
        low, high = -100.0, 100.0  # the mean score grows with b; at the best b it is the share of harmful answers
        for _ in range(60):
            middle = (low + high) / 2
            score = np.average((1 + np.tanh((logits / temperature + middle) / 2)) / 2, weights=weights)
            low, high = (middle, high) if score < harmful else (low, middle)
        return middle

    def cross_entropy(temperature):
        z = logits / temperature + shift(temperature)
        return np.average(np.logaddexp(0, z) - labels * z, weights=weights)

    best = min(np.geomspace(0.05, 20, 100), key=cross_entropy)
    best = float(min(np.linspace(best / 1.07, best * 1.07, 100), key=cross_entropy))
    return best, shift(best)


def as_dicts(entries):
    """Calibrations as they are written into a file."""
    return [asdict(entry) for entry in entries]
