"""Checkpoints for other servers: what plain transformers makes of them."""
import numpy as np
import pytest
import torch
from conftest import MILD_PAIRS, canaries_of, sequences_of

from protector import export

# The same float32 products in another order (W + BA in place of W, then BA): 64 terms of 2^-24 each, through 4 blocks.
ROUNDING = 1e-4


@pytest.fixture
def fit(monkeypatch, torch_detector):
    """Canaries that the tiny random detector passes."""
    monkeypatch.setattr(export, "CANARIES", [(c["question"], c["answer"], c["label"]) for c in canaries_of(torch_detector)])


def test_hf_detector_scores_the_same_in_plain_transformers(fit, torch_detector, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch_detector.save(tmp_path / "trained")
    written = export.export(tmp_path / "trained", tmp_path / "hf", format="hf")
    assert written["kind"] == "detector" and written["bytes"] > 49152 * 64 * 4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert model.config.num_labels == 1 and not any("lora" in name for name in model.state_dict())
    assert written["head_bias"] == model.config.head_bias == -written["vllm_pooler_config"]["logit_mean"] != 0
    sequences = sequences_of(torch_detector, MILD_PAIRS)
    expected = torch_detector.logits(sequences)
    alone = [model(torch.tensor([ids])).logits.item() + model.config.head_bias for ids in sequences]
    assert np.abs(np.array(alone) - expected).max() < ROUNDING
    # In a padded batch the pooled position is still the answer's last token.
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [model.config.pad_token_id] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    together = model(ids, attention_mask=mask).logits[:, 0].detach().numpy() + model.config.head_bias
    assert np.abs(together - expected).max() < ROUNDING
    # Planted fault: the bias that config.json carries is needed.
    assert np.abs(together - model.config.head_bias - expected).max() > 0.2
    text = MILD_PAIRS[0][1]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text, add_special_tokens=False) == torch_detector.template.encode(text)


def test_hf_temperature_and_shift_are_in_the_head(fit, torch_detector, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch_detector.save(tmp_path / "trained")
    export.export(tmp_path / "trained", tmp_path / "hf", format="hf", temperature=2.0, shift=0.5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert torch.allclose(model.score.weight, torch_detector.head.weight / 2)
    assert model.config.head_bias == pytest.approx(torch_detector.head.bias.item() / 2 + 0.5)


def test_hf_detoxifier_is_a_causal_lm_that_writes_the_same(torch_detoxifier, tmp_path):
    from transformers import AutoModelForCausalLM

    torch_detoxifier.save(tmp_path / "trained")
    assert export.export(tmp_path / "trained", tmp_path / "hf", format="hf")["kind"] == "detoxifier"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([torch_detoxifier.template.detoxifier_prompt([900, 901], [902, 903, 904])])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, torch_detoxifier.lm(ids).logits, atol=20 * ROUNDING)  # logits of up to 20


def test_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"^export: format must be adapter, merged or hf, got onnx\."):
        export.export(tmp_path, tmp_path / "out", format="onnx")


def test_average_is_the_weighted_mean_of_every_trained_tensor(torch_detector, torch_detoxifier, tmp_path):
    from protector import models
    from protector.__main__ import main
    from protector.errors import ModelError

    torch_detector.save(tmp_path / "a")
    first = {name: value.detach().clone() for name, value in torch_detector.trained().items()}
    with torch.no_grad():
        for value in torch_detector.trained().values():
            value.add_(1.0)
    torch_detector.save(tmp_path / "b")
    with torch.no_grad():
        for name, value in torch_detector.trained().items():
            value.copy_(first[name])
    assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "0.25", "0.75", "--out", str(tmp_path / "c")]) == 0
    found = models.load(tmp_path / "c").trained()
    assert found.keys() == first.keys() and all(torch.allclose(value, first[name] + 0.75, atol=1e-6) for name, value in found.items())
    assert export.average([tmp_path / "a"] * 4, [], tmp_path / "d")["of"] and all(
        torch.equal(value, first[name]) for name, value in models.load(tmp_path / "d").trained().items())
    for weights in (["0.5"], ["0.5", "0.6"], ["nan", "0.5"]):
        assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", *weights, "--out", str(tmp_path / "e")]) == 2
    torch_detoxifier.save(tmp_path / "other")
    with pytest.raises(ModelError, match="one kind, depth and rank"):
        export.average([tmp_path / "a", tmp_path / "other"], [], tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_refit_of_full_rank_scores_as_the_full_fine_tuning(torch_detector, tmp_path):
    from dataclasses import replace

    from protector import models
    from protector.__main__ import main
    from protector.errors import ModelError

    full = models.build(replace(torch_detector.config, rank=0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in full.trained().values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    full.save(tmp_path / "full")
    sequences = sequences_of(full, MILD_PAIRS)
    expected = full.logits(sequences)

    def error(rank, **options):
        written = export.refit(tmp_path / "full", tmp_path / str(rank), rank, **options)
        return np.abs(models.load(tmp_path / str(rank)).logits(sequences) - expected).max(), written["kept"]

    # 64 is the narrowest layer's width: nothing is left out, whatever the scale; above it the other ranks hold zeros.
    for rank, options in ((64, {}), (64, {"alpha": 8.0}), (70, {})):
        whole, kept = error(rank, **options)
        assert whole < ROUNDING and kept == 1.0
    (most, kept), (fewer, kept_fewer) = error(56), error(2)
    assert whole < most < fewer / 3 and 1 > kept > kept_fewer > 2 / 64, "equal values would keep rank / 64"
    # A model that didn't change is refitted by nothing.
    models.build(replace(torch_detector.config, rank=0)).save(tmp_path / "still")
    assert export.refit(tmp_path / "still", tmp_path / "none", 4)["kept"] == 1.0
    assert all(not value.any() for name, value in models.load(tmp_path / "none").trained().items() if "lora" in name)
    assert main(["refit", str(tmp_path / "full"), "--rank", "3", "--alpha", "6", "--out", str(tmp_path / "cli")]) == 0
    assert models.load(tmp_path / "cli").config.rank == 3
    torch_detector.save(tmp_path / "lora")
    for folder, rank, alpha, problem in (("lora", 4, 8.0, ModelError), ("full", 0, 8.0, ValueError), ("full", 4, 0.0, ValueError), ("full", 4, float("nan"), ValueError)):
        with pytest.raises(problem, match="^refit: "):
            export.refit(tmp_path / folder, tmp_path / "bad", rank, alpha)
    assert not (tmp_path / "bad").exists()

