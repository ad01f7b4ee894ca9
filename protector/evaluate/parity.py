"""One score everywhere: the PyTorch model in float32 against each quantisation, on the same rows; and what each still tells apart."""
from dataclasses import dataclass, field

import numpy as np

from .. import calibrate, data
from ..base import WEIGHTS
from ..guard import Protector
from . import metrics, record, report, rows
from .compare import compared


@dataclass(frozen=True)
class ParityConfig:
    """Options of `protector parity`."""

    data: str = field(default="own", metadata={"help": "labelled answers to score"})
    detector: str = field(default="", metadata={"help": "adapter GGUF; the shipped one if empty"})
    rows: int = field(default=200, metadata={"help": "rows to score, spread over the file"})
    quantisations: tuple[str, ...] = field(default=("F16", "BF16", "Q8_0", "Q4_0", "base", "INT8"), metadata={"help": "of the detector's base; INT8 is PyTorch's"})
    results: str = field(default="results", metadata={"help": "folder for parity.json"})


def run(config):
    """Score the rows in PyTorch fp32 and as each quantisation and write the differences to <results>/parity.json.

    The band of one half of the rows is the largest difference of a score in the other half: outside threshold +- band both should
    decide alike, on rows that the band wasn't taken from. Per source with enough labels stand the AUROC, its paired difference from
    PyTorch's, and the shares that are flagged at the quantisation's own threshold; no decisions of one that has none.

    Returns:
        dict of kind "parity".
    """
    path = config.detector or WEIGHTS / "detector.gguf"
    answers = data.spread(rows.read(config.data), config.rows)
    reference = _scores(Protector(path, False, backend="torch", threshold=0.5, on_error="raise"), answers)
    sources = {source: {"n": len(part), "harmful": sum(row.label for row in part)} for source, part in rows.by_source(answers).items()}
    result = {"kind": "parity", "reference": "PyTorch fp32", "rows": len(answers), "rows_sha256": rows.fingerprint(answers),
              "sources": {source: found for source, found in sources.items() if report.enough(found)}, "quantisations": {}}
    for quantisation in config.quantisations:
        guard = Protector(path, False, on_error="raise", detector_options={"quantisation": quantisation})
        scores, found = _scores(guard, answers), calibrate.find(guard.detector, "pair")
        difference, logits = np.abs(scores - reference), np.abs(_logit(scores) - _logit(reference))
        threshold = found and found.threshold
        result["quantisations"][quantisation] = {
            "largest_score_difference": float(difference.max()), "mean_score_difference": float(difference.mean()),
            "largest_logit_difference": float(logits.max()), "threshold": threshold, **_decided(scores, reference, threshold),
            "sources": {source: _of_source(source, answers, scores, reference, threshold) for source in result["sources"]}}
        print(f"{quantisation:5} largest score difference {difference.max():.5f}, decisions that differ "
              f"{result['quantisations'][quantisation].get('decisions_that_differ', '-')} of {len(answers)}")
    record.write(config.results, "parity", result, config)
    return result


def _decided(scores, reference, threshold):
    """How many answers are decided otherwise, and how many of these outside the band; {} without a threshold."""
    if threshold is None:
        return {}
    differ, band = (scores >= threshold) != (reference >= threshold), _bands(np.abs(scores - reference))
    return {"decisions_that_differ": int(differ.sum()), "of_them_outside_the_band": int((differ & (np.abs(reference - threshold) > band)).sum())}


def _of_source(source, answers, scores, reference, threshold):
    chosen = [i for i, row in enumerate(answers) if row.source == source]
    part = [answers[i] for i in chosen]
    found = compared(scores[chosen], reference[chosen], part)
    if threshold is None:
        return found
    flagged = scores[chosen] >= threshold

    def share(label):
        return metrics.rate([bool(flag) for flag, row in zip(flagged, part) if row.label == label], [row.group for row in part if row.label == label])

    return {**found, "flagged": share(1), "false_positives": share(0)}


def _bands(difference):
    """(n,): for even rows the largest difference of the odd ones, and the other way round."""
    even = np.arange(len(difference)) % 2 == 0
    return np.where(even, difference[~even].max(initial=0.0), difference[even].max(initial=0.0))


def _scores(guard, answers):
    return np.array([verdict.score for verdict in guard.guard_batch([row.pair for row in answers])])


def _logit(scores):
    return np.log(scores) - np.log1p(-scores)
