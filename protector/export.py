"""From a trained folder to a file that guards: canaries, GGUF, calibration; and to checkpoints for other servers."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import calibrate, data, gguf
from .base import WEIGHTS
from .canaries import CANARIES, canary_scores
from .errors import DataError, ModelError


def canaries_of(detector):
    """CANARIES with this detector's scores, as the file carries them.

    Raises:
        ModelError: the detector doesn't score every harmful one above every harmless one: it isn't fit to ship.
    """
    scores, is_apart = canary_scores(detector, CANARIES)
    if not is_apart:
        raise ModelError("export: detector must score its harmful canaries above the harmless ones, got "
                         f"{', '.join(f'{score:.3f}' for score in scores)}. Train it longer.")
    return [{"question": q, "answer": a, "label": label, "score": round(float(score), 6)}
            for (q, a, label), score in zip(CANARIES, scores)]


MEANT = 0.8  # the score that is to mean its own share of harmful answers where the temperature is given


def fit_platt(config):
    """T and b for `export --temperature --shift`, fitted on labelled answers that weren't trained on, each source weighing the same.

    Args:
        config: __main__.TemperatureConfig.
    Returns:
        dict with temperature and shift, together; shift_alone, with which a score of 0.8 means 80 % by that fit and the temperature
        stays as it is; and what they were fitted on.
    """
    from .guard import Protector

    by_source = {}
    for pair in data.read(config.data)[0]:
        by_source.setdefault(pair.source, []).append(pair)
    parts = [data.spread(part, config.most) for part in by_source.values()]
    rows, weights = [row for part in parts for row in part], [1 / len(part) for part in parts for _ in part]
    if len({row.label for row in rows}) < 2:
        raise DataError("temperature: data must hold answers of both labels, got one or none. Add labelled answers.")
    guard = Protector(config.detector or None, False, threshold=0.5, on_error="raise", detector_options={"quantisation": "F16"})
    scores = np.array([verdict.score for verdict in guard.guard_batch([(row.question, row.answer) for row in rows])])
    scores = scores.clip(1e-7, 1 - 1e-7)
    temperature, shift = calibrate.fit_platt(np.log(scores) - np.log1p(-scores), [row.label for row in rows], weights)
    meant = math.log(MEANT) - math.log1p(-MEANT)
    return {"temperature": round(temperature, 4), "shift": round(shift, 4), "shift_alone": round(meant - (meant - shift) * temperature, 4),
            "rows": len(rows), "rows_sha256": data.fingerprint(rows)}


def average(folders, weights, out):
    """Average trained weights that come from one another, tensor by tensor, and write them as `protector train` does.

    Args:
        folders: two or more that `protector train` wrote; later ones started from the first (--init), or their LoRA factors don't match.
        weights: one share for each, summing to 1; none for equal ones.
        out: folder to write.
    Returns:
        dict with out, and the share of each folder.
    Raises:
        ValueError: shares that don't fit. ModelError: folders of different shapes.
    Source: Wortsman et al., Model soups, 2022.
    """
    from . import models

    weights = list(weights) or [1 / len(folders)] * len(folders)
    if len(folders) < 2 or len(weights) != len(folders) or not abs(sum(weights) - 1) < 1e-6:  # NaN fails too
        raise ValueError(f"average: weights must be one for each of two or more folders and sum to 1, got {len(folders)} folders and {weights}.")
    parts = [models.load(folder, "cpu") for folder in folders]
    mean, others = parts[0].trained(), [part.trained() for part in parts[1:]]
    if any({name: value.shape for name, value in part.items()} != {name: value.shape for name, value in mean.items()} for part in others):
        raise ModelError("average: folders must hold models of one kind, depth and rank, got different tensors.")
    for name, value in mean.items():
        value.data = weights[0] * value.data + sum(weight * part[name].data for weight, part in zip(weights[1:], others))
    parts[0].save(out)
    return {"out": str(out), "of": dict(zip(map(str, folders), weights))}


_READS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",  # what stands before a layer
          "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}


def refit(folder, out, rank=16, alpha=32.0):
    """Write a fully fine-tuned detector as one with LoRA adapters: the nearest ones of that rank to the change of every linear layer.

        W' diag(g') - W diag(g) = U S V^T,    B A alpha / rank = U_r S_r V_r^T diag(1 / g)

    g and g' are the weights of the norm before the layer, base and trained, or 1: an input of the norm's counts by how much of it comes through.
    The last norm's change is multiplied into the head. With the full rank the scores stay.

    Args:
        folder: a detector of Llama's layers that `protector train --rank 0` wrote. out: folder to write. rank, alpha: of the adapters.
    Returns:
        dict with out, rank, and kept, the share of the squared change of all layers' outputs, for inputs that are alike, that the adapters hold.
    Raises:
        ModelError: another model than a fully fine-tuned detector, or one that changed what adapters can't hold. ValueError: a rank or alpha that isn't above 0.
    Source: Eckart & Young, The approximation of one matrix by another of lower rank, 1936.
    """
    import torch

    from . import models

    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"refit: rank and alpha must be above 0, got {rank} and {alpha}. Choose others.")
    full = models.load(folder, "cpu")
    if full.config.kind != "detector" or full.config.rank:
        raise ModelError(f"refit: {folder} must be a detector trained with --rank 0, got a {full.config.kind} of rank {full.config.rank}.")
    fitted = models.build(replace(full.config, rank=rank, alpha=alpha), local=True)
    theirs, bare = full.backbone, fitted.backbone.get_base_model()
    base = {name.replace(".base_layer", ""): value for name, value in bare.named_parameters()}
    held = re.compile(rf"(^|\.)({'|'.join(('norm', *_READS.values(), *models.LORA_TARGETS))})\.weight$")
    lost = [name for name, value in theirs.named_parameters() if not held.search(name) and not torch.equal(value, base[name])]
    if lost or bare.config.model_type.startswith("gemma"):  # whose norms scale by 1 + g
        raise ModelError(f"refit: adapters must hold what the training changed, got {', '.join(lost) or bare.config.model_type}. Export it with --format hf.")
    change_of, kept_of = 0.0, 0.0
    with torch.no_grad():
        for name, layer in bare.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            block, _, kind = name.rpartition(".")
            wanted, weight, scale = theirs.get_submodule(name).weight, layer.base_layer.weight, 1.0
            if kind in _READS:
                norm = f"{block.rpartition('.')[0]}.{_READS[kind]}"
                gain = bare.get_submodule(norm).weight
                wanted, weight, scale = wanted * theirs.get_submodule(norm).weight, weight * gain, _unlike_zero(gain)
            u, s, v = torch.linalg.svd(wanted - weight, full_matrices=False)
            root = (s[:rank] * (rank / alpha)).sqrt()
            down, up = layer.lora_A["default"].weight.zero_(), layer.lora_B["default"].weight.zero_()  # (rank, in), (out, rank)
            down[:len(root)], up[:, :len(root)] = root[:, None] * v[:rank] / scale, u[:, :rank] * root
            change_of, kept_of = change_of + float(s.square().sum()), kept_of + float(s[:rank].square().sum())
        fitted.head.weight.copy_(full.head.weight * theirs.norm.weight / _unlike_zero(bare.norm.weight))
        fitted.head.bias.copy_(full.head.bias)
    fitted.save(out)
    return {"out": str(out), "rank": rank, "kept": round(kept_of / change_of, 4) if change_of else 1.0}


def _unlike_zero(weight):
    """A norm's weights to divide by: through those that are 0 nothing comes."""
    return weight.where(weight.abs() > 1e-6, weight.new_tensor(1e-6))


def export(model, out, format="adapter", quantisation="Q8_0", base=None, temperature=1.0, shift=0.0):
    """Write a trained folder as GGUF, or as a plain Hugging Face checkpoint.

    Args:
        model: folder that train.train wrote, or an adapter GGUF of the default base. out: file to write; a folder for "hf".
        format: "adapter", "merged" or "hf".
        quantisation: of a merged file. base: base GGUF; the default base if None.
        temperature, shift: of a detector, logit / temperature + shift; they go into the head, so every backend has them.
    Returns:
        dict of what was written.
    """
    from . import models

    if format not in ("adapter", "merged", "hf"):
        raise ValueError(f"export: format must be adapter, merged or hf, got {format}.")
    trained = models.load(model, device="cpu")
    if not 0 < temperature < math.inf:
        raise ValueError(f"export: temperature must be a finite number above 0, got {temperature}. Fit one with `protector temperature`.")
    if not math.isfinite(shift):
        raise ValueError(f"export: shift must be a finite number, got {shift}. Fit one with `protector temperature`.")
    if trained.config.kind == "detector":
        trained.head.weight.data /= temperature
        trained.head.bias.data.div_(temperature).add_(shift)
    canaries = canaries_of(trained) if trained.config.kind == "detector" else ()
    if format == "hf":
        return _export_hf(trained, out)
    if format == "adapter":
        metadata = gguf.export_adapter(trained, out, base, canaries)
    else:
        metadata = gguf.export_merged(trained, out, quantisation, base, canaries)
    return {"out": str(out), "format": format, "kind": metadata.kind, "bytes": Path(out).stat().st_size,
            "model_sha256": metadata.model_sha256, "base_sha256": metadata.base_sha256}


def _export_hf(model, out):
    """Write a sequence classifier with one label (detector) or a causal LM (detoxifier) that plain transformers loads.

    Trap: transformers' sequence classifiers have no bias, so it stands in config.json: score = sigmoid(logit + head_bias).
    """
    from transformers import AutoModelForSequenceClassification

    is_detector = model.config.kind == "detector"
    body = model.backbone if is_detector else model.lm
    body = body.merge_and_unload() if model.config.rank else body
    if is_detector:
        config = body.config
        config.num_labels, config.id2label, config.label2id = 1, {0: "harmful"}, {"harmful": 0}
        config.head_bias, config.protector_template = model.head.bias.item(), model.config.template
        # The last id that isn't this one is pooled. No text of a user's can become it.
        config.pad_token_id = model.template.end
        classifier = AutoModelForSequenceClassification.from_config(config)
        setattr(classifier, classifier.base_model_prefix, body)
        classifier.score.weight.data = model.head.weight.data
        body = classifier
    body.save_pretrained(out)
    model.tokenizer.hf.save_pretrained(out)
    files = [path for path in Path(out).iterdir() if path.suffix == ".safetensors"]
    bias = {"head_bias": config.head_bias, "vllm_pooler_config": {"logit_mean": -config.head_bias}} if is_detector else {}  # vLLM subtracts it
    return {"out": str(out), "format": "hf", "kind": model.config.kind, "bytes": sum(path.stat().st_size for path in files), **bias}


def harmless_answers(paths, most):
    """{source: list of Pair} of the harmless rows in these files, those without a label among them, each source thinned to at most `most`, evenly."""
    by_source = {}
    for path in paths:
        for pair in data.read(path, unlabelled=0)[0]:
            if pair.label == 0:
                by_source.setdefault(pair.source, []).append(pair)
    if not by_source:
        raise DataError("calibrate: harmless must hold harmless answers, got none.")
    return {source: data.spread(rows, most) for source, rows in by_source.items()}


def calibrate_file(config):
    """Calibrate a detector for pairs and answers alone, and write it into its file: a GGUF for each quantisation, a folder as it is and in INT8 where that is named.

    Args:
        config: __main__.CalibrateConfig.
    Returns:
        list of calibrations as dicts.
    """
    from .guard import Protector

    path = Path(config.detector) if config.detector else WEIGHTS / "detector.gguf"
    rows = harmless_answers(config.harmless, config.most)
    fingerprint = data.fingerprint([row for part in rows.values() for row in part])
    entries, kept = [], []
    for detector in _as_used(path, config):
        guard = Protector(detector, detoxifier=False, threshold=0.5, on_error="raise")
        scores = {"pair": {}, "answer": {}}
        for source, part in tqdm(rows.items(), desc=detector.quantisation, unit="source"):
            for kind, by_source in scores.items():
                pairs = [(row.question if kind == "pair" else "", row.answer) for row in part]
                by_source[source] = [verdict.score for verdict in guard.guard_batch(pairs)]
        for kind, by_source in scores.items():
            if config.pooled:
                by_source = {"all": sum(by_source.values(), [])}
            entries.append(calibrate.calibrate(detector, by_source, kind, fingerprint, config.fpr, config.confidence))
        kept = detector.calibration
        del guard, detector
    if not entries:  # nothing was asked for: what the file has stays
        return []
    made = {(entry.quantisation, entry.backend, entry.fpr) for entry in entries}
    kept = [entry for entry in kept if (entry["quantisation"], entry["backend"], entry["fpr"]) not in made]
    found = calibrate.as_dicts(entries)
    if path.is_dir():
        (path / "calibration.json").write_text(json.dumps([*kept, *found], indent=1) + "\n")
    else:
        gguf.add_calibration(path, [*kept, *found])
    return found


def _as_used(path, config):
    """The detector as each backend and quantisation runs it, one after the other."""
    from .guard import _loaded

    is_folder = path.is_dir()
    for quantisation in [None] * is_folder + [name for name in config.quantisations if name == "INT8" or not is_folder]:
        yield _loaded("detector", path, "auto", {"quantisation": quantisation, "n_threads": config.threads or None})
