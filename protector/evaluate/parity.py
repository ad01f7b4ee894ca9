"""One score everywhere: the PyTorch model against its GGUF in each quantisation, on the same rows."""
from dataclasses import dataclass, field

import numpy as np

from .. import data
from ..base import WEIGHTS
from ..guard import Protector
from . import record


@dataclass(frozen=True)
class ParityConfig:
    """Options of `protector parity`."""

    data: str = field(default="own", metadata={"help": "labelled answers to score"})
    detector: str = field(default="", metadata={"help": "adapter GGUF; the shipped one if empty"})
    rows: int = field(default=200, metadata={"help": "rows to score, spread over the file"})
    quantisations: tuple[str, ...] = field(default=("F16", "Q8_0", "Q4_0", "base"), metadata={"help": "of the detector's base"})
    results: str = field(default="results", metadata={"help": "folder for parity.json"})


def run(config):
    """Score the rows in PyTorch fp32 and in llama.cpp and write the differences to <results>/parity.json.

    The band of one half of the rows is the largest difference of a score in the other half: outside threshold +- band both should
    decide alike, on rows that the band wasn't taken from.

    Returns:
        dict of kind "parity".
    """
    path = config.detector or WEIGHTS / "detector.gguf"
    pairs, triples = data.read(config.data)
    rows = pairs + data.pairs_of(triples)
    rows = data.spread(rows, config.rows)
    reference = _scores(Protector(path, False, backend="torch", threshold=0.5, on_error="raise"), rows)
    result = {"kind": "parity", "reference": "PyTorch fp32", "rows": len(rows), "rows_sha256": data.fingerprint(rows), "quantisations": {}}
    for quantisation in config.quantisations:
        guard = Protector(path, False, on_error="raise", detector_options={"quantisation": quantisation})
        scores, threshold = _scores(guard, rows), guard.thresholds["pair"]
        difference = np.abs(scores - reference)
        logits, differ = np.abs(_logit(scores) - _logit(reference)), (scores >= threshold) != (reference >= threshold)
        result["quantisations"][quantisation] = {
            "largest_score_difference": float(difference.max()), "mean_score_difference": float(difference.mean()),
            "largest_logit_difference": float(logits.max()), "threshold": threshold,
            "decisions_that_differ": int(differ.sum()),
            "of_them_outside_the_band": int((differ & (np.abs(reference - threshold) > _bands(difference))).sum())}
        print(f"{quantisation:5} largest score difference {difference.max():.5f}, decisions that differ "
              f"{result['quantisations'][quantisation]['decisions_that_differ']} of {len(rows)}")
    record.write(config.results, "parity", result, config)
    return result


def _bands(difference):
    """(n,): for even rows the largest difference of the odd ones, and the other way round."""
    even = np.arange(len(difference)) % 2 == 0
    return np.where(even, difference[~even].max(initial=0.0), difference[even].max(initial=0.0))


def _scores(guard, rows):
    return np.array([verdict.score for verdict in guard.guard_batch([(row.question, row.answer) for row in rows])])


def _logit(scores):
    return np.log(scores) - np.log1p(-scores)
