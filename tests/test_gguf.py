"""Files: what stands in them, read by other code than what wrote it, and every way in which they can be wrong."""
import json
import os
import random
import re
import struct
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BLOCKS, D, FF, HEADS, KV_HEADS, canaries_of, read_gguf, rotary_rows, shake

from protector import gguf
from protector.base import whole_file
from protector.calibrate import Calibration
from protector.errors import ModelError
from protector.gguf import add_calibration, export_adapter, export_merged, read_metadata, runnable_base
from protector.models import LORA_TARGETS, ModelConfig, build
from protector.template import Limits

SHORT = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}
SIZES = {"q_proj": (D, D), "k_proj": (D, D // 2), "v_proj": (D, D // 2), "o_proj": (D, D), "gate_proj": (D, FF), "up_proj": (D, FF),
         "down_proj": (FF, D)}  # in, out
ENTRY = Calibration(0.5, 0.01, 0.95, 300, 2, "pair", "llama.cpp", "Q8_0", "m" * 64, "d" * 64)


def array(tensor):
    shape, kind, data = tensor
    return np.frombuffer(data, {0: np.float32, 1: np.float16}[kind]).reshape(shape)


def lora(model, block, name):
    """(A, B) of one target as numpy float32, B's rows in llama.cpp's rotary order."""
    found = {}
    for key, value in model.trained().items():
        if f"layers.{block}." in key and f".{name}." in key:
            found["A" if "lora_A" in key else "B"] = value.detach().numpy()
    rows = {"q_proj": rotary_rows(HEADS), "k_proj": rotary_rows(KV_HEADS)}.get(name)
    return found["A"], found["B"] if rows is None else found["B"][rows]


def rewrite(source, target, fields=(), drop=(), tensors=()):
    """A copy of an adapter file with other keys {name: value} or tensors; the package under test has no part in it."""
    import gguf as writer_package

    reader = writer_package.GGUFReader(source)
    writer = writer_package.GGUFWriter(target, "llama")
    fields = dict(fields)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        value, kind = field.contents(), field.types[0]
        if name in fields:
            value = fields[name]
            kind = {str: writer_package.GGUFValueType.STRING, list: writer_package.GGUFValueType.ARRAY}.get(type(value), kind)
        inner = field.types[-1]
        if kind == writer_package.GGUFValueType.ARRAY and value and isinstance(value[0], str):
            inner = writer_package.GGUFValueType.STRING
        writer.add_key_value(name, value, kind, inner if kind == writer_package.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        kind = tensor.tensor_type if tensor.data.dtype == np.uint8 else None  # of quantised bytes
        writer.add_tensor(tensor.name, dict(tensors).get(tensor.name, np.array(tensor.data)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def resigned(source, target, **change):
    """A copy whose digest fits again: what a careful forger, or a bug at export, would write."""
    metadata = replace(read_metadata(source), **change)
    old, tensors = read_gguf(source)
    digest = gguf.model_sha256(metadata, {name: array(tensor) for name, tensor in tensors.items()}, old["adapter.lora.alpha"])
    fields = {"protector.model_sha256": digest, "protector.base_sha256": metadata.base_sha256, "protector.kind": metadata.kind,
              "protector.depth": metadata.depth}
    if metadata.head_weight is not None:
        fields |= {"protector.head.weight": [float(x) for x in metadata.head_weight], "protector.head.bias": metadata.head_bias,
                   "protector.canaries": json.dumps(metadata.canaries)}
    return rewrite(source, target, fields)


# -- adapters

def test_rotary_order_by_hand():
    # Two heads of four rows. Hugging Face turns row i with row i + 2 of a head, llama.cpp neighbours: 0 2 1 3, 4 6 5 7.
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    assert gguf._rope_order(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf._rope_order(np.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.arange(D)[rotary_rows(HEADS)].tolist() == gguf._rope_order(np.arange(D), HEADS).tolist()


def test_adapter_file(detector_gguf, torch_detector, tiny):
    import hashlib

    fields, tensors = read_gguf(detector_gguf)
    assert {key: fields[key] for key in fields if not key.startswith("protector.")} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    head = torch_detector.head
    assert fields["protector.format_version"] == 1 and fields["protector.kind"] == "detector" and fields["protector.depth"] == BLOCKS
    assert fields["protector.template"] == "chatml-1" and fields["protector.pooling"] == "last"
    assert json.loads(fields["protector.limits"]) == asdict(Limits())
    assert fields["protector.base_sha256"] == hashlib.sha256(tiny.gguf.read_bytes()).hexdigest()
    assert fields["protector.head.weight"] == head.weight[0].tolist() and fields["protector.head.bias"] == head.bias.item()
    assert json.loads(fields["protector.canaries"]) == canaries_of(torch_detector) and fields["protector.calibration"] == "[]"
    assert len(tensors) == 2 * BLOCKS * len(LORA_TARGETS)
    for block in range(BLOCKS):
        for name in LORA_TARGETS:
            a, b = (array(tensors[f"blk.{block}.{SHORT[name]}.weight.lora_{part}"]) for part in "ab")
            assert a.shape == (4, SIZES[name][0]) and b.shape == (SIZES[name][1], 4) and a.dtype == np.float16
            expected = lora(torch_detector, block, name)
            assert np.array_equal(a, expected[0]) and np.array_equal(b, expected[1]), name


def test_metadata_round_trip(detector_gguf, detoxifier_gguf, torch_detector, tiny, tmp_path):
    metadata = read_metadata(detector_gguf)
    assert (metadata.kind, metadata.depth, metadata.limits, metadata.merged) == ("detector", BLOCKS, Limits(), False)
    assert np.array_equal(metadata.head_weight, torch_detector.head.weight.detach().numpy()[0])
    assert metadata.head_bias == torch_detector.head.bias.item() and list(metadata.canaries) == canaries_of(torch_detector)
    assert read_metadata(detoxifier_gguf).kind == "detoxifier" and read_metadata(detoxifier_gguf).head_weight is None
    # the same model gives the same file; any other head, tensor or limit another digest
    again = export_adapter(torch_detector, tmp_path / "again.gguf", tiny.gguf, canaries_of(torch_detector))
    assert (tmp_path / "again.gguf").read_bytes() == detector_gguf.read_bytes() and again.model_sha256 == metadata.model_sha256
    for change in ({"head_bias": 0.5}, {"depth": 3}, {"limits": Limits(window=100)}, {"base_sha256": "0" * 64}, {"kind": "detoxifier"},
                   {"head_weight": -metadata.head_weight}):
        assert gguf.model_sha256(replace(metadata, **change), {}) != gguf.model_sha256(metadata, {})
    assert gguf.model_sha256(metadata, {}, 8.0) != gguf.model_sha256(metadata, {}, 16.0)


def test_an_adapter_read_back_is_the_model(detector_gguf, detoxifier_gguf, torch_detector, torch_detoxifier):
    for path, model in ((detector_gguf, torch_detector), (detoxifier_gguf, torch_detoxifier)):
        modules, alpha = gguf.read_adapter(path, HEADS, KV_HEADS)
        assert alpha == 8.0 and len(modules) == BLOCKS * len(LORA_TARGETS)
        for name, value in model.trained().items():
            if ".lora_" in name:
                module, = (module for module in modules if module + "." in name)
                assert np.array_equal(value.detach().numpy(), modules[module]["lora_B" in name])


def test_a_file_is_whole_or_absent(torch_detector, tiny, tmp_path, monkeypatch):
    import gguf as writer_package

    monkeypatch.setattr(writer_package.GGUFWriter, "write_tensors_to_file", lambda self: 1 / 0)
    (tmp_path / "old.gguf").write_bytes(b"old")
    for name in ("new.gguf", "old.gguf"):
        with pytest.raises(ZeroDivisionError):
            export_adapter(torch_detector, tmp_path / name, tiny.gguf)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"] and (tmp_path / "old.gguf").read_bytes() == b"old"


def test_a_whole_file_is_as_private_as_its_umask_or_the_one_before(tmp_path):
    """Regression: all were readable for everybody."""
    mask = os.umask(0o077)
    try:
        with whole_file(tmp_path / "new") as partial:
            Path(partial).write_text("x")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    with whole_file(tmp_path / "new") as partial:
        Path(partial).write_text("y")
    assert ((tmp_path / "new").stat().st_mode & 0o777, (tmp_path / "new").read_text()) == (0o600, "y")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# -- whole models

def test_merged_weights_are_base_plus_adapter(torch_detector, tiny, tmp_path):
    path = tmp_path / "new folder" / "merged.gguf"
    metadata = export_merged(torch_detector, path, "F32", tiny.gguf, canaries_of(torch_detector))
    fields, tensors = read_gguf(path)
    _, base = read_gguf(tiny.gguf)
    assert tensors.keys() == base.keys() | {"output.weight"} and fields["general.file_type"] == 0 and fields["llama.block_count"] == BLOCKS
    assert np.array_equal(array(tensors["output.weight"]), np.eye(*array(base["token_embd.weight"]).shape)) and fields["output.identity"] is True
    for block in range(BLOCKS):
        for name in LORA_TARGETS:
            tensor = f"blk.{block}.{SHORT[name]}.weight"
            a, b = lora(torch_detector, block, name)
            expected = array(base[tensor]).astype(np.float64) + 8.0 / 4 * (b.astype(np.float64) @ a)
            # one float32 rounding of the product's sum of 4 and one of the sum, values below 4
            assert np.abs(array(tensors[tensor]) - expected).max() < 4 * 2**-22
    assert np.array_equal(array(tensors["token_embd.weight"]), array(base["token_embd.weight"]))
    again = read_metadata(path)
    assert again.merged and again.model_sha256 == metadata.model_sha256 and again.canaries == metadata.canaries
    assert again.quantisation == metadata.quantisation == "F32"
    assert fields["tokenizer.ggml.pre"] == "smollm" and len(fields["tokenizer.ggml.merges"]) == 48900
    assert not list(path.parent.glob("*.partial")) and [p.name for p in path.parent.iterdir()] == ["merged.gguf"]
    add_calibration(path, [asdict(ENTRY)])
    assert read_gguf(path)[1] == tensors and read_metadata(path).calibration == (asdict(ENTRY),)
    assert read_gguf(path)[0]["output.identity"] is True  # or its states would be read as embeddings of a false vocabulary


@pytest.mark.parametrize("quantisation, kind, dtype", [("F32", 0, np.float32), ("F16", 1, np.float16), ("Q8_0", 8, np.float16)])
def test_a_detector_runs_on_its_blocks_without_a_vocabulary(torch_detector, tiny, tmp_path, quantisation, kind, dtype):
    adapter = tmp_path / "detector.gguf"
    export_adapter(torch_detector, adapter, tiny.gguf, canaries_of(torch_detector))
    path = gguf.runnable_detector(tiny.gguf, adapter, quantisation)
    fields, tensors = read_gguf(path)
    _, base = read_gguf(tiny.gguf)
    d = array(base["token_embd.weight"]).shape[1]
    assert fields["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in fields
    assert fields["llama.vocab_size"] == d and fields["llama.block_count"] == torch_detector.config.depth and fields["output.identity"] is True
    assert tensors["blk.1.ffn_up.weight"][1] == kind and tensors["token_embd.weight"][0] == (d, d)
    assert np.array_equal(array(tensors["output.weight"]), np.eye(d))
    embedding = np.load(path.with_suffix(".npy"))
    assert embedding.dtype == dtype and np.array_equal(embedding, array(base["token_embd.weight"]).astype(dtype))
    written = path.stat().st_mtime_ns
    assert gguf.runnable_detector(tiny.gguf, adapter, quantisation) == path and path.stat().st_mtime_ns == written
    path.with_suffix(".npy").unlink()
    assert gguf.runnable_detector(tiny.gguf, adapter, quantisation) == path and np.array_equal(np.load(path.with_suffix(".npy")), embedding)


def test_full_fine_tuning_names_every_tensor(tiny):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = shake(build(ModelConfig("detoxifier", tiny.folder, rank=0)))
    tensors = gguf._full_tensors(model)
    _, base = read_gguf(tiny.gguf)
    assert tensors.keys() == base.keys() - {"token_embd.weight"}  # the embedding isn't trained
    assert all(tensors[name].shape == base[name][0] for name in tensors)
    wanted = model.lm.model.layers[2].self_attn.q_proj.weight.detach().numpy()[rotary_rows(HEADS)]
    assert np.array_equal(tensors["blk.2.attn_q.weight"], wanted)
    # An output layer of its own (OpenLLaMA, Vicuna) is trained too and must not be left behind.
    model.lm = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=BLOCKS,
                                            num_attention_heads=2, tie_word_embeddings=False))
    model.lm.get_input_embeddings().requires_grad_(False)
    assert gguf._full_tensors(model)["output.weight"].shape == (32, 8)


def test_a_cut_base_is_the_first_blocks(tiny, cache):
    path = runnable_base(tiny.gguf, 2, "base")
    fields, tensors = read_gguf(path)
    base_fields, base = read_gguf(tiny.gguf)
    assert path.parent == cache and fields == {**base_fields, "llama.block_count": 2}
    assert tensors == {name: value for name, value in base.items() if not name.startswith(("blk.2.", "blk.3."))}
    written = path.stat().st_mtime_ns
    assert runnable_base(tiny.gguf, 2, "base") == path and path.stat().st_mtime_ns == written
    assert runnable_base(tiny.gguf, BLOCKS, "base") == tiny.gguf  # nothing to do, no second copy


@pytest.mark.parametrize("quantisation, kind", [("F16", 1), ("BF16", 30), ("Q8_0", 8), ("Q4_0", 2)])
def test_quantised_bases(tiny, quantisation, kind):
    fields, tensors = read_gguf(runnable_base(tiny.gguf, BLOCKS, quantisation))
    assert tensors["blk.1.ffn_up.weight"][1] == kind and tensors["output_norm.weight"][1] == 0
    if quantisation == "F16":
        base = array(read_gguf(tiny.gguf)[1]["blk.1.ffn_up.weight"])
        assert np.array_equal(array(tensors["blk.1.ffn_up.weight"]), base.astype(np.float16))


def test_wrong_calls(tiny, torch_detector, tmp_path):
    with pytest.raises(ValueError) as error:
        runnable_base(tiny.gguf, 2, "Q3")
    assert str(error.value) == "runnable_base: quantisation must be one of F32, F16, BF16, Q4_0, Q8_0 or base, got Q3."
    for depth in (0, BLOCKS + 1):
        with pytest.raises(ModelError) as error:
            runnable_base(tiny.gguf, depth, "base")
        assert str(error.value) == (f"runnable_base: depth must be 1 to {BLOCKS} for {tiny.gguf}, got {depth}. Use the base that the "
                                    "adapter was trained on.")
    adapter = export_adapter(torch_detector, tmp_path / "x" / "a.gguf", tiny.gguf) and tmp_path / "x" / "a.gguf"
    with pytest.raises(ModelError) as error:
        runnable_base(adapter, 2, "base")
    assert str(error.value) == f"runnable_base: {adapter} must be a model with a number of blocks, got none. Pass a base model."
    with pytest.raises(ValueError) as error:
        export_merged(torch_detector, tmp_path / "m.gguf", "Q3", tiny.gguf)
    assert str(error.value) == "export_merged: quantisation must be one of F32, F16, BF16, Q4_0, Q8_0, got Q3."
    full = build(ModelConfig("detector", tiny.folder, rank=0, depth=1))
    with pytest.raises(ModelError) as error:
        export_adapter(full, tmp_path / "a.gguf", tiny.gguf)
    assert str(error.value) == "export_adapter: model must have LoRA adapters, got full fine-tuning. Export it merged."
    other = build(ModelConfig("detector", tiny.folder, rank=2, depth=1))
    other.backbone.config.model_type = "qwen3"
    for export in (export_adapter, export_merged):
        with pytest.raises(ModelError) as error:
            export(other, tmp_path / "a.gguf", base=tiny.gguf)
        assert str(error.value) == ("export: backbone must be of the llama architecture, got qwen3. Use `export --format hf`, or "
                                    "llama.cpp's own converter.")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# -- calibration

def test_calibration_is_added_and_nothing_else_changes(detector_gguf, tmp_path):
    path = tmp_path / "detector.gguf"
    path.write_bytes(detector_gguf.read_bytes())
    before_fields, before = read_gguf(path)
    for entries in ([asdict(ENTRY)], [asdict(replace(ENTRY, quantisation="F16")), asdict(ENTRY)], []):
        add_calibration(path, entries)
        fields, tensors = read_gguf(path)
        assert tensors == before and list(tensors) == list(before)
        assert json.loads(fields.pop("protector.calibration")) == entries
        assert fields == {key: value for key, value in before_fields.items() if key != "protector.calibration"}
        assert read_metadata(path).calibration == tuple(entries)
    assert path.read_bytes() == detector_gguf.read_bytes() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_detoxifier_has_no_calibration(detoxifier_gguf, tmp_path):
    """Regression: the file was written anew without it, and nothing said so."""
    path = tmp_path / "detoxifier.gguf"
    path.write_bytes(detoxifier_gguf.read_bytes())
    with pytest.raises(ModelError) as error:
        add_calibration(path, [asdict(ENTRY)])
    assert str(error.value) == f"add_calibration: {path} must be a detector, got a detoxifier. Pass the other file."
    assert path.read_bytes() == detoxifier_gguf.read_bytes()


# -- wrong files: an error that says what to do, never a number

HEAD = "must have a finite head that isn't zero. Export it again."
LISTS = "must have readable limits, canaries and calibration. Export it again."
WRONG = [
    ({"protector.format_version": 2}, "must have format version 1 and template chatml-1, got 2 and chatml-1. Export it again with this version."),
    ({"protector.template": "chatml-9"}, "must have format version 1 and template chatml-1, got 1 and chatml-9. Export it again with this version."),
    ({"protector.format_version": "1"}, "must have protector.format_version as int, got str. Export it again."),
    ({"protector.kind": "judge"}, "must be a detector or a detoxifier, got judge. Export it again."),
    ({"protector.pooling": "mean"}, "must pool at the last token, got mean. Export it again."),
    ({"protector.head.weight": [0.0] * D}, HEAD),
    ({"protector.head.weight": [float("nan")] + [1.0] * (D - 1)}, HEAD),
    ({"protector.head.weight": [float("inf")] * D}, HEAD),
    ({"protector.head.weight": ["1"] * D}, HEAD),
    ({"protector.head.weight": "1"}, "must have protector.head.weight as list, got str. Export it again."),
    ({"protector.head.bias": float("nan")}, HEAD),
    ({"protector.head.bias": "0"}, "must have protector.head.bias as float, got str. Export it again."),
    ({"protector.limits": "{"}, LISTS), ({"protector.limits": "[]"}, LISTS), ({"protector.limits": '{"window": 1, "overlap": 2}'}, LISTS),
    ({"protector.canaries": "{"}, LISTS), ({"protector.canaries": "[1]"}, LISTS), ({"protector.canaries": '[{"question": "q"}]'}, LISTS),
    ({"protector.canaries": "7"}, LISTS), ({"protector.canaries": "[" * 100_000}, LISTS), ({"protector.limits": "[" * 100_000}, LISTS), ({"protector.calibration": '[{"threshold": 0.5}]'}, LISTS), ({"protector.calibration": "5"}, LISTS),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_m50_wrong_keys(detector_gguf, tmp_path, fields, message):
    path = rewrite(detector_gguf, tmp_path / "wrong.gguf", fields)
    with pytest.raises(ModelError) as error:
        read_metadata(path)
    assert str(error.value) == f"read_metadata: {path} {message}"


CONTENTS = "must have the contents that its protector.model_sha256 names, got others. Copy or export it again."


def test_m50_m54_changed_contents(detector_gguf, tmp_path):
    # Digest left as it was: a bit of a tensor, the sign of the head, the limits, the depth, the base.
    head = read_metadata(detector_gguf).head_weight
    name = "blk.0.attn_q.weight.lora_b"
    tensor = array(read_gguf(detector_gguf)[1][name]).copy()
    tensor[0, 0] += 1
    flipped = [float(-x) for x in head]
    for i, (fields, tensors) in enumerate([({}, {name: tensor}), ({"protector.head.weight": flipped}, {}), ({"protector.head.bias": 9.0}, {}),
                                           ({"protector.limits": json.dumps(asdict(Limits(window=99)))}, {}), ({"protector.depth": 3}, {}),
                                           ({"protector.base_sha256": "0" * 64}, {}), ({"protector.model_sha256": "0" * 64}, {})]):
        path = rewrite(detector_gguf, tmp_path / f"changed{i}.gguf", fields, tensors=tensors)
        with pytest.raises(ModelError) as error:
            read_metadata(path)
        assert str(error.value) == f"read_metadata: {path} {CONTENTS}"
    assert read_metadata(rewrite(detector_gguf, tmp_path / "same.gguf")).kind == "detector"
    with pytest.raises(ModelError, match=CONTENTS):
        read_metadata(rewrite(detector_gguf, tmp_path / "empty.gguf", drop=set(read_gguf(detector_gguf)[1])))


def test_m50_m54_changed_contents_of_a_merged_file(torch_detector, tiny, tmp_path):
    """Regression: nothing of a whole model was compared with its digest: head.bias + 0.3 loaded, and kept the calibration."""
    whole = tmp_path / "merged.gguf"
    export_merged(torch_detector, whole, "Q8_0", tiny.gguf, canaries_of(torch_detector))
    add_calibration(whole, [asdict(ENTRY)])
    metadata = read_metadata(whole)
    assert metadata.calibration == (asdict(ENTRY),) and read_metadata(rewrite(whole, tmp_path / "same.gguf")) is not None
    tensor = {t.name: np.array(t.data) for t in gguf._reader(whole).tensors}["output_norm.weight"]
    for i, (fields, tensors) in enumerate([
            ({"protector.head.bias": metadata.head_bias + 0.3}, {}), ({"protector.limits": json.dumps(asdict(Limits(window=99)))}, {}),
            ({"llama.rope.freq_base": 20000.0}, {}), ({}, {"output_norm.weight": tensor * 2}), ({"protector.model_sha256": "0" * 64}, {})]):
        path = rewrite(whole, tmp_path / f"changed{i}.gguf", fields, tensors=tensors)
        with pytest.raises(ModelError) as error:
            read_metadata(path)
        assert str(error.value) == f"read_metadata: {path} {CONTENTS}"


@pytest.mark.parametrize("key", ["format_version", "kind", "template", "limits", "depth", "base_sha256", "model_sha256", "pooling",
                                 "head.weight", "head.bias"])
def test_m50_a_missing_key(detector_gguf, tmp_path, key):
    path = rewrite(detector_gguf, tmp_path / "wrong.gguf", drop={f"protector.{key}"})
    with pytest.raises(ModelError) as error:
        read_metadata(path)
    assert str(error.value) == (f"read_metadata: {path} must have the key protector.{key}, got none. Use a file that "
                                "`protector export` wrote.")


def test_m50_files_that_are_none(tiny, tmp_path):
    with pytest.raises(ModelError) as error:
        read_metadata(tmp_path / "none.gguf")
    assert str(error.value) == f"read_metadata: {tmp_path / 'none.gguf'} must exist, got no file. Check the path."
    with pytest.raises(ModelError, match=r"must have the key protector\.format_version, got none"):
        read_metadata(tiny.gguf)  # a model, but none of ours
    for content in (b"", b"GGUF", b"junk" * 100, b"\x00" * 64, b"GGUF" + b"\xff" * 60):
        path = tmp_path / "junk.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=rf"^read_metadata: {path} must be a whole GGUF file, got \w+\. Copy or export it again\.$"):
            read_metadata(path)
    with pytest.raises(ModelError):
        read_metadata(tmp_path)


def test_m50_a_cut_file_never_loads(detector_gguf, tmp_path):
    whole, path = detector_gguf.read_bytes(), tmp_path / "cut.gguf"
    rng = random.Random(3)
    for size in sorted({rng.randrange(len(whole)) for _ in range(40)} | {len(whole) - 1, len(whole) - 64, len(whole) // 2}):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_metadata(path)


def test_m55_a_flipped_byte_is_an_error_or_changes_nothing(detector_gguf, tmp_path):
    # Keys that no score depends on (names of the file, canaries, calibration, padding) may change; all else is noticed.
    whole, path, rng = detector_gguf.read_bytes(), tmp_path / "flipped.gguf", random.Random(4)
    expected, survived = read_metadata(detector_gguf), 0
    for at in [rng.randrange(9000) for _ in range(120)] + [rng.randrange(len(whole)) for _ in range(40)]:
        content = bytearray(whole)
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            metadata = read_metadata(path)
        except ModelError:
            continue
        survived += 1
        assert (metadata.kind, metadata.depth, metadata.limits, metadata.head_bias, metadata.model_sha256) == (
            expected.kind, expected.depth, expected.limits, expected.head_bias, expected.model_sha256)
        assert np.array_equal(metadata.head_weight, expected.head_weight)
    assert survived < 80


@pytest.mark.parametrize("value", [2**60, 2**63 - 1, 2**31, 3_000_000])
@pytest.mark.parametrize("place", ["tensors", "keys", "length of a key", "length of an array", "length of a string"])
def test_m55_a_file_that_claims_more_than_it_holds_is_an_error_at_once(detector_gguf, tmp_path, place, value):
    """Regression: an array of 2^60 entries was read past the file's end until memory ran out."""
    content, path = bytearray(detector_gguf.read_bytes()), tmp_path / "long.gguf"
    array = content.index(b"protector.head.weight") + len("protector.head.weight") + 8  # behind the types of value and entries
    string = content.index(b"protector.limits") + len("protector.limits") + 4
    at = {"tensors": 8, "keys": 16, "length of a key": 24, "length of an array": array, "length of a string": string}[place]
    struct.pack_into("<Q", content, at, value)
    path.write_bytes(content + bytes(-len(content) % 8))
    start = time.process_time()
    with pytest.raises(ModelError, match=rf"^read_metadata: {path} must be a whole GGUF file, got \w+\."):
        read_metadata(path)
    assert time.process_time() - start < 2


def test_m55_a_string_that_is_not_utf8_is_an_error(detector_gguf, tmp_path):
    """Regression: UnicodeDecodeError."""
    content = detector_gguf.read_bytes()
    assert content.count(b"adapter") > 2
    for found in re.finditer(rb"general\.type.{12}(?=adapter)", content, re.DOTALL):
        (tmp_path / "odd.gguf").write_bytes(content[:found.end()] + b"\xff" + content[found.end() + 1:])
    with pytest.raises(ModelError, match="must have an adapter's keys"):
        read_metadata(tmp_path / "odd.gguf")


def test_m55_a_merged_file_of_an_odd_type_is_an_error(torch_detector, tiny, tmp_path):
    """Regression: TypeError, an array is no key."""
    export_merged(torch_detector, tmp_path / "merged.gguf", "F32", tiny.gguf, canaries_of(torch_detector))
    with pytest.raises(ModelError):
        read_metadata(rewrite(tmp_path / "merged.gguf", tmp_path / "odd.gguf", {"general.file_type": [1, 2]}))


ADAPTER = "must have an adapter's keys and pairs of matrices, got others. Export it again."
A = "blk.0.attn_q.weight.lora_a"


@pytest.mark.parametrize("change", [
    {"fields": {"adapter.lora.alpha": "8"}}, {"fields": {"adapter.lora.alpha": float("nan")}}, {"fields": {"adapter.lora.alpha": float("inf")}},
    {"fields": {"adapter.type": ["lora"]}}, {"fields": {"general.type": ["adapter"]}}, {"drop": {"adapter.lora.alpha"}}, {"drop": {"general.type"}},
    {"tensors": {A: np.zeros((3, D), np.float16)}}, {"tensors": {A: np.zeros((0, D), np.float16)}}, {"tensors": {A: np.zeros(D, np.float16)}},
    {"tensors": {A: np.zeros((4, D), np.int8)}}, {"tensors": {A: np.zeros((1, 4, D), np.float32)}}])
def test_m55_an_adapter_has_its_keys_and_pairs_and_nothing_else(detector_gguf, tmp_path, change):
    """llama.cpp ends the process where a key of an adapter has another type."""
    path = rewrite(detector_gguf, tmp_path / "odd.gguf", change.get("fields", ()), change.get("drop", ()), change.get("tensors", ()))
    with pytest.raises(ModelError) as error:
        read_metadata(path)
    assert ADAPTER in str(error.value) or "must be a whole GGUF file" in str(error.value)
