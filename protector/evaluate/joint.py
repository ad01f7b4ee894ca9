"""One backbone trained for both tasks, beside the two adapters: what a rewrite that starts from the detector's cache costs in quality.

    python -m protector.evaluate.joint --train D/train_triples.jsonl.gz own --measure D/dev_pairs.jsonl.gz --steps 200

The detoxifier's prompt is the detector's sequence and a mark (template.py), so that one model could read (q, a_rej) once, score it after
block K and, if it is flagged, go on from its keys and values. Three ways, from nothing, each step on the same rows:

    two adapters      L_harm on the first K blocks; L_detox on all of them, in another copy        a rewrite reads its prompt anew
    one adapter       L_harm + L_detox of one sequence, L_harm on the states after block K         it goes on from the cache
    after the answer  L_detox; (q, a_rej) through the first way's frozen detector, blocks above    likewise, and the detector stays what it is
                      K plain, and only the tokens behind it through an adapter of their own

L_harm is read at answers' ends, of the pairs and of the triples' rejected answers. What is measured is of questions that no way was trained
on: AUROC by source, and nats per accepted token of triples. shared.py has the times and the memory, which don't depend on weights.
"""
import copy
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import data
from ..losses import harm_loss
from ..models import DEFAULT, KINDS, ModelConfig, build
from ..options import option, parsed
from ..train import TrainConfig, _device, _epoch, _norm, bf16_is_faster, collate, detoxifier_examples, load_rows, optimizer_of, rate_at
from . import metrics, record, rows
from .compare import compared, last_logits
from .replay import fewest

TWO, ONE, AFTER = "two adapters", "one adapter", "after the answer"


@dataclass(frozen=True)
class JointConfig:
    """Options of `python -m protector.evaluate.joint`."""

    train: tuple[str, ...] = option(("own",), "files of labelled answers and triples, as protector train reads them")
    measure: tuple[str, ...] = option((), "files of labelled answers; what they hold is not trained on")
    sources: tuple[str, ...] = option((), "that are measured; all if empty")
    most: int = option(250, "answers of each source to measure; 0 = all")
    held_out: float = option(0.1, "share of the training files' questions, by a hash, that is not trained on")
    rewrites: int = option(200, "triples of these questions to measure")
    backbone: str = option(DEFAULT, "default, or a Hugging Face causal LM")
    depth: int = option(15, "blocks that a detector reads; 0 = all")
    batch_tokens: int = option(2048, "tokens of pairs in a step, and as many of triples")
    steps: int = option(200, "of the optimiser, for every adapter")
    seed: int = option(0, "of data order and initialisation")
    threads: int = option(0, "CPU threads; 0 = as many as cores")
    out: str = option("results", "folder for joint.json")


def run(config):
    """Train all three ways, measure them and write <out>/joint.json.

    Returns:
        dict of kind "joint".
    Raises:
        ValueError: no step, no source with both labels, or nothing to train on or to hold out.
    """
    if config.steps < 1:
        raise ValueError(f"joint: steps must be at least 1, got {config.steps}. Choose another number.")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device("auto")
    bf16 = bf16_is_faster(device)
    options = {kind: TrainConfig(kind, config.train, batch_tokens=config.batch_tokens, exclude=config.measure, seed=config.seed) for kind in KINDS}
    sides = {kind: data.split(load_rows(options[kind]), config.held_out) for kind in KINDS}  # a question is on one side, whatever its rows' kind
    measured = fewest([row for path in config.measure for row in rows.read(path) if not config.sources or row.source in config.sources], config.most)
    sources = {source: part for source, part in rows.by_source(measured).items() if len({row.label for row in part}) == 2}

    def new(kind):
        torch.manual_seed(config.seed)  # the adapters of all ways begin alike
        return build(ModelConfig(kind, config.backbone, config.depth if kind == "detector" else 0)).to(device)

    def measure(losses, detector=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return nats(losses, [group for _, group in held_out]), {source: last_logits(detector, part) for source, part in sources.items() if detector}

    detector, detoxifier = new("detector"), new("detoxifier")
    template, depth = detoxifier.template, detector.config.depth
    # One example in a group, so that no padding has a part in its number.
    held_out = [(row, group) for row in data.spread(sides["detoxifier"][1], config.rewrites)
                for group in marked([detoxifier_examples([row], template)], template) if group]
    if not sources or not held_out or not all(training for training, _ in sides.values()):
        raise ValueError("joint: measure must hold a source with harmful and harmless answers, and train triples on both sides of held_out, got none "
                         "of one. Pass other files.")
    pairs, triples = (drawn(options[kind], sides[kind][0], template, config.steps) for kind in KINDS)
    steps = list(zip(pairs, (marked(groups, template) for groups in triples)))
    untrained, _ = measure(rewriting(detoxifier))
    found, parameters = {}, {TWO: fit("detector", [detector], detecting(detector), steps, options["detector"], bf16)
                             + fit("detoxifier", [detoxifier], rewriting(detoxifier), steps, options["detoxifier"], bf16)}
    found[TWO] = measure(rewriting(detoxifier), detector)
    detoxifier = new("detoxifier")
    shared = detector_of(detoxifier, depth)
    parameters[ONE] = fit(ONE, [shared, detoxifier], both(shared, detoxifier), steps, options["detector"], bf16)
    found[ONE] = measure(both(shared, detoxifier), shared)
    del shared
    detoxifier = new("detoxifier")
    losses = after(detector, detoxifier)
    parameters[AFTER] = fit(AFTER, [detoxifier], losses, steps, options["detoxifier"], bf16)  # the detector's, as of the first way, come on top
    found[AFTER] = measure(losses)  # it has the first way's detector
    counts, questions = np.array([_norm([group], "detoxifier") for _, group in held_out]), [data.folded(row.question) for row, _ in held_out]
    first, logits = found[TWO]
    result = {"kind": "joint", "depth": depth, "steps": config.steps, "bf16": bf16, "held_out": {"triples": len(held_out), "tokens": counts.sum()},
              "trained_on": {name: sum(len(group) for step in steps for group in step[at]) for at, name in enumerate(("pairs", "triples"))},
              "sources": {source: {"n": len(part), "harmful": sum(row.label for row in part)} for source, part in sources.items()},
              "untrained": per_token(untrained, first, counts, questions), "ways": {
                  name: {"parameters": parameters[name], "nats": per_token(mine, first, counts, questions),
                         "sources": {source: compared(scores, logits[source], sources[source], None) for source, scores in theirs.items()}}
                  for name, (mine, theirs) in found.items()}}
    record.write(config.out, "joint", result, config)
    return result


def drawn(options, training, template, n_steps):
    """The batches of n steps, as train.py draws them, epoch after epoch."""
    found, epoch = [], 0
    while len(found) < n_steps:
        found, epoch = found + _epoch(options, training, template, epoch), epoch + 1
    return found[:n_steps]


def marked(groups, template):
    """The detoxifier's examples with the number of tokens that the detector reads of each, and what it is to learn from them."""
    n_mark = len(template.detoxifier_prompt((), ())) - len(template.prefix(()))
    return [[{**example, "read": example["start"] - n_mark, "label": 1.0, "weight": 1.0} for example in group] for group in groups]


def _answers(group, device):
    """The detector's batch of a group: pairs as they are, triples up to the rejected answer's end."""
    return collate([{**example, "ids": example["ids"][:example.get("read")]} for example in group], "detector", device)


def detecting(detector):
    """losses(group) -> {"detector": L_harm} of a group of pairs or of triples; as all `losses` below, by the kind of model that has it."""
    return lambda group: {"detector": detector.loss(_answers(group, detector.device), 0.0)}


def rewriting(detoxifier):
    """losses(group) -> {"detoxifier": L_detox}, nothing of pairs."""
    return lambda group: {"detoxifier": detoxifier.loss(collate(group, "detoxifier", detoxifier.device))} if "read" in group[0] else {}


def detector_of(detoxifier, depth):
    """HarmDetector of a detoxifier's own first blocks: it shares their weights and adapters, and adds the head."""
    detector, body = build(ModelConfig("detector", detoxifier.config.backbone, depth, rank=0)).to(detoxifier.device), detoxifier.blocks
    detector.backbone = copy.copy(body)
    detector.backbone._modules = {**body._modules, "layers": body.layers[:depth]}  # trap: a copied module shares this dictionary
    detector.backbone.config = copy.copy(body.config)
    detector.backbone.config.num_hidden_layers = depth
    return detector


def both(detector, detoxifier):
    """losses(group) -> {"detector": L_harm, "detoxifier": L_detox} of one pass over each sequence, by a detector of the detoxifier's blocks."""
    def losses(group):
        if "read" not in group[0]:
            return detecting(detector)(group)
        batch, answers = collate(group, "detoxifier", detoxifier.device), _answers(group, detoxifier.device)
        body, last = detoxifier.blocks, answers["last"]
        states = body(input_ids=batch["ids"], output_hidden_states=True, use_cache=False).hidden_states
        state = states[detector.config.depth][torch.arange(len(last), device=last.device), last]  # (B, T, d) -> (B, d)
        if detector.config.depth < len(states) - 1:  # trap: transformers gives the last block's output after the norm, the others' before it
            state = body.norm(state)
        logits = detector.head(state.to(detector.head.weight.dtype)).squeeze(-1)  # (B, d) -> (B,)
        return {"detector": harm_loss(logits, answers["labels"], answers["weights"]), "detoxifier": detoxifier.loss_of(states[-1], batch["targets"])}

    return losses


def after(detector, detoxifier):
    """losses(group) -> {"detoxifier": L_detox}, its adapter on tokens after the rejected answer's end alone: before, the detector's is, frozen."""
    lm, body = detoxifier.lm, detoxifier.blocks
    options = copy.deepcopy(lm.peft_config["default"])
    options.layers_to_transform = list(range(detector.config.depth))
    lm.add_adapter("detector", options)
    theirs = {name.partition(".layers.")[2]: value for name, value in detector.trained().items()}
    with torch.no_grad():
        for name, value in lm.named_parameters():
            if ".detector." in name:
                value.copy_(theirs[name.partition(".layers.")[2].replace(".detector.", ".default.")])
    lm.set_adapter("default")

    def losses(group):
        if "read" not in group[0]:
            return {}
        cache, n_read = cached(detoxifier, group)
        batch = collate([{"ids": example["ids"][example["read"]:], "start": example["start"] - example["read"]} for example in group],
                        "detoxifier", detoxifier.device)
        positions = n_read[:, None] + torch.arange(batch["ids"].shape[1], device=n_read.device)  # (B, T)
        real = torch.arange(cache.get_seq_length(), device=n_read.device) < n_read[:, None]  # rows of the cache are padded on the right
        hidden = body(input_ids=batch["ids"], position_ids=positions, attention_mask=torch.cat([real, torch.ones_like(positions, dtype=torch.bool)], 1),
                      past_key_values=cache, use_cache=True).last_hidden_state
        return {"detoxifier": detoxifier.loss_of(hidden, batch["targets"])}

    return losses


@torch.no_grad()
def cached(detoxifier, group):
    """(keys and values of (q, a_rej), (B,) numbers of tokens) by the detector's adapter in a detoxifier that `after` gave it to."""
    answers = _answers(group, detoxifier.device)
    detoxifier.lm.set_adapter("detector")
    cache = detoxifier.blocks(input_ids=answers["ids"], use_cache=True).past_key_values
    detoxifier.lm.set_adapter("default")  # which marks it as the trained one, too
    return cache, answers["last"] + 1


def fit(name, models, losses, steps, options, bf16):
    """Train what has a gradient, with train.py's optimiser, rate and clipping.

    Args:
        losses: see detecting. steps: list of (groups of pairs, groups of triples). options: TrainConfig.
    Returns:
        number of trained parameters.
    """
    weights = [value for value in nn.ModuleList(models).parameters() if value.requires_grad]
    optimizer = optimizer_of(weights, options)
    for at, (pairs, triples) in enumerate(tqdm(steps, desc=name, unit="step")):
        share, norms = at / len(steps), {"detector": _norm(pairs + triples, "detector"), "detoxifier": _norm(triples, "detoxifier")}
        optimizer.param_groups[0]["lr"] = rate_at(share, options)
        optimizer.zero_grad(set_to_none=True)
        for group in pairs + triples:
            with torch.autocast(weights[0].device.type, torch.bfloat16, enabled=bf16):
                found = losses(group)
            if found:  # a detoxifier learns nothing from pairs
                sum(loss * (_norm([group], kind) / norms[kind]) for kind, loss in found.items()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        optimizer.step()
    return sum(value.numel() for value in weights)


@torch.no_grad()
def nats(losses, groups):
    """(n,) negative log-likelihood of each accepted answer and its end mark; groups of one example."""
    return np.array([float(losses(group)["detoxifier"]) * _norm([group], "detoxifier") for group in tqdm(groups, desc="rewrites", unit="answer")])


def per_token(sums, first, counts, questions):
    """Mean over all tokens with its interval over questions; of another way than the first the paired difference, too."""
    def mean(a, n):
        return a.sum() / n.sum()

    found = metrics.number(mean, sums, counts, groups=questions)
    return found if sums is first else {**found, "difference": metrics.number(mean, sums - first, counts, groups=questions)}


def main(argv=None):
    for name, found in run(parsed(JointConfig, "protector.evaluate.joint", __doc__, argv))["ways"].items():
        print(f"{name:<16} {found['nats']['value']:.3f} nats a token  "
              + "  ".join(f"{source} {value['auroc']:.3f}" for source, value in found["sources"].items()))


if __name__ == "__main__":
    sys.exit(main())
