"""How much of harm a linear layer sees after each block of the base, before any training of the blocks.

    python -m protector.evaluate.depth --train D/train_pairs.jsonl.gz own --measure D/dev_pairs.jsonl.gz

A detector of depth k is the first k blocks, the final norm and a linear layer. Here only the layer is fitted, for every k at once:
one pass through all blocks gives every depth's last hidden state. What adapters add on top costs a training for each depth; the
probe says where to look.
"""
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from .. import data
from ..models import DEFAULT, ModelConfig, build
from ..options import option, parsed
from . import metrics, record
from .judge import fit_logistic

RIDGE = 0.1  # on standardised states, which have about as many numbers as there are answers to fit on
BATCH = 16  # sequences of one forward pass


@dataclass(frozen=True)
class DepthConfig:
    """Options of `python -m protector.evaluate.depth`."""

    train: tuple[str, ...] = option(("own",), "labelled answers that the layers are fitted on")
    measure: tuple[str, ...] = option((), "labelled answers that they are measured on")
    depths: tuple[str, ...] = option(("6", "9", "12", "15", "18", "21", "24", "27", "30"), "blocks")
    backbone: str = option(DEFAULT, "default, or a Hugging Face causal LM")
    sources: tuple[str, ...] = option((), "that are measured; all if empty")
    fit: int = option(60, "answers of each source to fit on")
    most: int = option(250, "answers of each source to measure; one with fewer than 50 or one label is left out")
    threads: int = option(0, "CPU threads; 0 = as many as cores")
    seed: int = option(0, "of which answers are drawn")
    out: str = option("results", "folder for depth.json")


def run(config):
    """Fit a linear layer at each depth and write <out>/depth.json.

    Returns:
        dict of kind "depth".
    Raises:
        ValueError: a depth that the backbone doesn't have.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    detector = build(ModelConfig("detector", config.backbone, rank=0)).eval()
    depths = [int(depth) for depth in config.depths]
    if not all(0 < depth <= detector.config.depth for depth in depths):
        raise ValueError(f"depth: depths must be 1 to {detector.config.depth}, got {' '.join(config.depths)}.")
    fitted_on, measured_on = _rows(config.train, config.fit, config.seed), _rows(config.measure, config.most, config.seed, config.sources)
    states, labels = hidden_states(detector, fitted_on, depths), np.array([row.label for row in fitted_on])
    others = hidden_states(detector, measured_on, depths)
    by_source = {}
    for i, row in enumerate(measured_on):
        by_source.setdefault(row.source, []).append(i)
    by_source = {source: found for source, found in by_source.items()
                 if len(found) >= 50 and len({measured_on[i].label for i in found}) == 2}
    result = {"kind": "depth", "fitted_on": len(fitted_on), "blocks": detector.config.depth, "depths": {}, "sources": {
        source: {"n": len(found), "harmful": sum(measured_on[i].label for i in found)} for source, found in by_source.items()}}
    for at, depth in enumerate(depths):
        scores = probe(states[:, at], labels, others[:, at])
        result["depths"][str(depth)] = {source: _auroc(scores, measured_on, found) for source, found in by_source.items()}
    record.write(config.out, "depth", result, config)
    return result


def _rows(paths, most, seed, sources=()):
    """At most `most` rows of each source, evenly over its answers in an order of their own."""
    rows = [row for path in paths for pairs, triples in [data.read(path)] for row in pairs + data.pairs_of(triples)]
    by_source = {}
    for row in data.unique(rows):
        by_source.setdefault(row.source, []).append(row)
    rng = np.random.default_rng(seed)
    return [part[i] for source, part in by_source.items() if not sources or source in sources for i in rng.permutation(len(part))[:most]]


@torch.inference_mode()
def hidden_states(detector, rows, depths):
    """What a detector of each depth hands to its head.

    Args:
        detector: models.HarmDetector with all blocks. rows: with question and answer. depths: numbers of blocks.
    Returns:
        (n, len(depths), d) float32, after the final norm, at the answer's last token.
    """
    template, body = detector.template, detector.backbone
    sequences = [template.detector_sequence(template.clip_question(row.question)[0], template.encode(row.answer)[:detector.limits.window])[0]
                 for row in rows]
    states = np.empty((len(rows), len(depths), body.config.hidden_size), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(sequences[i]))
    for begin in tqdm(range(0, len(order), BATCH), unit="batch"):
        part = order[begin:begin + BATCH]
        last = torch.tensor([len(sequences[i]) - 1 for i in part])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequences[i]) for i in part], batch_first=True)  # (B, T)
        mask = torch.arange(ids.shape[1]) <= last[:, None]
        after = body(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        for at, depth in enumerate(depths):
            state = after[depth][torch.arange(len(part)), last]  # (B, T, d) -> (B, d)
            # Trap: transformers gives the last block's output after the norm, the others' before it.
            states[part, at] = (state if depth == len(after) - 1 else body.norm(state)).float()
    return states


def probe(states, labels, others):
    """Logits of a logistic regression on standardised states.

    Args:
        states: (n, d). labels: (n,) 0 or 1. others: (m, d).
    Returns:
        (m,) float64
    """
    mean, scale = states.mean(0), states.std(0) + 1e-6
    weight, bias = fit_logistic(((states - mean) / scale).astype(np.float64), labels, np.ones(len(labels)), RIDGE)
    return (others - mean) / scale @ weight + bias


def _auroc(scores, rows, found):
    labels, questions = np.array([rows[i].label for i in found]), [rows[i].question for i in found]
    low, high = metrics.bootstrap(metrics.auroc, scores[found], labels, groups=questions)
    return {"auroc": metrics.auroc(scores[found], labels), "low": low, "high": high}


def main(argv=None):
    for depth, found in run(parsed(DepthConfig, "protector.evaluate.depth", __doc__, argv))["depths"].items():
        print(f"{depth:>3} blocks  " + "  ".join(f"{source} {value['auroc']:.3f}" for source, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
