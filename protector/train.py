"""One training loop for both losses.

    python -m protector train detector   --data own pairs.jsonl.gz --out runs/detector   --minutes 30
    python -m protector train detoxifier --data own triples.jsonl  --out runs/detoxifier --minutes 15

Under torchrun every rank builds the same global batches, takes its share of the rows, scales its loss by its share of the
batch's norm, and the gradients are summed: the loss curve is that of one process with the same global batch.
"""
import json
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from . import data
from .augment import dilute as _dilute, disguise
from .base import WEIGHTS, whole_file
from .evaluate import record
from .errors import DataError, ModelError
from .losses import IGNORE
from .models import KINDS, ModelConfig, build, load
from .options import option
from .template import Limits, windows

HARMLESS = 0.2  # a target below it is of harmless text, fit to stand before another answer
MICRO_BATCHES = 4  # groups of examples in one batch, each run on its own


@dataclass(frozen=True)
class TrainConfig:
    """Options of `protector train`; each is a flag of the command line."""

    kind: str = field(metadata={"help": "detector or detoxifier"})
    data: tuple[str, ...] = option(("own",), "files, pyrit wheel, own, or hub:OWNER/NAME")
    out: str = option("runs/model", "folder for weights, checkpoint and run.json")
    backbone: str = option("default", "default, or a Hugging Face causal LM")
    depth: int = option(0, "blocks that a detector keeps; 0 = all")
    rank: int = option(16, "LoRA rank; 0 = full fine-tuning")
    alpha: float = option(32.0, "LoRA alpha; the scale is alpha / rank")
    lr: float = option(5e-4, "peak learning rate")
    warmup: float = option(0.03, "share of the run in which the rate rises")
    batch_tokens: int = option(2048, "tokens in one global batch, padding included")
    epochs: float = option(1.0, "passes over the data")
    minutes: float = option(0.0, "time budget; 0 = none. The rate falls to 0 at its end")
    prefix_weight: float = option(0.3, "share of the all-prefix loss (detector)")
    window: int = option(Limits.window, "answer tokens scored in one sequence (detector)")
    answer_only: float = option(0.15, "share of rows shown without their question (detector)")
    augment: float = option(0.0, "share of rows wrapped or obfuscated (detector); augment.py")
    dilute: float = option(0.0, "share of rows put among harmless answers of other rows (detector)")
    balance: float = option(0.5, "0 = rows as they are, 1 = one share per question")
    source_weights: tuple[str, ...] = option((), "SOURCE=factor of how often rows are drawn")
    loss_weights: tuple[str, ...] = option((), "SOURCE=factor in the loss, for weak labels (detector)")
    exclude: tuple[str, ...] = option((), "files whose questions and answers are left out")
    refusal_cap: float = option(0.2, "largest share of stock refusals among accepted answers")
    rewrite_tokens: int = option(160, "longest accepted answer (detoxifier)")
    replies: bool = option(False, "answer the public sets' questions with this project's own accepted answers")
    plain: bool = option(False, "of these answers the plain ones, which all of the corpus's questions have, too")
    grades: bool = option(False, "this project's grades as labels where it graded the public sets' answers (detector)")
    init: str = option("", "what to start from: a trained folder, an adapter GGUF, or shipped; of a lower rank too, or of fewer blocks: the head then starts anew")
    seed: int = option(0, "of data order and initialisation")
    compile: bool = option(False, "torch.compile the blocks: about a minute before the first step, faster ones then")
    checkpoint_s: float = option(120.0, "seconds between checkpoints")
    threads: int = option(0, "CPU threads; 0 = as many as cores")
    device: str = option("auto", "auto, cpu, cuda")


def bf16_is_faster(device):
    """Whether this device multiplies bf16 faster than fp32.

    Trap: PyTorch accepts bf16 on every CPU; without AVX-512 or AMX it ran 80 times slower than fp32 here.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype):
        a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b
        return min(_timed(lambda: a @ b) for _ in range(3))

    return seconds(torch.bfloat16) * 1.1 < seconds(torch.float32)


def _timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def detector_examples(rows, template, answer_only, augment, rng, dilute=0.0):
    """One example per pair: a random window of its answer, exactly the ids that scoring will see.

    Where an answer stands after harmless text, its label holds from its own start on.
    """
    limits, examples = template.limits, []
    harmless = [row.answer for row in rows if row.target < HARMLESS]
    for row in rows:
        question = "" if rng.random() < answer_only else row.question
        answer = row.answer
        if augment and rng.random() < augment:
            answer = disguise(answer, row.label, rng)
        is_diluted = dilute and harmless and rng.random() < dilute
        answer_ids = template.encode(" " + answer if is_diluted else answer)
        if not answer_ids:
            continue
        window = rng.choice(windows(len(answer_ids), limits.window, limits.overlap))
        answer_ids, n_before = answer_ids[window.start:window.stop], 0
        if is_diluted:
            answer_ids, n_before = _dilute(answer_ids, lambda: template.encode(rng.choice(" \n") + rng.choice(harmless)),
                                            limits.window - len(answer_ids), rng)
        question_ids, _ = template.clip_question(question)
        ids, start = template.detector_sequence(question_ids, answer_ids)
        start += n_before if row.target >= HARMLESS else 0
        examples.append({"ids": ids, "start": start, "label": row.target, "weight": row.weight})
    return examples


def detoxifier_examples(rows, template):
    """One example per triple: prompt without loss, then the accepted answer and its end mark."""
    limits, examples = template.limits, []
    for row in rows:
        prompt = template.rewrite_prompt(row.question, row.rejected)
        accepted = template.encode(row.accepted)
        if 0 < len(accepted) <= limits.rewrite_tokens:  # a cut rewrite would teach to stop in mid-sentence
            examples.append({"ids": prompt + accepted + [template.end], "start": len(prompt)})
    return examples


def batches(examples, batch_tokens, rng):
    """Batches of MICRO_BATCHES groups; a group holds examples of similar length, padded to at most its share of tokens.

    Groups of one length keep padding low; several lengths in one batch keep its gradient from following one source.
    An example that is longer than a group's share is a group alone.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]) + rng.random() * 8)
    groups, group, longest = [], [], 0
    for i in order:
        longest = max(longest, len(examples[i]["ids"]))
        if group and longest * (len(group) + 1) > batch_tokens // MICRO_BATCHES:
            groups.append(group)
            group, longest = [], len(examples[i]["ids"])
        group.append(examples[i])
    groups += [group] if group else []
    rng.shuffle(groups)
    return [groups[i:i + MICRO_BATCHES] for i in range(0, len(groups), MICRO_BATCHES)]


def collate(group, kind, device):
    """Right-padded tensors of one batch; T is the longest example."""
    n_tokens = max(len(example["ids"]) for example in group)
    ids = torch.zeros(len(group), n_tokens, dtype=torch.long)
    answer = torch.zeros(len(group), n_tokens, dtype=torch.bool)
    for i, example in enumerate(group):
        length = len(example["ids"])
        ids[i, :length] = torch.tensor(example["ids"])
        answer[i, example["start"]:length] = True
    batch = {"ids": ids, "answer": answer}
    if kind == "detector":
        batch["last"] = torch.tensor([len(example["ids"]) - 1 for example in group])
        batch["labels"] = torch.tensor([example["label"] for example in group])
        batch["weights"] = torch.tensor([example["weight"] for example in group])
    else:
        # hidden[:, t] predicts ids[:, t + 1]
        batch["targets"] = torch.full_like(ids, IGNORE)
        batch["targets"][:, :-1] = torch.where(answer[:, 1:], ids[:, 1:], IGNORE)
    return {name: value.to(device) for name, value in batch.items()}


def _norm(groups, kind):
    """What the loss of these examples is divided by: sum of weights, or number of target tokens."""
    return sum(example["weight"] if kind == "detector" else len(example["ids"]) - example["start"]
               for group in groups for example in group)


def _padded_tokens(groups):
    return sum(len(group) * max(len(example["ids"]) for example in group) for group in groups)


def load_rows(config):
    """Rows of every named source that fit the kind, without repeats and without what `exclude` names."""
    rows = []
    for path in config.data:
        pairs, triples = data.read(path)
        rows += pairs + data.pairs_of(triples) if config.kind == "detector" else triples or data.triples_of(pairs)
    if config.grades:
        rows = data.graded(rows, data.grades(data.GRADES)) + data.pairs_of_grades(rows, data.GRADES)
    for kind in ["accepted"] * config.replies + ["plain"] * config.plain:
        found = data.replies(data.REPLIES, kind)
        rows = rows + data.pairs_with_replies(rows, found) if config.kind == "detector" else data.replied(rows, found)
    banned_pairs = [pair for path in config.exclude for kind in [data.read(path)] for pair in kind[0] + data.pairs_of(kind[1])]
    questions = {data._question_key(pair) for pair in banned_pairs if pair.question.strip()}
    answers = {pair.answer for pair in banned_pairs}
    factors = _factors(config.loss_weights, "loss_weights")
    kept = []
    for row in data.unique(rows):
        texts = {row.answer} if config.kind == "detector" else {row.accepted, row.rejected}
        if data._question_key(row) not in questions and not texts & answers:
            kept.append(row if row.source not in factors else _weighted(row, factors[row.source]))
    if config.kind == "detoxifier":
        kept = data.cap_refusals(kept, config.refusal_cap, config.seed)
    kept = [row for row in kept if row.weight > 0]  # a batch of rows that weigh nothing has no mean
    if not kept:
        raise DataError(f"train: data must hold rows for a {config.kind}, got none. A detoxifier needs triples, or "
                        "pairs with both labels for one question.")
    return kept


def _weighted(row, factor):
    return type(row)(**{**asdict(row), "weight": row.weight * factor})


def _factors(items, name):
    try:
        factors = {source: float(factor) for source, factor in (item.split("=") for item in items)}
    except ValueError:
        factors = {"": -1.0}
    if not all(0 <= factor < math.inf for factor in factors.values()):
        raise ValueError(f"train: {name} must be SOURCE=NUMBER with a number >= 0, got {' '.join(items)}. "
                         "Write it like diasafety=0.5.")
    return factors


_RANGES = {"depth": (0, math.inf), "rank": (0, math.inf), "alpha": (1e-6, math.inf), "lr": (1e-9, 1), "warmup": (0, 1),
           "batch_tokens": (MICRO_BATCHES, math.inf), "window": (Limits.overlap + 1, math.inf), "epochs": (0, math.inf), "minutes": (0, math.inf), "prefix_weight": (0, 1),
           "answer_only": (0, 1), "augment": (0, 1), "dilute": (0, 1), "balance": (0, math.inf), "refusal_cap": (0, 1),
           "rewrite_tokens": (1, math.inf), "checkpoint_s": (0, math.inf), "threads": (0, math.inf)}


def _check(config):
    """Every option before any work: a run must not end in an hour with what could be seen now."""
    if config.kind not in KINDS:
        raise ValueError(f"train: kind must be detector or detoxifier, got {config.kind}. Name one.")
    for name, (least, most) in _RANGES.items():
        value = getattr(config, name)
        if not least <= value <= most:  # NaN fails too
            raise ValueError(f"train: {name} must be between {least} and {most}, got {value}. Change --{name.replace('_', '-')}.")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"train: device must be auto, cpu or cuda, got {config.device}. Leave it out.")
    _factors(config.source_weights, "source_weights")
    if _factors(config.loss_weights, "loss_weights") and config.kind != "detector":
        raise ValueError("train: loss_weights must be left out for a detoxifier: its loss knows no labels. Use source_weights.")
    if config.grades and config.kind != "detector":
        raise ValueError("train: grades must be left out for a detoxifier, got them: its loss knows no labels. Leave out --grades.")


def train(config, progress=True):
    """Train one model and write it to `config.out`: model.safetensors, protector.json, run.json, log.jsonl.

    An interrupted run goes on from its checkpoint when it is started again with the same configuration.

    Returns:
        the trained model, in eval mode.
    Raises:
        DataError: no usable rows. ModelError: a checkpoint of another configuration, or a file that is none. ValueError: a bad option.
    """
    _check(config)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = _device(config.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = load_rows(config)
    model = build(ModelConfig(config.kind, config.backbone, config.depth, config.rank, config.alpha,
                              Limits(window=config.window, rewrite_tokens=config.rewrite_tokens))).to(device).train()
    if config.init:
        _start_from(model, config.init)
    if config.compile:
        model.compile_blocks()
    out = Path(config.out)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    trained = list(model.trained().values())
    optimizer = optimizer_of(trained, config)
    bf16 = bf16_is_faster(device)
    if world > 1:  # measured, so ranks may differ: the first one decides
        shared = torch.tensor([float(bf16)], device=device)
        dist.broadcast(shared, 0)
        bf16 = bool(shared.item())
    run = _describe(config, rows, device, bf16, model)
    # One epoch's batches are drawn anew from (seed, epoch), so a position in the run is one number: the step.
    per_epoch = len(_epoch(config, rows, model.template, 0))
    total = max(math.ceil(config.epochs * per_epoch), 1)
    fingerprint = run["fingerprint"]
    step, spent_s, tokens = _resume(out, config, fingerprint, model, optimizer)
    if world > 1:  # one rank may not see the folder that the others go on from
        first_last = torch.tensor([step, -step], device=device)
        dist.all_reduce(first_last, dist.ReduceOp.MIN)
        if first_last.sum() != 0:
            raise ModelError("train: every process must go on from one checkpoint, got several. Give --out a folder that all machines see.")
    if rank == 0:
        _cut_log(out / "log.jsonl", step)
    start, last_saved = time.monotonic() - spent_s, time.monotonic()
    bar = tqdm(total=total, initial=step, disable=not progress or rank > 0, desc=config.kind, unit="step")
    log = open(out / "log.jsonl", "a") if rank == 0 else None
    tokens_before, tokens_start, smooth, epoch, steps = tokens, time.monotonic(), None, -1, []
    while step < total:
        elapsed_s = time.monotonic() - start
        share = max(step / total, elapsed_s / (60 * config.minutes) if config.minutes else 0)
        if world > 1:  # every rank must stop at the same step and use the same rate
            shared = torch.tensor([share], dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            share = shared.item()
        if share >= 1:
            break
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            steps = _epoch(config, rows, model.template, epoch)
        groups = steps[step % per_epoch % len(steps)]  # windows are drawn anew: an epoch may have a batch fewer
        rate = rate_at(share, config)
        for options in optimizer.param_groups:
            options["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(model, groups, config, rank, world, bf16)
        gradient_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        step += 1
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(gradient_norm):  # before the step: the weights stay whole
            raise RuntimeError(f"train: loss and gradient must be finite, got {value} and {gradient_norm:.3g} at step {step}. "
                               "Lower lr.")
        optimizer.step()
        tokens += _padded_tokens(groups)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        left_s = elapsed_s / max(share, 1e-6) * (1 - share)
        bar.set_postfix_str(f"loss {smooth:.3f}, {(tokens - tokens_before) / (time.monotonic() - tokens_start):.0f} tokens/s, "
                            f"{left_s / 60:.0f} min left")
        bar.update()
        if rank == 0:
            log.write(json.dumps({"step": step, "loss": round(value, 6), "lr": rate, "tokens": tokens,
                                  "elapsed_s": round(elapsed_s, 2)}) + "\n")
            if time.monotonic() - last_saved > config.checkpoint_s:
                log.flush()
                _checkpoint(out, config, fingerprint, model, optimizer, step, time.monotonic() - start, tokens)
                last_saved = time.monotonic()
    bar.close()
    if rank == 0:
        log.close()
        model.save(out)
        run |= {"steps": step, "epochs": step / per_epoch, "tokens": tokens, "loss": smooth,
                "seconds": round(time.monotonic() - start, 1)}
        (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return model.eval()


def _backward(model, groups, config, rank, world, bf16):
    """Gradients of one global batch, and its loss: L = sum_g (norm_g / norm) L_g over groups and ranks."""
    device, norm = model.device, _norm(groups, config.kind)
    loss = torch.zeros((), device=device)
    for group in groups:
        mine = group[rank::world]
        if mine:
            # A row alone would be compiled anew; twice, it has the same mean.
            run_rows = mine * 2 if config.compile and len(mine) == 1 else mine
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                part = model.loss(collate(run_rows, config.kind, device), config.prefix_weight)
            part = part * (_norm([mine], config.kind) / norm)
            part.backward()
            loss += part.detach()
    if world > 1:
        for value in model.trained().values():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            dist.all_reduce(value.grad)
        dist.all_reduce(loss)
    return loss


def optimizer_of(weights, config):
    """AdamW without weight decay, for every trained weight alike.

    Args:
        weights: list of tensors with requires_grad. config: TrainConfig, of which lr counts; rate_at sets the rate of each step.
    Returns:
        torch.optim.AdamW.
    """
    return torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)


def rate_at(share, config):
    """Learning rate when this share of a run is done: it rises over warmup, falls to 0 at the end, and is never 0.

        rate = lr max( min(1, share / warmup) (1 - share), 0.001 )

    Args:
        share: of the steps or of the time, in [0, 1]. config: TrainConfig, of which lr and warmup count.
    Returns:
        float.
    Example:
        rate_at(0.5, TrainConfig("detector", lr=5e-4))  # 0.00025
    """
    return max(config.lr * min(1.0, share / config.warmup if config.warmup else 1.0) * (1 - share), config.lr * 1e-3)


def _epoch(config, rows, template, epoch):
    rng = random.Random(f"{config.seed}-{epoch}")
    drawn = data.balance(rows, len(rows), config.balance, _factors(config.source_weights, "source_weights"),
                         seed=config.seed * 1000 + epoch)
    if config.kind == "detector":
        examples = detector_examples(drawn, template, config.answer_only, config.augment, rng, config.dilute)
    else:
        examples = detoxifier_examples(drawn, template)
    if not examples:
        raise DataError(f"train: data must hold usable rows, got {len(rows)} rows and no example. Accepted answers must "
                        f"have at most {config.rewrite_tokens} tokens.")
    return batches(examples, config.batch_tokens, rng)


def _device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("train: device cuda must have a GPU that PyTorch sees, got none. Use --device auto.")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def _start_from(model, path):
    """Copy trained weights into a new model. What a wider or deeper one has more starts as it would alone: its adapters add nothing at first."""
    source = load(WEIGHTS / f"{model.config.kind}.gguf" if path == "shipped" else path, "cpu")
    tensors, mine, theirs, ours = source.trained(), model.trained(), source.config, model.config
    deeper = tensors.keys() < mine.keys() and theirs.kind == "detector"
    if not (deeper or tensors.keys() == mine.keys()) or theirs.rank > ours.rank or any(
            value.shape != _first_ranks(name, mine[name], theirs.rank).shape for name, value in tensors.items()):
        raise ModelError(f"train: init must have this model's tensors, got others in {path}. Use the same backbone, and no more blocks or ranks.")
    rescaled = theirs.alpha / theirs.rank / (ours.alpha / ours.rank) if ours.rank else 1  # an adapter adds alpha / rank B A
    with torch.no_grad():
        for name, value in tensors.items():
            if not (deeper and name.startswith("head.")):  # the head reads other states now: it starts at zero
                _first_ranks(name, mine[name], theirs.rank).copy_(value * rescaled if ".lora_B." in name else value)


def _first_ranks(name, tensor, rank):
    """The part of an adapter's tensor, A (r, in) or B (out, r), that belongs to its first ranks; of another tensor all."""
    return tensor[:rank] if ".lora_A." in name else tensor[:, :rank] if ".lora_B." in name else tensor


def _checkpoint(out, config, fingerprint, model, optimizer, step, spent_s, tokens):
    state = {"config": _identity(config), "fingerprint": fingerprint, "step": step, "spent_s": spent_s, "tokens": tokens, "optimizer": optimizer.state_dict(),
             "model": {name: value.detach() for name, value in model.trained().items()}}
    with whole_file(out / "checkpoint.pt") as partial:
        torch.save(state, partial)


def _resume(out, config, fingerprint, model, optimizer):
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0, 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # weights_only: a checkpoint can't run code
    except Exception as error:  # a parser of whatever the file holds: any error of its is the file's
        raise ModelError(f"train: {path} must be a whole checkpoint, got {type(error).__name__}. Delete it to start anew.") from None
    if not isinstance(state, dict) or "config" not in state:
        raise ModelError(f"train: {path} must be a checkpoint of protector train, got another file of PyTorch. Move it or change --out.")
    if (state["config"], state.get("fingerprint")) != (_identity(config), fingerprint):
        raise ModelError(f"train: {path} must be of this configuration and these rows, got others. Delete it or change --out.")
    with torch.no_grad():
        for name, value in model.trained().items():
            value.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    print(f"goes on from step {state['step']}", file=sys.stderr)
    return state["step"], state["spent_s"], state["tokens"]


def _cut_log(path, step):
    """Drop the log's lines of steps that are run again, or of an earlier run."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:step]  # a line per step
        path.write_text("".join(lines))


def _identity(config):
    """What must not change between the parts of one run."""
    return json.dumps({**asdict(config), "out": "", "threads": 0, "checkpoint_s": 0, "device": "", "compile": False}, sort_keys=True)


def _describe(config, rows, device, bf16, model):
    import transformers

    return {"config": asdict(config), "rows": len(rows), "rows_by_source": dict(Counter(row.source for row in rows)),
            "fingerprint": data.fingerprint(rows), "device": str(device), "bf16": bf16,
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "trained_parameters": sum(value.numel() for value in model.trained().values()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}, "commit": record.commit() or ""}
