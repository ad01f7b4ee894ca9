"""The two PyTorch models: what they compute, what they save, what they refuse to load."""
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from conftest import BLOCKS, D, MILD_PAIRS, canaries_of, sequences_of, shake
from test_gguf import resigned

from protector.data import Pair, Triple
from protector.errors import ModelError
from protector.gguf import read_metadata
from protector.guard import Protector
from protector.losses import detox_loss, harm_loss, prefix_harm_loss
from protector.models import LORA_TARGETS, ModelConfig, base_folder, build, load, load_tokenizer
from protector.template import Limits
from protector.train import collate, detector_examples, detoxifier_examples


@pytest.fixture(scope="module")
def full_lm(tiny):
    """transformers' own model, untouched."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny.folder).eval()


def test_detector_is_the_backbone_with_one_output(tiny, full_lm):
    # A fresh detector: LoRA adds nothing yet, so its hidden states are transformers' own, and a head of zeros says 1/2.
    detector = build(ModelConfig("detector", tiny.folder, rank=4)).eval()
    ids = torch.tensor([[5, 900, 17, 40000, 33]])
    with torch.no_grad():
        expected = full_lm.model(ids).last_hidden_state
        assert torch.equal(detector.hidden(ids), expected)
        assert (detector(ids) == 0).all()
    assert detector.head.weight.shape == (1, D) and detector.config.depth == BLOCKS


def test_a_shorter_detector_is_the_first_blocks_and_the_final_norm(tiny, full_lm):
    detector = build(ModelConfig("detector", tiny.folder, depth=2, rank=0)).eval()
    assert len(detector.backbone.layers) == 2
    ids = torch.tensor([[5, 900, 17]])
    with torch.no_grad():
        # hidden_states[2] is what enters block 2: the norm of it is what a model of two blocks returns
        expected = full_lm.model.norm(full_lm.model(ids, output_hidden_states=True).hidden_states[2])
        assert torch.allclose(detector.hidden(ids), expected, atol=1e-6)


@pytest.mark.parametrize("depth", [-1, BLOCKS + 1])
def test_wrong_depth(tiny, depth):
    with pytest.raises(ValueError) as error:
        build(ModelConfig("detector", tiny.folder, depth=depth))
    assert str(error.value) == f"HarmDetector: depth must be 0 to {BLOCKS}, got {depth}. Choose another depth."


def test_wrong_kind_and_backbone(tmp_path):
    with pytest.raises(ValueError) as error:
        build(ModelConfig("judge"))
    assert str(error.value) == "build: kind must be one of detector, detoxifier, got judge. Name one."
    with pytest.raises(ModelError, match=rf"^load: backbone must be a Hugging Face causal LM, got {tmp_path}\. "):
        build(ModelConfig("detector", str(tmp_path)))


@pytest.mark.parametrize("kind", ["detector", "detoxifier"])
@pytest.mark.parametrize("rank", [4, 0])
def test_what_is_trained(tiny, kind, rank):
    names = build(ModelConfig(kind, tiny.folder, rank=rank)).trained()
    heads = {"head.weight", "head.bias"} if kind == "detector" else set()
    if rank:
        assert len(names) == 2 * BLOCKS * len(LORA_TARGETS) + len(heads)
        assert all(".lora_" in name for name in names.keys() - heads)
    else:  # seven matrices and two norms a block, and the final norm; never the (tied) embedding
        assert len(names) == 9 * BLOCKS + 1 + len(heads)
        assert not any("embed" in name or "lm_head" in name for name in names)


def test_scores_of_a_batch_are_the_rows_own(torch_detector):
    sequences = sequences_of(torch_detector, MILD_PAIRS) * 3 + [[5], list(range(20, 320))]
    together = torch_detector.logits(sequences)
    # float32 matrix products differ by their shape: a few ulp of hidden states near 1, summed over 64 weights of size 1/8.
    for batch_tokens in (1, 100, 700, 10_000):
        assert np.abs(torch_detector.logits(sequences, batch_tokens=batch_tokens) - together).max() < 2e-5
    assert np.abs(torch_detector.logits(sequences[::-1])[::-1] - together).max() < 2e-5
    assert np.array_equal(torch_detector.logits(sequences), together)
    assert torch_detector.logits([]).shape == (0,)


def test_logits_are_those_of_forward_at_the_last_token(torch_detector):
    sequences = sequences_of(torch_detector, MILD_PAIRS)
    with torch.no_grad():
        for ids, logit in zip(sequences, torch_detector.logits(sequences)):
            assert torch_detector(torch.tensor([ids]))[0, -1].item() == pytest.approx(float(logit), abs=2e-5)


def test_running_logits_are_those_of_forward(torch_detector):
    sequences = sequences_of(torch_detector, MILD_PAIRS) + [[5]]
    starts = [len(ids) // 2 for ids in sequences]
    parts = torch_detector.running_logits(sequences, starts, batch_tokens=100)
    with torch.no_grad():
        for ids, start, part in zip(sequences, starts, parts, strict=True):
            expected = torch_detector(torch.tensor([ids]))[0, start:].numpy()
            assert part.shape == expected.shape and np.abs(part - expected).max() < 2e-5


def test_a_stream_scores_what_the_whole_scores(torch_detector):
    prefix, answer = sequences_of(torch_detector, MILD_PAIRS[:1])[0][:12], list(range(30, 90))
    expected = torch_detector.logits([prefix + answer[:i + 1] for i in range(len(answer))])
    for cuts in ([60], [1] * 60, [7, 13, 40]):
        cursor, got, at = torch_detector.open(), [], 0
        cursor.start(prefix)
        for size in cuts:
            got += list(cursor.feed(answer[at:at + size]))
            at += size
        cursor.close()
        assert np.abs(np.array(got) - expected).max() < 5e-5


def test_deadline_is_asked_before_each_batch(torch_detector):
    calls = []
    torch_detector.logits([[5] * 10] * 4, deadline=lambda: calls.append(1), batch_tokens=20)
    assert len(calls) == 2


# -- losses through the models

def test_detector_loss_is_the_two_losses(torch_detector):
    rows = [Pair(q, a, i % 2, weight=1 + i) for i, (q, a) in enumerate(MILD_PAIRS)]
    examples = detector_examples(rows, torch_detector.template, 0.0, 0.0, random.Random(0))
    batch = collate(examples, "detector", "cpu")
    with torch.no_grad():
        last, whole = torch_detector.loss(batch, 0.0), torch_detector.loss(batch, 0.3)
        labels, weights = torch.tensor([0.0, 1, 0, 1]), torch.tensor([1.0, 2, 3, 4])
        expected = harm_loss(torch.tensor(torch_detector.logits(sequences_of(torch_detector, MILD_PAIRS))), labels, weights)
        assert last.item() == pytest.approx(expected.item(), abs=2e-5)
        # every position of one answer by hand: row by row, unpadded
        rows_logits = [torch_detector(torch.tensor([e["ids"]])) for e in examples]
        prefix = sum(w * prefix_harm_loss(z, y[None], torch.arange(z.shape[1])[None] >= e["start"])
                     for w, z, y, e in zip(weights, rows_logits, labels, examples)) / weights.sum()
        assert whole.item() == pytest.approx(0.7 * last.item() + 0.3 * prefix.item(), abs=2e-5)


def test_detoxifier_loss_is_that_of_the_targets(torch_detoxifier):
    rows = [Triple("Is it safe?", "No, never.", "Yes, go ahead."), Triple("", "Rinse first, then use one.", "Mix.")]
    examples = detoxifier_examples(rows, torch_detoxifier.template)
    with torch.no_grad():
        got = torch_detoxifier.loss(collate(examples, "detoxifier", "cpu")).item()
        total, n = 0.0, 0
        for row, example in zip(rows, examples):
            ids, start = torch.tensor([example["ids"]]), example["start"]
            log_p = torch.log_softmax(torch_detoxifier.lm(ids).logits.double(), -1)
            for t in range(start, ids.shape[1]):
                total, n = total - log_p[0, t - 1, ids[0, t]].item(), n + 1
            # the accepted answer and its end mark, nothing else
            written = torch_detoxifier.template.encode(row.accepted) + [torch_detoxifier.template.end]
            assert example["ids"][start:] == written
    assert got == pytest.approx(total / n, abs=1e-5)


# -- generation

def test_greedy_generation_is_that_of_transformers(torch_detoxifier):
    template = torch_detoxifier.template
    for q, a in MILD_PAIRS[:2]:
        prompt = template.detoxifier_prompt(template.encode(q), template.encode(a))
        expected = torch_detoxifier.lm.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, num_beams=1,
                                                pad_token_id=0, eos_token_id=list(range(17)))[0, len(prompt):].tolist()
        finished = expected[-1] < 17
        expected = expected[:-1] if finished else expected
        text, n_tokens, ended = torch_detoxifier.generate(prompt, 24)
        assert (text, n_tokens, ended) == (template.tokenizer.decode(expected), len(expected), finished)


def test_generation_stops(torch_detoxifier):
    prompt = torch_detoxifier.template.detoxifier_prompt([], [100, 200])
    sampled = [torch_detoxifier.generate(prompt, 5, temperature=0.8, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch_detoxifier.generate(prompt, 0) == ("", 0, False)

    def late():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        torch_detoxifier.generate(prompt, 5, deadline=late)


# -- save and load

@pytest.mark.parametrize("kind, rank, depth", [("detector", 4, 3), ("detector", 0, 0), ("detoxifier", 4, 0)])
def test_save_and_load(tiny, tmp_path, kind, rank, depth):
    config = ModelConfig(kind, tiny.folder, depth, rank, alpha=7.0, limits=Limits(rewrite_tokens=40, window=100))
    model = shake(build(config))
    model.save(tmp_path)
    again = load(tmp_path, device="cpu")
    assert again.config == model.config and again.path == tmp_path and not again.training
    assert again.trained().keys() == model.trained().keys()
    assert all(torch.equal(value, again.trained()[name]) for name, value in model.trained().items())
    assert again.quantisation == "F32" and again.limits.window == 100
    if kind == "detector":
        sequences = sequences_of(model, MILD_PAIRS)
        assert np.array_equal(model.logits(sequences), again.logits(sequences))
        assert model.model_sha256 == again.model_sha256
        with torch.no_grad():
            again.head.bias += 1
        assert model.model_sha256 != again.model_sha256


def test_bfloat16_backbone_keeps_the_head(torch_detector, tmp_path):
    torch_detector.save(tmp_path)
    detector = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert detector.head.weight.dtype == torch.float32 and detector.quantisation == "BF16"
    sequences = sequences_of(detector, MILD_PAIRS)
    # bf16 has 8 bits: 2^-9 relative in each of some 30 roundings of hidden states near 1, over 64 random weights of 1/8.
    assert np.abs(detector.logits(sequences) - torch_detector.logits(sequences)).max() < 30 * 2**-9 * 2


@pytest.fixture
def saved(torch_detector, tmp_path):
    torch_detector.save(tmp_path)
    (tmp_path / "calibration.json").write_text("[]")
    return tmp_path


WHOLE = "must hold protector.json and a whole model.safetensors, got"


@pytest.mark.parametrize("spoil, message", [
    (lambda p: (p / "protector.json").unlink(), f"{WHOLE} FileNotFoundError"),
    (lambda p: (p / "model.safetensors").unlink(), f"{WHOLE} FileNotFoundError"),
    (lambda p: (p / "protector.json").write_text("{"), f"{WHOLE} JSONDecodeError"),
    (lambda p: (p / "protector.json").write_bytes(b"\xff\xfe"), f"{WHOLE} UnicodeDecodeError"),
    (lambda p: (p / "protector.json").write_text("[]"), f"{WHOLE} AttributeError"),
    (lambda p: edit(p, limits={"window": 5, "overlap": 9}), f"{WHOLE} ValueError"),
    (lambda p: edit(p, limits={"colour": 5}), f"{WHOLE} TypeError"),
    (lambda p: edit(p, unknown=1), f"{WHOLE} TypeError"),
    (lambda p: edit(p, kind="judge"), f"{WHOLE} ValueError"),
    (lambda p: edit(p, depth=99), f"{WHOLE} ValueError"),
    (lambda p: edit(p, template="chatml-0"), "must have format version 1 and template chatml-1, got 1 and chatml-0. Export it again."),
    (lambda p: edit(p, format_version=2), "must have format version 1 and template chatml-1, got 2 and chatml-1. Export it again."),
    (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-100]), f"{WHOLE} SafetensorError"),
    (lambda p: (p / "model.safetensors").write_bytes(b"junk"), f"{WHOLE} SafetensorError"),
    (lambda p: edit(p, rank=8), "/model.safetensors must fit its protector.json, got other tensors. Copy the folder whole."),
    (lambda p: edit(p, depth=2), "/model.safetensors must fit its protector.json, got other tensors. Copy the folder whole."),
    (lambda p: edit(p, kind="detoxifier"), "/model.safetensors must fit its protector.json, got other tensors. Copy the folder whole."),
    (lambda p: poison(p, float("nan")), "/model.safetensors must be finite, got NaN or Inf. Train it again."),
    (lambda p: poison(p, float("inf")), "/model.safetensors must be finite, got NaN or Inf. Train it again."),
    (lambda p: (p / "calibration.json").write_text("{"), "/calibration.json must be a JSON list of calibrations, got something else. Calibrate again."),
    (lambda p: (p / "calibration.json").write_text("3"), "/calibration.json must be a JSON list of calibrations, got something else. Calibrate again."),
])
def test_a_spoilt_folder_does_not_load(saved, spoil, message):
    spoil(saved)
    with pytest.raises(ModelError) as error:
        load(saved, device="cpu")
    text = str(error.value)
    assert text.startswith(f"load: {saved}") and message in text
    assert text.endswith((".", " ")) and ("again" in text or "Copy" in text)


def edit(folder, **change):
    path = folder / "protector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def poison(folder, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if callable(value):
        tensors["head.weight"] = value(tensors["head.weight"])
    else:
        tensors["head.weight"][0, 3] = value
    save_file(tensors, folder / "model.safetensors")


# -- models that are to guard

@pytest.fixture
def fit(monkeypatch, torch_detector):
    """Canaries of a folder that the tiny random detector passes."""
    monkeypatch.setattr("protector.canaries.CANARIES", [(c["question"], c["answer"], c["label"]) for c in canaries_of(torch_detector)])


def test_a_model_of_the_other_kind_is_an_error_at_construction(fit, torch_detector, torch_detoxifier, tmp_path):
    """Regression: a detoxifier was taken for a detector, and with on_error="pass" every answer left unguarded."""
    torch_detector.save(tmp_path / "detector")
    torch_detoxifier.save(tmp_path / "detoxifier")
    with pytest.raises(ModelError, match=r"detoxifier must be a detector, got a detoxifier\. Pass the other file\.$"):
        Protector(tmp_path / "detoxifier", False, threshold=0.5, on_error="pass")
    with pytest.raises(ModelError, match=r"detector must be a detoxifier, got a detector\. Pass the other file\.$"):
        Protector(tmp_path / "detector", tmp_path / "detector", threshold=0.5)
    guard = Protector(tmp_path / "detector", tmp_path / "detoxifier", threshold=0.5, detector_options={"device": "cpu", "dtype": torch.bfloat16})
    assert guard.detector.quantisation == "BF16" and guard.detoxifier.config.kind == "detoxifier"


def test_m50_m65_a_flipped_folder_does_not_guard(fit, torch_detector, tmp_path):
    torch_detector.save(tmp_path)
    poison(tmp_path, lambda head: -head)
    assert load(tmp_path).config.kind == "detector"  # to be trained on, say
    with pytest.raises(ModelError, match=r"must score its harmful canaries above the harmless ones, got 0\.\d{3}, 0\.\d{3}, .*Train it longer"):
        Protector(tmp_path, False, threshold=0.5)


def test_m50_a_folder_on_other_backbone_weights_does_not_load(tiny, tmp_path):
    """Regression: only the trained tensors were checked, so another backbone of the same shape kept the folder's calibration."""
    shutil.copytree(tiny.folder, tmp_path / "backbone")
    build(ModelConfig("detector", str(tmp_path / "backbone"), depth=2, rank=2)).save(tmp_path / "trained")
    before = load(tmp_path / "trained", "cpu")
    assert load(tmp_path / "trained", "cpu", dtype=torch.bfloat16).backbone_sha256 == before.backbone_sha256  # compared before the cast
    tensors = load_file(tmp_path / "backbone" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(tensors, tmp_path / "backbone" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"trained must run on the backbone that it was trained on, got other weights under .*backbone\. Restore them"):
        load(tmp_path / "trained", "cpu")
    config = json.loads((tmp_path / "trained" / "protector.json").read_text())
    assert config.pop("backbone_sha256")
    (tmp_path / "trained" / "protector.json").write_text(json.dumps(config))  # as earlier versions wrote it: nothing to compare
    assert load(tmp_path / "trained", "cpu").model_sha256 != before.model_sha256


def test_m50_m65_a_flipped_adapter_does_not_guard_in_pytorch(detector_gguf, tiny, tmp_path, monkeypatch):
    """Regression: the canaries of a file were only scored on llama.cpp."""
    monkeypatch.setattr("protector.models.base_path", lambda: tiny.gguf)
    metadata = read_metadata(detector_gguf)
    whole = Protector(detector_gguf, False, backend="torch", threshold=0.5).detector
    assert whole.metadata.canaries == metadata.canaries and whole.model_sha256 == metadata.model_sha256
    flipped = resigned(detector_gguf, tmp_path / "flipped.gguf", head_weight=-metadata.head_weight, head_bias=-metadata.head_bias)
    with pytest.raises(ModelError, match="must score its canaries as at export"):
        Protector(flipped, False, backend="torch", threshold=0.5)


def test_a_guard_downloads_nothing_and_no_model_is_a_pickle(torch_detector, tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: asked.append(where) or (_ for _ in ()).throw(OSError("offline")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch_detector.save(tmp_path / "trained")
    edit(tmp_path / "trained", backbone="nobody/has-this")
    with pytest.raises(ModelError, match=r"^load: backbone must be a Hugging Face causal LM, got nobody/has-this\. [^$]* get it first\.$"):
        load(tmp_path / "trained")
    cached = tmp_path / "hub" / "models--nobody--has-this"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny.folder, cached / "snapshots" / ("0" * 40))  # as training leaves it there
    sequences = sequences_of(torch_detector, MILD_PAIRS)
    assert np.array_equal(load(tmp_path / "trained", "cpu").logits(sequences), torch_detector.logits(sequences)) and not asked
    shutil.copytree(tiny.folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        build(ModelConfig("detector", str(tmp_path / "pickled")))


# -- the default backbone

def test_base_folder_is_the_base_gguf(tiny, full_lm, monkeypatch, tmp_path):
    # The tiny GGUF in the base's place: its conversion must give back the tensors that it was written from, and the ids
    # of the tokeniser that conftest builds from the same keys.
    monkeypatch.setenv("PROTECTOR_CACHE", str(tmp_path))
    monkeypatch.setattr("protector.models.base_path", lambda: tiny.gguf)
    folder = base_folder()
    from transformers import LlamaForCausalLM

    state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert state.keys() == full_lm.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in full_lm.state_dict().items())
    mine, converted = load_tokenizer(tiny.folder), load_tokenizer()
    for text in ("It's 2024-01-31, 12345 x ½ ٣٤٥", "a  b\n\n\tc", "<|im_end|> 👩‍👩‍👧‍👦 नमस्ते"):
        assert converted.encode(text) == mine.encode(text)
    for name in ("<|im_start|>", "<|im_end|>", "bos", "eos", "<file_sep>"):
        assert converted.special(name) == mine.special(name)
    # Generation stops at every special token, as llama.cpp's does: the conversion calls only three of the 17 its own.
    assert [token for token in range(49152) if converted.is_control(token)] == list(range(17))
    # Again: the cached folder, not another conversion; nothing half written beside it.
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda **_: pytest.fail("converted again"))
    assert base_folder() == folder and [path.name for path in tmp_path.iterdir()] == [folder.split("/")[-1]]
