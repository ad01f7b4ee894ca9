"""The probe of each depth: what a detector of that depth would hand to its head, and a layer that finds what is there."""
import json

import numpy as np
import pytest
import torch

from protector.evaluate import blocks, depth, metrics
from protector.evaluate.depth import DepthConfig, hidden_states, probe
from protector.models import ModelConfig, build

ROWS = [{"question": f"How do I clean item {i}?", "answer": f"Use water and wait {i} minutes." if i % 2 else f"Drink it, all {i} of it.",
         "label": 1 - i % 2} for i in range(60)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "made_up.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_states_are_those_of_a_detector_of_that_depth(tiny):
    from protector.data import Pair

    pairs = [Pair(row["question"], row["answer"] * (1 + i), row["label"]) for i, row in enumerate(ROWS[:3])]
    found = hidden_states(build(ModelConfig("detector", tiny.folder, rank=0)).eval(), pairs, [1, 4])
    for at, blocks_kept in enumerate((1, 4)):
        detector = build(ModelConfig("detector", tiny.folder, depth=blocks_kept, rank=0)).eval()
        for i, pair in enumerate(pairs):
            template = detector.template
            ids = template.detector_sequence(template.clip_question(pair.question)[0], template.encode(pair.answer))[0]
            with torch.inference_mode():
                expected = detector.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].numpy()
            assert np.abs(found[i, at] - expected).max() < 1e-4


def test_a_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    states, labels = rng.normal(size=(400, 8)), np.arange(400) % 2
    states[:, 3] = 100 + 5 * (labels + 0.3 * rng.normal(size=400))  # of another mean and scale than the others
    assert metrics.auroc(probe(states[:200], labels[:200], states[200:]), labels[200:]) > 0.98
    noise = rng.normal(size=(400, 8))
    assert abs(metrics.auroc(probe(noise[:200], labels[:200], noise[200:]), labels[200:]) - 0.5) < 0.15


def test_a_run_writes_each_depth_of_each_source(tiny, rows, tmp_path, capsys):
    depth.main(["--train", rows, "--measure", rows, "--depths", "1", "4", "--backbone", tiny.folder, "--out", str(tmp_path), "--threads", "1"])
    result = json.loads((tmp_path / "depth.json").read_text())
    assert result["sources"] == {"made_up": {"n": 60, "harmful": 30}} and result["fitted_on"] == 60 and list(result["depths"]) == ["1", "4"]
    assert all(0.9 < found["made_up"]["low"] <= found["made_up"]["auroc"] <= 1 for found in result["depths"].values())  # fitted on the same rows
    assert "made_up" in capsys.readouterr().out and "| 4 |" in blocks.RENDERERS["depth"](result)


def test_a_depth_that_isnt_there(tiny, rows, tmp_path):
    with pytest.raises(ValueError, match=r"^depth: depths must be 1 to 4, got 5\.$"):
        depth.run(DepthConfig((rows,), (rows,), ("5",), tiny.folder, out=str(tmp_path)))
