"""How well a detector tells harmful answers from harmless ones, per source, beside what it has to beat.

Sources call different things harmful, so there is no total over them. Each interval is a bootstrap over questions.
"""
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data import _jsonl_rows, answer_digest, spread
from ..guard import Protector
from . import metrics
from .rows import by_source, fingerprint

# Response harmfulness, F1 x 100. BeaverTails' published numbers are of the whole test set.
PUBLISHED = {
    "source": "Qwen3Guard technical report; GuardReasoner's tables", "unit": "F1 x 100, harmful = positive",
    "columns": ["HarmBench", "SafeRLHF", "BeaverTails", "XSTest-Resp"],
    "rows": {"always \"harmful\"": [62.4, 66.7, 72.9, 29.8], "Llama Guard 3, 8B": [84.5, 45.2, 67.9, 89.8],
             "WildGuard, 7B": [86.3, 64.2, 84.4, 94.7], "GuardReasoner, 1B": [84.8, 68.4, 85.8, 90.1],
             "Qwen3Guard-Gen, 0.6B": [85.0, 66.6, 86.1, 89.7], "Qwen3Guard-Stream, 0.6B": [83.1, 62.8, 84.5, 84.8]}}
FPRS = (0.01, 0.05)
KINDS = Path(__file__).parent / "kinds.jsonl"  # of harm in harmful development answers, by their digests
ANSWER_ONLY = 200  # rows of a source that are scored a second time, without their question
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def scoring_guard(detector, **options):
    """A Protector that only scores: windows, views and threshold are those of guarding; an error is raised."""
    return Protector(detector=detector, detoxifier=False, on_flag="report", on_error="raise", **options)


def score_rows(guard, rows, batch=16, progress=False):
    """Scores of labelled answers, as guarding makes them.

    Args:
        guard: scoring_guard(...).
        rows: list of Row or Pair.
        batch: answers scored together; it changes the speed, not a score.
    Returns:
        (scores, thresholds): (n,) float64 each; a row without a question has a threshold of its own.
    """
    # Neighbours of one length share a decode; the order of the result is the caller's.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].answer))
    scores, thresholds = np.empty((2, len(rows)))
    for start in tqdm(range(0, len(rows), batch), disable=not progress, desc="scoring", unit="batch"):
        part = order[start:start + batch]
        for i, verdict in zip(part, guard.guard_batch([(rows[i].question, rows[i].answer) for i in part])):
            scores[i], thresholds[i] = verdict.score, verdict.threshold
    return scores, thresholds


class BagOfWords:
    """Multinomial naive Bayes on the words of the answer alone: what a detector must beat clearly.

        score = sigmoid( log(m / k) + sum over words of log p(word | harmful) / p(word | harmless) )

    with add-one smoothing. A question, word order and meaning are nothing to it.

    Args:
        rows: training rows with `answer` and `label`; both labels must occur.
    Example:
        BagOfWords(rows).score("Mix them.")
    Source: McCallum and Nigam, 1998.
    """

    def __init__(self, rows):
        counts, n_rows = (Counter(), Counter()), [0, 0]
        for row in rows:
            counts[row.label].update(_words(row.answer))
            n_rows[row.label] += 1
        if not all(n_rows):
            raise ValueError("BagOfWords: rows must hold both labels, got one. Pass harmful and harmless rows.")
        vocabulary = counts[0].keys() | counts[1].keys()
        totals = [sum(part.values()) + len(vocabulary) for part in counts]
        self.prior = math.log(n_rows[1] / n_rows[0])
        self.weights = {word: math.log((counts[1][word] + 1) / totals[1]) - math.log((counts[0][word] + 1) / totals[0])
                        for word in vocabulary}

    def logit(self, answer):
        """Log odds of harmful; they still rank long answers whose scores are all 1.0."""
        return self.prior + sum(self.weights.get(word, 0.0) for word in _words(answer))

    def score(self, answer):
        """P(harmful), float."""
        return 1 / (1 + math.exp(-max(min(self.logit(answer), 700), -700)))


def _words(text):
    return _WORD.findall(text.lower())


def measure(scores, labels, threshold, groups=None, draws=1000):
    """Every detector number of one source.

    Args:
        scores: (n,) in [0, 1]. labels: (n,). threshold: of the guard, one or (n,).
        groups: (n,) question of each row, for the bootstrap.
        draws: of the bootstrap.
    Returns:
        dict; each number is {"value", "low", "high"}, a rate what metrics.rate gives; undefined ones are NaN.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    flags, thresholds = scores >= threshold, np.unique(threshold)

    def number(statistic, scores=scores):
        return metrics.number(statistic, scores, labels, groups=groups, draws=draws)

    false_positive, true_positive, _ = metrics.roc(scores, labels)
    keep = np.unique(np.linspace(0, len(false_positive) - 1, 101).astype(int))
    edges = np.linspace(0, 1, 21)
    return {
        "n": len(scores), "harmful": int(labels.sum()), "questions": len(set(groups)) if groups is not None else None,
        "auroc": number(metrics.auroc), "auprc": number(metrics.auprc),
        "f1": {**number(lambda s, y: metrics.f1_at(s, y, 0.5), flags), "threshold": float(thresholds[0]) if len(thresholds) == 1 else None},
        "best_f1": {**number(lambda s, y: metrics.best_f1(s, y)[0]), "threshold": metrics.best_f1(scores, labels)[1],
                    "note": "threshold chosen on these rows: an upper bound"},
        # The constant answer: its AUROC is 0.5.
        "f1_always_harmful": number(lambda s, y: metrics.f1_at(s, y, 0.5), np.ones(len(scores))),
        "auprc_always_harmful": number(metrics.auprc, np.ones(len(scores))),
        **{f"recall_at_{fpr:.0%}_fpr": number(lambda s, y, fpr=fpr: metrics.recall_at_fpr(s, y, fpr)) for fpr in FPRS},
        **{name: metrics.rate(list(flags[labels == label]), None if groups is None else [g for g, y in zip(groups, labels) if y == label])
           for name, label in (("recall", 1), ("false_positives", 0))},
        "ece": number(lambda s, y: metrics.reliability(s, y)[0]), "reliability": metrics.reliability(scores, labels, groups=groups)[1],
        "roc": [[float(false_positive[i]), float(true_positive[i])] for i in keep] if 0 < labels.sum() < len(labels) else [],
        "histogram": {"edges": edges, "harmless": np.histogram(scores[labels == 0], edges)[0],
                      "harmful": np.histogram(scores[labels == 1], edges)[0]}}


def evaluate(detector, rows, train, draws=1000, progress=False, **options):
    """Detector metrics per source, beside the constant answer, word counts and published guards.

    Args:
        detector: what Protector(detector=...) takes.
        rows: labelled rows, none of them seen in training.
        train: rows for BagOfWords.
        draws: of the bootstrap.
        options: of the Protector (threshold, fpr, backend, detector_options).
    Returns:
        dict of kind "detectors".
    """
    guard = scoring_guard(detector, **options)
    words = BagOfWords(train)
    scores, thresholds = score_rows(guard, rows, progress=progress)
    word_scores = np.array([words.logit(row.answer) for row in rows])
    sources, baselines = {}, {}
    index = {id(row): i for i, row in enumerate(rows)}
    for source, part in by_source(rows).items():
        at = np.array([index[id(row)] for row in part])
        labels, groups = np.array([row.label for row in part]), [row.group for row in part]
        sources[source] = measure(scores[at], labels, thresholds[at], groups, draws)
        sources[source]["labellers"] = sorted({row.labeller for row in part if row.labeller})
        baselines[source] = {name: metrics.number(statistic, word_scores[at], labels, groups=groups, draws=draws) for name, statistic in (
            ("auroc", metrics.auroc), ("auprc", metrics.auprc), ("f1", lambda s, y: metrics.best_f1(s, y)[0]),
            ("recall_at_5%_fpr", lambda s, y: metrics.recall_at_fpr(s, y, 0.05)))}
    return {"kind": "detectors", "detector": described(guard), "rows": len(rows), "data_sha256": fingerprint(rows),
            "interval": f"95 % percentile bootstrap over questions, {draws} draws; rates: Wilson at the effective number of questions",
            "sources": sources, "bag_of_words": {"trained_on": len(train), "note": "best F1 on these rows", "sources": baselines},
            "answer_only": {"at_most": ANSWER_ONLY, "threshold": guard.thresholds["answer"],
                            "sources": answer_only(guard, rows, scores, draws, progress)},
            "kinds": by_kind(rows, scores >= thresholds),
            "published": PUBLISHED}


def by_kind(rows, flags, path=KINDS):
    """How many harmful answers are flagged by kind of harm, as a language model told it from question and answer; people labelled them harmful.

    Args:
        rows: labelled rows. flags: (n,) bool, whether each is flagged.
        path: JSON Lines: answer_sha256, kind; answers that aren't in it are left out.
    Returns:
        {source: {kind: metrics.rate}}
    """
    kinds, flagged = {row["answer_sha256"]: row["kind"] for _, row in _jsonl_rows(str(path))}, {}
    for row, flag in zip(rows, flags):
        kind = kinds.get(answer_digest(row.question, row.answer)) if row.label else None
        if kind:
            flagged.setdefault(row.source, {}).setdefault(kind, []).append((bool(flag), row.group))
    return {source: {kind: metrics.rate(*map(list, zip(*part))) for kind, part in found.items()} for source, found in flagged.items()}


def answer_only(guard, rows, scores, draws=1000, progress=False):
    """What the detector tells where the question isn't known, per source, on at most ANSWER_ONLY of the rows that have one.

    Args:
        guard: scoring_guard(...).
        rows: labelled rows. scores: (n,) theirs, with the question.
    Returns:
        {source: {"n", "harmful", "questions", "auroc", "recall", "false_positives", "auroc_with_question"}}, as of measure; the
        last is the value on the same rows.
    """
    found, index = {}, {id(row): i for i, row in enumerate(rows)}
    for source, part in by_source([row for row in rows if row.question.strip()]).items():
        part = spread(part, ANSWER_ONLY)
        labels = np.array([row.label for row in part])
        measured = measure(score_rows(guard, [replace(row, question="") for row in part], progress=progress)[0], labels,
                           guard.thresholds["answer"], [row.group for row in part], draws)
        found[source] = {**{name: measured[name] for name in ("n", "harmful", "questions", "auroc", "recall", "false_positives")},
                         "auroc_with_question": metrics.auroc(scores[[index[id(row)] for row in part]], labels)}
    return found


def described(guard):
    """What scored: file, backend, quantisation, thresholds and their promise."""
    return {**named(guard.detector), "thresholds": guard.thresholds, "calibration": list(getattr(guard.detector, "calibration", ()))}


def models_of(guard):
    """What made a guard's results: its detector as described, its detoxifier as named (None where nothing is rewritten), on_flag."""
    return {"detector": described(guard), "on_flag": guard.on_flag,
            "detoxifier": named(guard.detoxifier) if guard.on_flag == "rewrite" and guard.detoxifier else None}


def named(model):
    """Which detector or detoxifier: file, backend, quantisation, hash; None where it doesn't say."""
    path = getattr(model, "path", None)
    return {"model": Path(path).name if path else type(model).__name__, "backend": getattr(model, "name", None),
            "quantisation": getattr(model, "quantisation", None),
            "sha256": getattr(model, "model_sha256", None) or getattr(getattr(model, "metadata", None), "model_sha256", None)}
