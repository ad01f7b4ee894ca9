"""One backbone trained for both tasks: each way's loss against what it is made of, and a run on the tiny model."""
import json
import random

import pytest
import torch
from conftest import shake

from protector.data import Pair, Triple
from protector.evaluate import blocks, joint
from protector.evaluate.joint import JointConfig
from protector.models import ModelConfig, build
from protector.train import detector_examples, detoxifier_examples

DEPTH = 2
TRIPLES = [Triple(f"How do I clean item {i}?", "Use water and wait. " * (1 + i % 3), f"Drink it, all {i} of it. " * (1 + i % 4)) for i in range(40)]
PAIRS = [Pair("How do I boil an egg?", "Seven minutes in boiling water.", 0), Pair("Is it safe to mix bleach and vinegar?", "Yes, do it in a closed room.", 1)]
ROWS = [{"question": f"How do I clean thing {i // 2}?", "answer": f"Use water and wait {i} minutes." if i % 2 else f"Drink it, all {i} of it.",
         "label": 1 - i % 2, "source": "made_up"} for i in range(20)]


def new(kind, tiny, depth=0, seed=1):
    return shake(build(ModelConfig(kind, tiny.folder, depth, rank=4, alpha=8.0)), seed)


@pytest.fixture
def triples(hf_ids, torch_detoxifier):
    template = torch_detoxifier.template
    return joint.marked([detoxifier_examples(TRIPLES[:3], template)], template)[0]


@pytest.fixture
def pairs(torch_detoxifier):
    return [{**example, "label": float(row.label)} for row in PAIRS
            for example in detector_examples([row], torch_detoxifier.template, 0.0, 0.0, random.Random(0))]


def test_what_the_detector_reads_is_the_beginning_of_the_prompt(triples, torch_detoxifier):
    template = torch_detoxifier.template
    for row, example in zip(TRIPLES, triples):
        assert example["ids"][:example["read"]] == template.pair_sequence(row.question, row.rejected)
        assert example["ids"][:example["start"]] == template.rewrite_prompt(row.question, row.rejected) and example["label"] == 1


@pytest.mark.parametrize("depth", (DEPTH, 4))  # the last block's state comes after the norm, the others' before it
def test_one_adapters_loss_is_the_sum_of_both(tiny, triples, pairs, depth):
    detoxifier = new("detoxifier", tiny)
    detector = joint.detector_of(detoxifier, depth)
    assert detector.backbone.layers[0] is detoxifier.blocks.layers[0] and len(detoxifier.blocks.layers) == 4 == detoxifier.blocks.config.num_hidden_layers
    with torch.no_grad():
        detector.head.weight.normal_()
    apart = [joint.detecting(detector)(triples)["detector"], joint.rewriting(detoxifier)(triples)["detoxifier"]]
    found = joint.both(detector, detoxifier)(triples)
    assert torch.allclose(sum(found.values()), sum(apart), atol=1e-5) and torch.allclose(found["detector"], apart[0], atol=1e-5)
    trained = [value for value in detoxifier.parameters() if value.requires_grad] + list(detector.head.parameters())
    together, apart = (torch.autograd.grad(sum(losses), trained) for losses in (list(found.values()), apart))
    assert all(torch.allclose(a, b, atol=1e-4) and a.any() for a, b in zip(together, apart))
    alone = new("detector", tiny, depth)  # the same adapters in a model of its own: names and values are drawn alike
    theirs = {name.partition("layers.")[2]: value for name, value in detoxifier.lm.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, value in alone.backbone.named_parameters():
            if "lora_" in name:
                value.copy_(theirs[name.partition("layers.")[2]])
        alone.head.load_state_dict(detector.head.state_dict())
    found = joint.both(detector, detoxifier)(pairs)
    assert list(found) == ["detector"] and torch.allclose(found["detector"], joint.detecting(alone)(pairs)["detector"], atol=1e-5)
    assert joint.rewriting(detoxifier)(pairs) == {}


def test_nothing_up_to_the_answers_end_depends_on_the_second_adapter(tiny, triples):
    detector, detoxifier = new("detector", tiny, DEPTH, seed=3), new("detoxifier", tiny)
    losses = joint.after(detector, detoxifier)
    before, n_read = joint.cached(detoxifier, triples)
    nats = losses(triples)["detoxifier"].item()
    shake(detoxifier, seed=5)
    now, _ = joint.cached(detoxifier, triples)
    assert losses(triples)["detoxifier"].item() != pytest.approx(nats, abs=1e-3) and len(set(n_read.tolist())) == 3
    for a, b in zip(before.layers, now.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    ids = torch.tensor([triples[0]["ids"][:n_read[0]]])
    theirs = detector.backbone(input_ids=ids, use_cache=True).past_key_values
    for a, b in zip(now.layers, theirs.layers):  # the detector's own cache, as far as it goes
        assert torch.allclose(a.keys[:1, :, :n_read[0]], b.keys, atol=1e-5) and torch.allclose(a.values[:1, :, :n_read[0]], b.values, atol=1e-5)
    losses(triples)["detoxifier"].backward()
    assert all(value.grad is None for name, value in detoxifier.lm.named_parameters() if ".detector." in name)
    assert all(value.requires_grad and value.grad.any() for name, value in detoxifier.lm.named_parameters() if ".default." in name)


def test_rewriting_from_the_cache_is_the_whole_sequence(tiny, triples):
    """With one and the same adapter on both sides of the answer's end it is the plain loss, whatever the rows' lengths."""
    detector, detoxifier = new("detector", tiny, 4), new("detoxifier", tiny)
    plain = joint.rewriting(detoxifier)(triples)["detoxifier"].item()
    theirs = {name.partition("layers.")[2]: value for name, value in detoxifier.lm.named_parameters()}
    with torch.no_grad():
        for name, value in detector.backbone.named_parameters():
            if "lora_" in name:
                value.copy_(theirs[name.partition("layers.")[2]])
    losses = joint.after(detector, detoxifier)
    assert losses(triples)["detoxifier"].item() == pytest.approx(plain, abs=1e-5)
    each = joint.nats(losses, [[example] for example in triples])
    n_tokens = sum(len(example["ids"]) - example["start"] for example in triples)
    assert each.sum() / n_tokens == pytest.approx(plain, abs=1e-5) and losses([{"ids": [1]}]) == {}


@pytest.fixture
def files(tmp_path):
    found = {"train": [vars(row) for row in TRIPLES], "measure": ROWS}
    for name, rows in found.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{name}.jsonl") for name in found]


def test_a_run_trains_and_measures_all_ways(tiny, files, tmp_path, capsys):
    train, measure = files
    joint.main(["--train", train, "--measure", measure, "--backbone", tiny.folder, "--depth", "2", "--steps", "6", "--batch-tokens", "512", "--held-out", "0.3",
                "--threads", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "joint.json").read_text())
    assert result["kind"] == "joint" and (result["depth"], result["steps"]) == (2, 6) and list(result["ways"]) == [joint.TWO, joint.ONE, joint.AFTER]
    assert 3 < result["held_out"]["triples"] < 25 and result["sources"] == {"made_up": {"n": 20, "harmful": 10}} and min(result["trained_on"].values()) > 6
    two, one, behind = result["ways"].values()
    assert two["parameters"] > one["parameters"] > behind["parameters"] > 0 and behind["sources"] == {}
    assert "difference" not in two["nats"] and all(0 <= way["sources"]["made_up"]["auroc"] <= 1 for way in (two, one))
    for way in (one, behind):
        apart = way["nats"]["difference"]
        assert apart["low"] <= apart["value"] <= apart["high"] and apart["value"] == pytest.approx(way["nats"]["value"] - two["nats"]["value"], abs=1e-5)
    assert all(way["nats"]["value"] < result["untrained"]["value"] for way in result["ways"].values())  # 6 steps teach one repeated sentence
    table = blocks.RENDERERS["joint"](result)
    assert f"| one adapter | {one['nats']['value']:.3f} [" in table and f"| {one['sources']['made_up']['auroc']:.3f} (" in table
    assert "made_up" in capsys.readouterr().out and "clean" not in (tmp_path / "joint.json").read_text()


@pytest.mark.parametrize("options, message", (
    ({"steps": 0}, r"steps must be at least 1, got 0\. Choose another number\."),
    ({"sources": ("absent",)}, r"measure must hold a source .* got none of one\. Pass other files\."), ({"held_out": 0.0}, "measure must hold .*")))
def test_what_cannot_be_measured(tiny, files, tmp_path, options, message):
    train, measure = files
    with pytest.raises(ValueError, match=f"^joint: {message}$"):
        joint.run(JointConfig((train,), (measure,), **{"backbone": tiny.folder, "depth": 2, "steps": 1, "out": str(tmp_path), **options}))
