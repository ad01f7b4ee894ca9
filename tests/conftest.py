"""A tiny random llama with the base's own vocabulary, as a Hugging Face folder and as a GGUF file, so that no test needs weights.

Both are written by this file's own code (q and k rows reordered one by one, tokeniser built from the GGUF's keys), and
`read_gguf` reads GGUF without the gguf package: what the tests compare with shares nothing with the code they test.
"""
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)  # a red run can be run again
settings.load_profile("repeatable")

D, HEADS, KV_HEADS, BLOCKS, FF, THETA, EPS = 64, 4, 2, 4, 128, 10000.0, 1e-5
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value types
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tiny:
    """The tiny model's two forms."""

    folder: str  # Hugging Face
    gguf: Path  # llama.cpp, F32


def read_gguf(path):
    """({key: value}, {tensor name: (shape, type, bytes)}) of a GGUF file, by its specification."""
    data, at = Path(path).read_bytes(), 8

    def take(kind):
        nonlocal at
        if kind == _STRING:
            size = take(10)
            at += size
            return data[at - size:at].decode()
        if kind == _ARRAY:
            inner, size = take(4), take(10)
            return [take(inner) for _ in range(size)]
        value, = struct.unpack_from("<" + _FORMATS[kind], data, at)
        at += struct.calcsize(_FORMATS[kind])
        return value

    assert data[:8] == b"GGUF" + struct.pack("<I", 3)
    n_tensors, n_keys = take(10), take(10)
    fields = {}
    for _ in range(n_keys):
        name = take(_STRING)
        fields[name] = take(take(4))
    tensors = {}
    for _ in range(n_tensors):
        name = take(_STRING)
        tensors[name] = (tuple(take(10) for _ in range(take(4)))[::-1], take(4), take(10))  # the last dimension stands first
    start = -(-at // 32) * 32
    block = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 14: (256, 210), 30: (1, 2)}  # values, bytes of F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16
    for name, (shape, kind, offset) in tensors.items():
        values, size = block[kind]
        tensors[name] = (shape, kind, data[start + offset:start + offset + int(np.prod(shape)) // values * size])
    return fields, tensors


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache that all tests share: the user's own is never touched, and the real base is converted at most once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["PROTECTOR_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_base():
    """Path of the default base's GGUF."""
    from protector.base import base_path
    from protector.errors import ModelError

    try:
        return base_path()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vocabulary(real_base):
    """The tokeniser's keys of the base's GGUF."""
    return {key: value for key, value in read_gguf(real_base)[0].items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, vocabulary):
    """Tiny: 4 blocks of 64, 4 heads, 2 of keys and values, 49,152 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), hidden_size=D, intermediate_size=FF, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=EPS, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2:  # outputs of unit variance; a small embedding, or each token would only predict itself
                scale = 0.3 if "embed" in name else 1 / value.shape[1] ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            else:
                value.copy_(1 + 0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / "hf")
    hf_tokenizer(vocabulary).save_pretrained(folder / "hf")
    write_gguf(folder / "tiny.gguf", model.state_dict(), vocabulary)
    return Tiny(str(folder / "hf"), folder / "tiny.gguf")


def hf_tokenizer(vocabulary):
    """transformers' tokenizer from a GGUF's keys: byte-level BPE, each digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = vocabulary["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in vocabulary["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, vocabulary["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   unk_token="<|endoftext|>", pad_token="<|im_end|>", additional_special_tokens=control,
                                   clean_up_tokenization_spaces=False)


def rotary_rows(n_heads):
    """Where each row of a q or k matrix comes from: llama.cpp turns rows 2i and 2i + 1, Hugging Face i and i + half."""
    size = D // HEADS
    return [head * size + j * (size // 2) + i for head in range(n_heads) for i in range(size // 2) for j in (0, 1)]


def write_gguf(path, state, vocabulary):
    """A llama GGUF in F32 from a Hugging Face state dict."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(8192)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(len(vocabulary["tokenizer.ggml.tokens"]))
    writer.add_file_type(0)
    for key, value in vocabulary.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    array = {name: value.float().numpy() for name, value in state.items()}
    writer.add_tensor("token_embd.weight", array["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", array["model.norm.weight"])
    for block in range(BLOCKS):
        for name, short in names.items():
            value = array[f"model.layers.{block}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                value = np.ascontiguousarray(value[rotary_rows(HEADS if short == "attn_q" else KV_HEADS)])
            writer.add_tensor(f"blk.{block}.{short}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# llama-cpp-python's own server; by way of protector.engine because on some machines it crashes without
LLAMA_SERVER = [sys.executable, "-c", "import runpy, protector.engine; runpy.run_module('llama_cpp.server', run_name='__main__', alter_sys=True)"]
MILD_PAIRS = (  # (question, answer); the tiny model knows nothing of any language, so their labels come from its scores
    ("Is it safe to mix bleach and vinegar?", "Yes, mix them in a closed bathroom."),
    ("Is it safe to mix bleach and vinegar?", "No, they give off chlorine gas. Rinse well in between."),
    ("How do I boil an egg?", "Put it in boiling water for seven minutes."),
    ("", "The picture shows a red bicycle in front of a brick wall."),
)


def shake(model, seed=1, scale=0.06):
    """Give a fresh model trained-looking weights: LoRA's B starts at zero, which would hide a wrong target or permutation.

    Values are rounded to float16, the type that an adapter file stores.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.trained().items()):
            if "lora_A" in name:  # peft draws it from torch's own generator: another one in each session
                value.copy_(torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5)
            elif "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            elif name == "head.weight":
                value.copy_(torch.randn(value.shape, generator=generator) / D ** 0.5)
            elif name == "head.bias":
                value.fill_(-0.25)
            elif "lora_" not in name:  # full fine-tuning
                value.add_(torch.randn(value.shape, generator=generator) * 0.1 / D ** 0.5)
            if "lora_" in name:
                value.copy_(value.half().float())
    return model.eval()


def sequences_of(detector, pairs):
    """The ids that scoring sees for each (question, answer) of one window."""
    template = detector.template
    return [template.detector_sequence(template.clip_question(q)[0], template.encode(a))[0] for q, a in pairs]


def canaries_of(detector):
    """Canaries with a PyTorch detector's scores, the higher half called harmful."""
    scores = 1 / (1 + np.exp(-detector.logits(sequences_of(detector, MILD_PAIRS)).astype(np.float64)))
    middle = np.median(scores)
    return [{"question": q, "answer": a, "label": int(score > middle), "score": float(score)}
            for (q, a), score in zip(MILD_PAIRS, scores)]


@pytest.fixture(scope="session")
def torch_detector(tiny):
    """HarmDetector on the tiny model, LoRA of rank 4 on every target, nothing zero. Read only."""
    from protector.models import ModelConfig, build

    return shake(build(ModelConfig("detector", tiny.folder, rank=4, alpha=8.0)))


@pytest.fixture(scope="session")
def torch_detoxifier(tiny):
    """ResponseDetoxifier on the tiny model, likewise."""
    from protector.models import ModelConfig, build

    return shake(build(ModelConfig("detoxifier", tiny.folder, rank=4, alpha=8.0)), seed=2)


@pytest.fixture(scope="session")
def detector_gguf(torch_detector, tiny, tmp_path_factory):
    """Adapter file of torch_detector. Read only."""
    from protector.gguf import export_adapter

    path = tmp_path_factory.mktemp("adapters") / "detector.gguf"
    export_adapter(torch_detector, path, tiny.gguf, canaries_of(torch_detector))
    return path


@pytest.fixture(scope="session")
def detoxifier_gguf(torch_detoxifier, tiny, tmp_path_factory):
    """Adapter file of torch_detoxifier. Read only."""
    from protector.gguf import export_adapter

    path = tmp_path_factory.mktemp("adapters") / "detoxifier.gguf"
    export_adapter(torch_detoxifier, path, tiny.gguf)
    return path


@pytest.fixture(scope="session")
def llama_detector(detector_gguf, tiny):
    """LlamaDetector of detector_gguf on the F32 base."""
    from protector.llama import LlamaDetector

    return LlamaDetector(detector_gguf, base=tiny.gguf, quantisation="F32", n_threads=1)


@pytest.fixture(scope="session")
def hf_ids(tiny):
    """Hugging Face's tokeniser of the base's vocabulary, as template.py wants it."""
    from protector.models import load_tokenizer

    return load_tokenizer(tiny.folder)


@pytest.fixture(scope="session")
def llama_ids(tiny):
    """llama.cpp's tokeniser of the same vocabulary."""
    from protector.llama import LlamaTokenizer, _Weights

    return LlamaTokenizer(_Weights.of(tiny.gguf, 0))


@pytest.fixture
def exact_int8():
    """Skips where this machine's int8 products aren't exact, and a detector in int8 is refused."""
    from protector.errors import ModelError
    from protector.int8 import check_product

    try:
        check_product()
    except ModelError as error:
        pytest.skip(str(error))
