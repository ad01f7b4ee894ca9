"""GGUF files: adapters with what a score means, base files cut to a depth, merged single files.

An adapter file is a llama.cpp LoRA adapter (tensors <name>.lora_a, <name>.lora_b) with these keys beside llama.cpp's own:

    protector.format_version   uint32   1
    protector.kind             string   detector | detoxifier
    protector.template         string   template.TEMPLATE_ID
    protector.limits           string   JSON of template.Limits
    protector.depth            uint32   blocks of the base that it runs on
    protector.base_sha256      string   of the base GGUF file
    protector.model_sha256     string   of tensors, head, template, limits, depth and base (of a merged file all other keys, too):
                                        what a score depends on
    protector.pooling          string   last
    protector.head.weight      float32[d]   detector only, as are the rest
    protector.head.bias        float32
    protector.canaries         string   JSON: [{question, answer, label, score}], scored in PyTorch fp32 at export
    protector.calibration      string   JSON: see calibrate.py

A merged file has the same keys in a whole model. In a merged detector, and in the copy of the blocks that an adapter runs on, an
identity stands where the matrix to the vocabulary was (key output.identity): the first d "logits" are the hidden state. Asked for
embeddings instead, llama.cpp multiplies every token with the vocabulary, a third of 15 blocks' work. The copy has no vocabulary at
all: llama.cpp gets rows of the embedding, and the tokeniser is the base's.
"""
import ctypes
import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .base import base_path, cache_dir, file_sha256, whole_file
from .calibrate import Calibration
from .errors import ModelError
from .template import TEMPLATE_ID, Limits

FORMAT_VERSION = 1
AS_BASE = "base"  # the quantisation that the base file has
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7}  # llama.cpp's numbers (enum llama_ftype)
MAX_ENTRIES, MAX_TENSORS = 2_000_000, 20_000  # of all arrays of a file, most of them a vocabulary's; of a model's tensors
OUTPUT, IDENTITY_OUTPUT = "output.weight", "output.identity"
_PREFIX = "protector."


@dataclass(frozen=True)
class Metadata:
    """The protector.* keys of a GGUF file."""

    kind: str
    depth: int
    base_sha256: str
    model_sha256: str = ""
    limits: Limits = Limits()
    template: str = TEMPLATE_ID
    head_weight: np.ndarray | None = None  # (d,) float32
    head_bias: float = 0.0
    canaries: tuple = ()  # of {question, answer, label, score}
    calibration: tuple = ()  # of calibrate.Calibration as dict
    merged: bool = False  # a whole model, not an adapter
    quantisation: str = ""  # of a merged file


def _reader(path):
    """GGUFReader of a file that is checked to be one."""
    import gguf

    array = int(gguf.GGUFValueType.ARRAY)

    class Reader(gguf.GGUFReader):
        # Traps: beyond the file's end the package goes on reading nothing, for as long as the file says, and it makes an object of
        # each entry of an array. Comparing NumPy's integers with an enum's takes longer than all the rest.
        n_entries = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            dtype = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            stop = offset + dtype.itemsize * int(count)
            if stop > len(self._data):
                raise EOFError
            return self._data[offset:stop].view(dtype)

        def _get_field_parts(self, orig_offs, raw_type):
            if int(raw_type) == array:
                self.n_entries += int(self._get(orig_offs + 4, np.uint64)[0])
                if self.n_entries > MAX_ENTRIES:
                    raise ValueError
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs, count):
            if count > MAX_TENSORS:
                raise ValueError
            return super()._build_tensor_info(offs, count)

        # A slice of np.memmap costs three times a plain array's, and a vocabulary is 200,000 of them: 2.7 s become 1.0 s.
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, value):
            self._data = np.asarray(value)

    try:
        return Reader(path)
    except FileNotFoundError:
        raise ModelError(f"read_metadata: {path} must exist, got no file. Check the path.") from None
    except Exception as error:  # a parser of whatever the file holds: any error of its is the file's
        raise ModelError(f"read_metadata: {path} must be a whole GGUF file, got {type(error).__name__}. "
                         "Copy or export it again.") from None


def read_metadata(path):
    """Read and check the protector.* keys of an adapter or a merged file.

    Args:
        path: a GGUF file.
    Returns:
        Metadata
    Raises:
        ModelError: not a GGUF file, cut, without the keys, of another format or template, or with a head that is
            missing, not finite or zero.
    """
    reader = _reader(path)

    def value(key, kind, default=None):
        field = reader.fields.get(_PREFIX + key)
        if field is None and default is None:
            raise ModelError(f"read_metadata: {path} must have the key {_PREFIX}{key}, got none. Use a file that "
                             "`protector export` wrote.")
        try:
            contents = default if field is None else field.contents()
        except ValueError:  # no UTF-8
            contents = None
        if not isinstance(contents, kind):
            raise ModelError(f"read_metadata: {path} must have {_PREFIX}{key} as {kind.__name__}, got {type(contents).__name__}. "
                             "Export it again.")
        return contents

    version, template = value("format_version", int), value("template", str)
    if version != FORMAT_VERSION or template != TEMPLATE_ID:
        raise ModelError(f"read_metadata: {path} must have format version {FORMAT_VERSION} and template {TEMPLATE_ID}, "
                         f"got {version} and {template}. Export it again with this version.")
    kind, weight, bias = value("kind", str), None, 0.0
    if kind not in ("detector", "detoxifier"):
        raise ModelError(f"read_metadata: {path} must be a detector or a detoxifier, got {kind}. Export it again.")
    if kind == "detector":
        weight = np.array([x if isinstance(x, float) else np.nan for x in value("head.weight", list)], np.float32)
        bias = value("head.bias", float)
        if value("pooling", str) != "last":
            raise ModelError(f"read_metadata: {path} must pool at the last token, got {value('pooling', str)}. Export it again.")
        if not np.isfinite(weight).all() or not np.isfinite(bias) or not weight.any():
            raise ModelError(f"read_metadata: {path} must have a finite head that isn't zero. Export it again.")
    try:
        limits = Limits(**json.loads(value("limits", str)))
        canaries, calibration = json.loads(value("canaries", str, "[]")), json.loads(value("calibration", str, "[]"))
        canaries = tuple({"question": c["question"] + "", "answer": c["answer"] + "", "label": int(c["label"]), "score": float(c["score"])}
                         for c in canaries)
        for entry in calibration:
            Calibration(**entry)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ModelError(f"read_metadata: {path} must have readable limits, canaries and calibration. Export it again.") from None
    merged = not any(tensor.name.endswith((".lora_a", ".lora_b")) for tensor in reader.tensors)
    if not merged:
        _check_adapter(reader, path)
    metadata = Metadata(kind, value("depth", int), value("base_sha256", str), value("model_sha256", str), limits, template,
                        weight, bias, canaries, tuple(calibration), merged, _file_type(reader) if merged else "")
    if _digest(reader, metadata) != metadata.model_sha256:
        raise ModelError(f"read_metadata: {path} must have the contents that its protector.model_sha256 names, got others. "
                         "Copy or export it again.")
    return metadata


def _check_adapter(reader, path):
    """An adapter is what `export_adapter` writes and nothing else: llama.cpp ends the process at a key of another type.

    Raises:
        ModelError: another key, type or shape.
    """
    import gguf

    kinds = {"general.architecture": str, "general.type": str, "adapter.type": str, "adapter.lora.alpha": float}
    keys = {name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", _PREFIX))}
    values, ranks = {name: _contents(field) for name, field in keys.items()}, {}
    for tensor in reader.tensors:
        name, _, half = tensor.name.rpartition(".lora_")
        is_matrix = half in ("a", "b") and tensor.data.ndim == 2 and tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        ranks.setdefault(name, {})[half] = tensor.data.shape["ab".index(half)] if is_matrix else None
    sound = (values.keys() == kinds.keys() and all(isinstance(values[name], kind) for name, kind in kinds.items())
             and np.isfinite(values["adapter.lora.alpha"])
             and all(rank.get("a") and rank.get("a") == rank.get("b") for rank in ranks.values()))
    if not sound:
        raise ModelError(f"read_metadata: {path} must have an adapter's keys and pairs of matrices, got others. Export it again.")


def _contents(field):
    """A key's value; None for a string that isn't UTF-8."""
    try:
        return field.contents()
    except UnicodeDecodeError:
        return None


def _alpha(reader):
    """LoRA alpha of an adapter file; 0 of any other."""
    field = reader.fields.get("adapter.lora.alpha")
    return 0.0 if field is None else float(field.contents())


def _digest(reader, metadata):
    """model_sha256 of what stands in a file: an adapter's tensors, or a whole model's as they are quantised, and all of its own keys."""
    if not metadata.merged:
        return model_sha256(metadata, {tensor.name: tensor.data for tensor in reader.tensors}, _alpha(reader))
    fields = sorted(reader.fields.values(), key=lambda field: field.offset)
    ends = [field.offset for field in fields[1:]] + [tensor.field.offset for tensor in reader.tensors[:1]]
    contents = {field.name: reader.data[field.offset:end] for field, end in zip(fields, ends) if not field.name.startswith(("GGUF.", _PREFIX))}
    contents |= {f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}": tensor.data for tensor in reader.tensors}
    return model_sha256(metadata, contents)


def model_sha256(metadata, tensors, alpha=0.0):
    """Digest of everything that a score depends on, calibration and canaries left out: calibrations refer to it."""
    digest = hashlib.sha256()
    parts = (metadata.kind, metadata.depth, metadata.base_sha256, asdict(metadata.limits), metadata.template, metadata.head_bias, alpha)
    digest.update(json.dumps(parts, sort_keys=True).encode())
    if metadata.head_weight is not None:
        digest.update(np.ascontiguousarray(metadata.head_weight, np.float32).tobytes())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _add_metadata(writer, metadata):
    writer.add_uint32(_PREFIX + "format_version", FORMAT_VERSION)
    writer.add_uint32(_PREFIX + "depth", metadata.depth)
    for key, value in (("kind", metadata.kind), ("template", metadata.template), ("base_sha256", metadata.base_sha256),
                       ("model_sha256", metadata.model_sha256), ("limits", json.dumps(asdict(metadata.limits)))):
        writer.add_string(_PREFIX + key, value)
    if metadata.kind == "detector":
        writer.add_string(_PREFIX + "pooling", "last")
        writer.add_array(_PREFIX + "head.weight", [float(x) for x in metadata.head_weight])
        writer.add_float32(_PREFIX + "head.bias", metadata.head_bias)
        writer.add_string(_PREFIX + "canaries", json.dumps(metadata.canaries))
        writer.add_string(_PREFIX + "calibration", json.dumps(metadata.calibration))


def _write(writer, path):
    with whole_file(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _copy_fields(reader, writer, changed):
    """Copy every key of a file but the ones that the writer sets itself."""
    import gguf

    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed or name.startswith(_PREFIX):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def _copy_model(reader, target, depth, merged=None, n_vocab=None, identity=None):
    """Copy the first `depth` blocks of a GGUF model.

    Args:
        merged: {name: float32 array} in place of the file's own tensors.
        n_vocab: rows of the embedding of a copy without a vocabulary, or None to keep the file's.
        identity: (vocabulary, d) float32 in place of the matrix to the vocabulary, with merged; or None.
    """
    import gguf

    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(None, architecture)
    blocks = f"{architecture}.block_count"
    changed = {blocks, "general.file_type"} if merged else {blocks}
    if n_vocab is not None:
        changed |= {f"{architecture}.vocab_size", *(name for name in reader.fields if name.startswith("tokenizer."))}
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(n_vocab)
    _copy_fields(reader, writer, changed)
    writer.add_uint32(blocks, depth)
    if merged:
        writer.add_file_type(FILE_TYPES["F32"])
    if identity is not None:
        writer.add_bool(IDENTITY_OUTPUT, True)
        writer.add_tensor(OUTPUT, identity)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= depth:
            continue
        if identity is not None and tensor.name == OUTPUT:
            continue
        if merged and tensor.name in merged:
            writer.add_tensor(tensor.name, merged[tensor.name])
        elif merged:  # one type for the whole file; the quantiser makes of it what it was asked for
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _write(writer, target)


def _quantise(source, target, quantisation, identity=False):
    """llama.cpp's own quantiser; a source that is quantised already is allowed (the base ships as Q4_1)."""
    from .engine import llama_cpp
    from .llama import cpu_threads, quiet

    quiet()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = FILE_TYPES[quantisation], True, cpu_threads()
    if identity:  # exact in float16, and states that pass through it aren't rounded to 8 bits
        options.output_tensor_type = FILE_TYPES["F32" if quantisation == "F32" else "F16"]
    with whole_file(target) as partial:
        if llama_cpp.llama_model_quantize(str(source).encode(), partial.encode(), ctypes.byref(options)) != 0:
            raise ModelError(f"export: llama.cpp must quantise {source} to {quantisation}, got an error. Free disk space, or "
                             "use another quantisation.")


def _block_count(reader, path):
    """Number of blocks of a GGUF model."""
    try:
        return int(reader.fields[f"{reader.fields['general.architecture'].contents()}.block_count"].contents())
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"runnable_base: {path} must be a model with a number of blocks, got none. Pass a base model.") from None


def _check_depth(reader, path, depth):
    """Number of blocks of a model that has at least `depth`."""
    n_blocks = _block_count(reader, path)
    if not 0 < depth <= n_blocks:
        raise ModelError(f"runnable_base: depth must be 1 to {n_blocks} for {path}, got {depth}. Use the base that the "
                         "adapter was trained on.")
    return n_blocks


def runnable_base(base, depth, quantisation, adapter=None):
    """The file that a model runs on: the base itself, or its first `depth` blocks in another quantisation, cached.

    Args:
        base: path of the base GGUF.
        depth: blocks to keep.
        quantisation: one of FILE_TYPES, or "base" to copy tensors as they are.
        adapter: adapter GGUF to merge into the copy, or None; not with "base".
    Returns:
        Path
    Raises:
        ModelError: not enough blocks, or llama.cpp can't quantise it.
    """
    if quantisation != AS_BASE and quantisation not in FILE_TYPES:
        raise ValueError(f"runnable_base: quantisation must be one of {', '.join(FILE_TYPES)} or {AS_BASE}, got {quantisation}.")
    origin = f"merged-{read_metadata(adapter).model_sha256[:16]}" if adapter else "base"
    target = cache_dir() / f"{origin}-{file_sha256(base)[:16]}-{depth}-{quantisation}.gguf"
    if target.exists():
        return target
    reader = _reader(base)
    n_blocks = _check_depth(reader, base, depth)
    if depth == n_blocks and quantisation == AS_BASE:
        return Path(base)
    if quantisation == AS_BASE:
        _copy_model(reader, target, depth)
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        cut = Path(folder) / "cut.gguf"
        _copy_model(reader, cut, depth, adapter and _merge(reader, *_adapter_tensors(_reader(adapter))))
        _quantise(cut, target, quantisation)
    return target


def runnable_detector(base, adapter, quantisation):
    """What an adapter's detector runs on, cached: its blocks with the adapter merged, without a vocabulary.

    Args:
        base: path of the base GGUF. adapter: path of the adapter GGUF.
        quantisation: one of FILE_TYPES.
    Returns:
        Path of the GGUF; beside it, with the suffix .npy, the embedding (vocabulary, d), float16 or, for F32, float32.
    Raises:
        ModelError: not the adapter's base, weights that aren't finite, or llama.cpp can't quantise it.
    """
    import gguf

    if quantisation not in FILE_TYPES:
        raise ValueError(f"runnable_detector: quantisation must be one of {', '.join(FILE_TYPES)}, got {quantisation}.")
    metadata = read_metadata(adapter)
    target = cache_dir() / f"detector-{metadata.model_sha256[:16]}-{file_sha256(base)[:16]}-{quantisation}.gguf"
    if target.exists() and target.with_suffix(".npy").exists():
        return target
    reader = _reader(base)
    _check_depth(reader, base, metadata.depth)
    table = {tensor.name: tensor for tensor in reader.tensors}["token_embd.weight"]
    embedding = gguf.quants.dequantize(table.data, table.tensor_type)  # (vocabulary, d)
    d = embedding.shape[1]
    merged = _merge(reader, *_adapter_tensors(_reader(adapter))) | {table.name: np.zeros((d, d), np.float32)}
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        whole = Path(folder) / "whole.gguf"
        _copy_model(reader, whole, metadata.depth, merged, n_vocab=d, identity=np.eye(d, dtype=np.float32))
        with whole_file(target.with_suffix(".npy")) as partial, open(partial, "wb") as file:
            np.save(file, embedding.astype(np.float32 if quantisation == "F32" else np.float16))
        _quantise(whole, target, quantisation, identity=True)  # last: where it stands, the embedding does as well
    return target


def _adapter_tensors(reader):
    """({GGUF name: (A (r, in), B (out, r))} float32, alpha) of an adapter file."""
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return ({name: (tensors[name + ".lora_a"], tensors[name + ".lora_b"]) for name in names},
            _alpha(reader))


def _identity_output(reader):
    """(vocabulary, d) float32 with ones on its diagonal, or None where the vocabulary is smaller than d."""
    n_vocab, d = {tensor.name: tensor for tensor in reader.tensors}["token_embd.weight"].shape[::-1]
    return np.eye(n_vocab, d, dtype=np.float32) if n_vocab >= d else None


def _merge(reader, halves, alpha):
    """{GGUF name: W + alpha/r B A} float32 of a base file and {GGUF name: (A (r, in), B (out, r))}."""
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    merged = {}
    for name, (a, b) in halves.items():
        if name not in tensors or tuple(tensors[name].shape) != (a.shape[1], len(b)):
            raise ModelError(f"load: base must have a tensor {name} of {len(b)} x {a.shape[1]} for the adapter, got none. "
                             "Use the base that it was trained on.")
        merged[name] = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type) + np.float32(alpha / len(a)) * (b @ a)
        if not np.isfinite(merged[name]).all():
            raise ModelError(f"load: adapter must have finite weights, got NaN or infinity in {name}. Copy or export it again.")
    return merged


def _file_type(reader):
    """Name of the quantisation that a model file says it has."""
    field = reader.fields.get("general.file_type")
    number = None if field is None else _contents(field)
    return next((name for name, value in FILE_TYPES.items() if value == number), f"type {number}")


def _rope_order(weight, n_heads):
    """Rows of a q or k projection from Hugging Face's rotary order (halves) to llama.cpp's (pairs)."""
    rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _hf_order(weight, n_heads):
    """Inverse of _rope_order."""
    rows = weight.reshape(n_heads, weight.shape[0] // n_heads // 2, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def read_adapter(path, n_heads, n_kv_heads):
    """LoRA matrices of an adapter file, by the module names of a Hugging Face llama.

    Args:
        path: adapter GGUF. n_heads, n_kv_heads: of the backbone.
    Returns:
        ({"layers.0.self_attn.q_proj": (A (r, in), B (out, r))} float32, alpha)
    """
    import gguf

    reader = _reader(path)
    tensors, alpha = _adapter_tensors(reader)
    depth = int(reader.fields[_PREFIX + "depth"].contents())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth)
    halves = {}
    for block in range(depth):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            module = f"layers.{block}.{module}"
            name = names.get_name("model." + module) + ".weight"
            if name in tensors:
                a, b = tensors[name]
                if module.endswith(("q_proj", "k_proj")):
                    b = _hf_order(b, n_heads if module.endswith("q_proj") else n_kv_heads)
                halves[module] = (a, b)
    return halves, alpha


def _lora_tensors(model):
    """{GGUF name: (A (r, in), B (out, r))} float32 from a PyTorch model with peft adapters."""
    import gguf

    lm_config = (model.backbone if model.config.kind == "detector" else model.lm).config
    if lm_config.model_type != "llama":
        raise ModelError(f"export: backbone must be of the llama architecture, got {lm_config.model_type}. Use "
                         "`export --format hf`, or llama.cpp's own converter.")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.depth)
    halves = {}
    for name, value in model.trained().items():
        if ".lora_" in name:
            module = name.split("base_model.model.")[-1].split(".lora_")[0].removeprefix("model.")
            halves.setdefault(module, {})["a" if ".lora_A." in name else "b"] = value.detach().float().cpu().numpy()
    tensors = {}
    for module, pair in halves.items():
        b = pair["b"]
        if module.endswith(("q_proj", "k_proj")):
            b = _rope_order(b, lm_config.num_attention_heads if module.endswith("q_proj") else lm_config.num_key_value_heads)
        tensors[names.get_name("model." + module) + ".weight"] = (pair["a"], b)
    return tensors


def _metadata_of(model, base, canaries):
    model.check_whole("export")
    detector = model.config.kind == "detector"
    return Metadata(
        model.config.kind, model.config.depth, file_sha256(base), limits=model.config.limits,
        head_weight=model.head.weight.detach().float().cpu().numpy()[0] if detector else None,
        head_bias=float(np.float32(model.head.bias.item())) if detector else 0.0, canaries=tuple(canaries) if detector else ())


def export_adapter(model, path, base=None, canaries=()):
    """Write a trained model's LoRA adapters, head and metadata as one GGUF file.

    Args:
        model: models.HarmDetector or models.ResponseDetoxifier with rank > 0.
        path: file to write; it appears whole or not at all.
        base: the GGUF that the backbone was made from; the default base if None.
        canaries: {question, answer, label, score} with PyTorch scores (detector); see export.canaries_of.
    Returns:
        Metadata
    Raises:
        ModelError: fully fine-tuned (no adapters), or not of the llama architecture.
    """
    import gguf

    if model.config.rank == 0:
        raise ModelError("export_adapter: model must have LoRA adapters, got full fine-tuning. Export it merged.")
    base = base or base_path()
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", model.config.alpha)
    tensors = {}
    for name, (a, b) in _lora_tensors(model).items():
        tensors[name + ".lora_a"], tensors[name + ".lora_b"] = a.astype(np.float16), b.astype(np.float16)
    metadata = _metadata_of(model, base, canaries)
    metadata = replace(metadata, model_sha256=model_sha256(metadata, tensors, float(np.float32(model.config.alpha))))
    _add_metadata(writer, metadata)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    _write(writer, path)
    return metadata


def export_merged(model, path, quantisation="Q8_0", base=None, canaries=()):
    """Write backbone and adapters as one single-file model, with the head in its metadata.

    Args:
        model, path, base, canaries: as in export_adapter; a fully fine-tuned model is welcome.
        quantisation: one of FILE_TYPES.
    Returns:
        Metadata
    """
    base = base or base_path()
    if quantisation not in FILE_TYPES:
        raise ValueError(f"export_merged: quantisation must be one of {', '.join(FILE_TYPES)}, got {quantisation}.")
    reader = _reader(base)
    merged = _merge(reader, _lora_tensors(model), model.config.alpha) if model.config.rank else _full_tensors(model)
    identity = _identity_output(reader) if model.config.kind == "detector" else None
    metadata = replace(_metadata_of(model, base, canaries), merged=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        whole, quantised = Path(folder) / "merged.gguf", Path(folder) / "quantised.gguf"
        _copy_model(reader, whole, model.config.depth, merged, identity=identity)
        _quantise(whole, quantised, quantisation, identity is not None)
        _copy_with(replace(metadata, model_sha256=_digest(_reader(quantised), metadata)), quantised, path)
    return read_metadata(path)


def _full_tensors(model):
    """{GGUF name: float32 array} of a fully fine-tuned model's blocks and final norm."""
    import gguf

    body = model.backbone if model.config.kind == "detector" else model.lm
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.depth)
    tensors = {}
    for name, value in body.named_parameters():
        if value.requires_grad:
            value = value.detach().float().cpu().numpy()
            if ".q_proj." in name or ".k_proj." in name:
                heads = body.config.num_attention_heads if ".q_proj." in name else body.config.num_key_value_heads
                value = _rope_order(value, heads)
            module, suffix = name.rsplit(".", 1)
            # A detector's names begin at the body; an untied lm_head, which is trained as well, stands beside it.
            tensors[f"{names.get_name(module) or names.get_name('model.' + module)}.{suffix}"] = value
    return tensors


def add_calibration(path, entries):
    """Rewrite an exported file with these calibrations in place of its own; tensors are copied byte for byte.

    Args:
        path: a detector's GGUF file.
        entries: calibrate.Calibration as dicts.
    Raises:
        ModelError: it isn't a detector's: a detoxifier has no threshold.
    """
    metadata = read_metadata(path)
    if metadata.kind != "detector":
        raise ModelError(f"add_calibration: {path} must be a detector, got a {metadata.kind}. Pass the other file.")
    _copy_with(replace(metadata, calibration=tuple(entries)), path, path)


def _copy_with(metadata, source, target):
    """Copy a file with these keys of this package in place of its own, and all the rest byte for byte."""
    import gguf

    reader = _reader(source)
    writer = gguf.GGUFWriter(None, reader.fields["general.architecture"].contents())
    _copy_fields(reader, writer, set())
    _add_metadata(writer, metadata)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    del reader  # it maps the file, which may be the one that is replaced
    _write(writer, target)
