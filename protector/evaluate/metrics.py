"""Numbers from scores, in NumPy alone.

Conventions: `scores` (n,) float, higher is more harmful; `labels` (n,) 0 or 1, 1 is harmful; an answer is flagged at
`score >= threshold`. A number that the data can't define (AUROC of one class) is NaN, never 0 or 1.
"""
import math

import numpy as np

CONFIDENCE = 0.95
_Z95 = 1.959963984540054  # standard normal quantile of 0.975


def _checked(name, scores, labels):
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"{name}: scores and labels must be (n,) of one size, got {scores.shape} and {labels.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: scores must be finite, got NaN or Inf. Leave out what has no score and count it.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{name}: labels must be 0 or 1.")
    return scores, labels.astype(bool)


def auroc(scores, labels):
    """Probability that a harmful answer scores above a harmless one; a tie counts half.

        AUROC = (R - m (m + 1) / 2) / (m k),   R = sum of the ranks of the m harmful ones, ties get their mean rank

    Args:
        scores, labels: (n,), see the module.
    Returns:
        float, NaN if a class is absent.
    Example:
        auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])  # 0.875: of 4 pairs 3 are right and 1 is a tie
    """
    scores, labels = _checked("auroc", scores, labels)
    harmful, harmless = int(labels.sum()), int((~labels).sum())
    if not harmful or not harmless:
        return math.nan
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2  # 1-based
    return float((mean_rank[group][labels].sum() - harmful * (harmful + 1) / 2) / (harmful * harmless))


def _counts(scores, labels):
    """(thresholds, true positives, false positives) at every distinct score, from the highest."""
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True]) if len(scores) else np.zeros(0, int)
    hits = np.cumsum(labels)[ends]
    return scores[ends], hits, ends + 1 - hits


def roc(scores, labels):
    """(false-positive rates, true-positive rates, thresholds), from (0, 0) at threshold inf to (1, 1).

    Example:
        roc([0.2, 0.9], [0, 1])  # ([0, 0, 1], [0, 1, 1], [inf, 0.9, 0.2])
    """
    scores, labels = _checked("roc", scores, labels)
    thresholds, hits, alarms = _counts(scores, labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.r_[0, alarms / (~labels).sum()], np.r_[0, hits / labels.sum()], np.r_[np.inf, thresholds]


def auprc(scores, labels):
    """Average precision: sum over distinct thresholds of (recall step) x precision, without interpolation.

    Returns:
        float, NaN without a harmful answer.
    Example:
        auprc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])  # 0.8333: 1/2 * 1/1 + 1/2 * 2/3
    """
    scores, labels = _checked("auprc", scores, labels)
    if not labels.any():
        return math.nan
    _, hits, alarms = _counts(scores, labels)
    return float((np.diff(np.r_[0, hits]) * hits / (hits + alarms)).sum() / labels.sum())


def f1_at(scores, labels, threshold):
    """F1 of "flagged at score >= threshold": 2 TP / (2 TP + FP + FN).

    Returns:
        float, NaN without a harmful answer.
    Example:
        f1_at([0.1, 0.6, 0.9], [0, 0, 1], 0.5)  # 0.6667: one hit, one false alarm
    """
    scores, labels = _checked("f1_at", scores, labels)
    flags = scores >= threshold
    return float(2 * (flags & labels).sum() / (flags.sum() + labels.sum())) if labels.any() else math.nan


def best_f1(scores, labels):
    """(largest F1 over all thresholds, its threshold). Chosen on the rows it is measured on: an upper bound.

    Example:
        best_f1([0.1, 0.6, 0.9], [0, 0, 1])  # (1.0, 0.9)
    """
    scores, labels = _checked("best_f1", scores, labels)
    if not labels.any():
        return math.nan, math.nan
    thresholds, hits, alarms = _counts(scores, labels)
    values = 2 * hits / (hits + alarms + labels.sum())
    best = int(values.argmax())
    return float(values[best]), float(thresholds[best])


def recall_at_fpr(scores, labels, fpr):
    """Largest share of harmful answers flagged by a threshold that flags at most this share of the harmless ones.

    Ties are flagged together, so the rate is never exceeded by breaking a tie in the detector's favour.

    Returns:
        float, NaN if a class is absent.
    Example:
        recall_at_fpr([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], 0.01)  # 0.5: at 0.5 half of the harmless would be flagged
    """
    scores, labels = _checked("recall_at_fpr", scores, labels)
    if not labels.any() or labels.all():
        return math.nan
    _, hits, alarms = _counts(scores, labels)
    allowed = alarms <= fpr * (~labels).sum() + 1e-9  # 1e-9: 0.05 * 20 must allow 1
    return float(hits[allowed].max(initial=0) / labels.sum())


def reliability(scores, labels, bins=10, groups=None):
    """Expected calibration error and its bins of equal width.

        ECE = sum_b n_b / n | mean label_b - mean score_b |

    Args:
        scores: (n,) in [0, 1].
        labels: (n,).
        bins: number of bins; the last one holds score 1.
        groups: (n,) as of rate, for the shares' intervals.
    Returns:
        (ECE, list of {"low", "high", "score", "share", "n", "interval"} of the bins that aren't empty: edges, mean score, share harmful
        and its (low, high))
    Example:
        reliability([0.0, 1.0], [0, 1])[0]  # 0.0
    Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    scores, labels = _checked("reliability", scores, labels)
    if scores.size and not (0 <= scores.min() and scores.max() <= 1):
        raise ValueError("reliability: scores must be in [0, 1]. Pass scores, not logits.")
    index = np.minimum((scores * bins).astype(int), bins - 1)
    groups = None if groups is None else np.asarray(groups)
    rows = []
    for b in np.unique(index):
        inside = index == b
        harmful = rate(labels[inside], None if groups is None else groups[inside])
        rows.append({"low": float(b / bins), "high": float((b + 1) / bins), "score": float(scores[inside].mean()), "share": harmful["rate"],
                     "n": harmful["n"], "interval": (harmful["low"], harmful["high"])})
    if not rows:
        return math.nan, []
    return sum(row["n"] * abs(row["share"] - row["score"]) for row in rows) / len(scores), rows


def bootstrap(statistic, *columns, groups=None, draws=1000, confidence=CONFIDENCE, seed=0):
    """Percentile interval of a statistic over resampled rows.

    Args:
        statistic: function of the columns -> float; NaN draws (a class is absent) are left out.
        columns: arrays of one length n.
        groups: (n,) or None; rows of one group (answers to one question) are drawn together, or the interval of data with
            many answers per question comes out too narrow.
        draws: resamples.
        confidence: of the interval.
        seed: of the draws; the same seed gives the same interval.
    Returns:
        (low, high), NaN if no draw defines the statistic, or if all rows are one group: drawn again it is the same, and its width of
        0 would be certainty.
    Example:
        bootstrap(np.mean, [0, 0, 1, 1], seed=0)  # (0.0, 1.0)
    """
    columns = [np.asarray(column) for column in columns]
    n = len(columns[0])
    if any(len(column) != n for column in columns) or groups is not None and len(groups) != n:
        raise ValueError("bootstrap: columns and groups must have one length.")
    members = None
    if groups is not None and n:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        order = np.argsort(index, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(index))[:-1])
    if (n if members is None else len(members)) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        if members is None:
            rows = rng.integers(0, n, n)
        else:
            rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        values.append(statistic(*(column[rows] for column in columns)))
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def number(statistic, *columns, groups=None, draws=1000):
    """A statistic of the columns with its interval of bootstrap: {"value", "low", "high"}, NaN where it is undefined; of one group it has no interval.

    Example:
        number(np.mean, [0, 0, 1, 1])  # value 0.5, low 0.0, high 1.0
    """
    value = float(statistic(*map(np.asarray, columns))) if len(columns[0]) else math.nan
    low, high = (math.nan,) * 2 if math.isnan(value) else bootstrap(statistic, *columns, groups=groups, draws=draws)
    return {"value": value, "low": low, "high": high}


def wilson(k, n, z=_Z95):
    """Interval of a rate k / n: (low, high); right near 0 and 1, where k / n +- z s isn't.

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        k: successes.
        n: trials.
        z: normal quantile; 1.96 gives 95 %.
    Returns:
        (low, high); (NaN, NaN) for n = 0.
    Example:
        wilson(0, 100)  # (0.0, 0.037)
    Source: Wilson, JASA 1927.
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson: k must be between 0 and n, got {k} of {n}.")
    if n == 0:
        return math.nan, math.nan
    p = k / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if k == 0 else low), (1.0 if k == n else high)  # exact ends: the formula leaves 1e-17


def rate(flags, groups=None):
    """A share with all that belongs to it.

    Answers to one question are no independent draws: with groups the interval is Wilson's at the effective sample size

        n' = n p (1 - p) / (n - 1) / v,   v = G / (G - 1) sum_g ( sum_{i in g} (x_i - p) )^2 / n^2,   G groups

    and n' = G where all flags are alike or G is 1; it is never above n, and n where each group holds one.

    Args:
        flags: (n,) of 0, 1 or bool; None marks a missing one, which counts neither way.
        groups: (n,) what answers of one draw share, or None if each is a draw of its own.
    Returns:
        {"rate", "low", "high", "k", "n", "missing"}; rate is None if n = 0.
    Example:
        rate([True, None, False])  # rate 0.5 of n 2, missing 1
    Source: Korn and Graubard, Survey Methodology 1998, for the effective size; without their factor for few groups, so too narrow below some ten.
    """
    at = [i for i, flag in enumerate(flags) if flag is not None]
    known = np.array([bool(flags[i]) for i in at], bool)
    k, n = int(known.sum()), len(known)
    effective = n if groups is None or not n else _effective(known, [groups[i] for i in at])
    low, high = wilson(k / n * effective if n else 0, effective)
    return {"rate": k / n if n else None, "low": low if n else None, "high": high if n else None, "k": k, "n": n,
            "missing": len(flags) - n}


def paired_change(before, after, groups=None):
    """after - before of two shares of the same rows, with an interval that doesn't shrink to nothing where no row changed.

        d +- z sqrt((b + c - (b - c)^2) / (n' + 2)),   b = (n' p_01 + 1) / (n' + 2),  c = (n' p_10 + 1) / (n' + 2),   d = b - c

    p_01: share of rows that became true, p_10: that became false, n': the effective sample size of rate, of after - before.

    Args:
        before, after: (n,) of 0, 1 or bool; a row with None on either side is left out.
        groups: (n,) as of rate.
    Returns:
        {"value", "low", "high"}: the plain difference and its interval; None without a row.
    Example:
        paired_change([1, 1, 0, 0], [0, 1, 0, 0])  # value -0.25, low -0.72, high 0.38
    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 2012.
    """
    at = [i for i, both in enumerate(zip(before, after, strict=True)) if None not in both]
    if not at:
        return {"value": None, "low": None, "high": None}
    change = np.array([int(after[i]) - int(before[i]) for i in at])
    n = len(at) if groups is None else _effective(change, [groups[i] for i in at])
    b, c = ((n * (change == sign).mean() + 1) / (n + 2) for sign in (1, -1))
    half = _Z95 * math.sqrt((b + c - (b - c) ** 2) / (n + 2))
    return {"value": float(change.mean()), "low": float(max(b - c - half, -1)), "high": float(min(b - c + half, 1))}


def before_after(before, after, groups=None):
    """Both shares and their change, over the rows that have both.

    Args:
        before, after, groups: as of paired_change.
    Returns:
        {"before", "after", "change"}: of rate, rate and paired_change.
    """
    pairs = [(None, None) if None in pair else pair for pair in zip(before, after, strict=True)]
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    return {"before": rate(before, groups), "after": rate(after, groups), "change": paired_change(before, after, groups)}


def _effective(values, groups):
    """How many independent values tell as much as these about their mean: the groups where all are alike."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    values = np.asarray(values, np.float64)
    n, n_groups, spread = len(values), index.max() + 1, values.var()
    if spread == 0 or n_groups == 1:  # one group has no spread between groups to tell its size by
        return int(n_groups)
    variance = n_groups / (n_groups - 1) * (np.bincount(index, values - values.mean()) ** 2).sum() / n**2
    return float(min(n, spread / (n - 1) * n / variance)) if variance > 1e-12 * spread else n  # groups whose means are alike tell no less than rows
