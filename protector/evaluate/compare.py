"""Trained detectors side by side on the same answers, the first one being what the others are set against.

    python -m protector.evaluate.compare runs/a runs/b --measure D/dev_pairs.jsonl.gz --harmless D/dev_benign_mllm.jsonl.gz

A detector is read at an answer's last token, the largest logit of its windows: what training changed, before running.py and the
second view add theirs. Per source the AUROC, and its difference from the first detector's with a paired bootstrap: both see the same
draw of questions, so that a difference is seen which two separate intervals would hide. With harmless answers also the share of
harmful ones above the logit that 1 % of those exceed, which is what a threshold will do.
"""
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .. import models
from ..data import spread
from ..options import option, parsed
from ..template import windows
from ..train import bf16_is_faster
from . import metrics, record, rows

_SHOWN = ("depth", "rank", "lr", "prefix_weight", "answer_only", "augment", "dilute", "balance", "loss_weights", "grades", "window", "batch_tokens", "seed")


@dataclass(frozen=True)
class CompareConfig:
    """Options of `python -m protector.evaluate.compare`."""

    detectors: tuple[str, ...] = field(metadata={"help": "folders that protector train wrote, or adapter GGUF files"})
    measure: tuple[str, ...] = option((), "files of labelled answers")
    harmless: tuple[str, ...] = option((), "files of harmless answers that 1 in 100 may be flagged of")
    sources: tuple[str, ...] = option((), "that are measured; all if empty")
    most: int = option(0, "answers of one source at most, evenly thinned; 0 = all")
    threads: int = option(0, "CPU threads; 0 = as many as cores")
    name: str = option("compare", "of the result")
    out: str = option("results", "folder for NAME.json")


def run(config):
    """Measure every detector and write <out>/<name>.json.

    Returns:
        dict of kind "compare".
    Raises:
        ValueError: no source with both labels, a folder that holds no detector, or one named twice.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    measured = [row for path in config.measure for row in rows.read(path) if not config.sources or row.source in config.sources]
    by_source = {source: spread(part, config.most or len(part)) for source, part in rows.by_source(measured).items()}
    sources = {source: part for source, part in by_source.items() if len({row.label for row in part}) == 2}
    if not sources:
        raise ValueError("compare: measure must hold a source with harmful and harmless answers, got none.")
    harmless = [row for path in config.harmless for row in rows.read(path) if not row.label]
    result = {"kind": "compare", "detectors": {}, "harmless": len(harmless),
              "sources": {source: {"n": len(part), "harmful": sum(row.label for row in part)} for source, part in sources.items()}}
    if len(set(config.detectors)) < len(config.detectors):
        raise ValueError("compare: detectors must differ, got one twice.")
    first = None
    for folder in config.detectors:
        detector = models.load(folder)
        if detector.config.kind != "detector":
            raise ValueError(f"compare: {folder} must be a detector, got a {detector.config.kind}.")
        with torch.autocast(detector.device.type, torch.bfloat16, enabled=bf16_is_faster(detector.device)):
            scores = {source: last_logits(detector, part) for source, part in sources.items()}
            bound = np.quantile(last_logits(detector, harmless), 0.99, method="higher") if harmless else None
        first = first or scores
        result["detectors"][str(folder)] = {"trained": _trained(folder, detector), "sources": {
            source: compared(scores[source], first[source], part, bound) for source, part in sources.items()}}
    record.write(config.out, config.name, result, config)
    return result


def last_logits(detector, answers):
    """The largest harm logit at the end of each answer's windows.

    Args:
        detector: models.HarmDetector. answers: n rows with question and answer.
    Returns:
        (n,) float32
    """
    template, sequences, owners = detector.template, [], []
    for i, row in enumerate(answers):
        question, answer = template.clip_question(row.question)[0], template.encode(row.answer)
        for window in windows(len(answer), template.limits.window, template.limits.overlap):
            sequences.append(template.detector_sequence(question, answer[window.start:window.stop])[0])
            owners.append(i)
    largest = np.full(len(answers), -np.inf, np.float32)
    np.maximum.at(largest, owners, detector.logits(sequences))
    return largest


def compared(scores, first, part, bound=None):
    """AUROC of scores with its interval, the paired difference from the first ones where they are others, and the harmful share above a bound."""
    labels, groups = np.array([row.label for row in part]), [row.group for row in part]
    low, high = metrics.bootstrap(metrics.auroc, scores, labels, groups=groups)
    found = {"auroc": metrics.auroc(scores, labels), "low": low, "high": high}
    if scores is not first:
        apart = metrics.bootstrap(lambda a, b, y: metrics.auroc(a, y) - metrics.auroc(b, y), scores, first, labels, groups=groups)
        found["difference"] = {"auroc": found["auroc"] - metrics.auroc(first, labels), "low": apart[0], "high": apart[1]}
    if bound is not None:
        found["above_harmless"] = metrics.rate(list(scores[labels == 1] > bound), [group for group, label in zip(groups, labels) if label])
    return found


def _trained(folder, detector):
    """What the training says of itself; of a GGUF the depth and rank alone."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        return {"depth": detector.config.depth, "rank": detector.config.rank}
    written = json.loads(path.read_text())
    return {**{name: written["config"][name] for name in _SHOWN if name in written["config"]},  # an older training lacks newer options
            "steps": written["steps"], "tokens": written["tokens"],
            "parameters": written["trained_parameters"], "commit": written["commit"]}


def main(argv=None):
    for name, found in run(parsed(CompareConfig, "protector.evaluate.compare", __doc__, argv))["detectors"].items():
        print(f"{name:<20} " + "  ".join(f"{source} {value['auroc']:.3f}" for source, value in found["sources"].items()))


if __name__ == "__main__":
    sys.exit(main())
