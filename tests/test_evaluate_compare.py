"""Detectors side by side: the logits are the detector's own, the difference is paired, and bad input is named."""
import json
import shutil

import numpy as np
import pytest
import torch

from protector import models
from protector.evaluate import blocks, compare, rows
from protector.evaluate.compare import CompareConfig, last_logits

ROWS = [{"question": f"How do I clean item {i // 2}?", "answer": "Use water and wait." if i % 2 else "Drink all of it.", "label": 1 - i % 2,
         "source": "made_up"} for i in range(60)]


@pytest.fixture
def measure(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def folders(torch_detector, tmp_path):
    """The same detector twice, the second one with its head turned round."""
    weight = torch_detector.head.weight.detach().clone()
    for name, sign in (("plain", 1), ("turned", -1)):
        with torch.no_grad():
            torch_detector.head.weight.copy_(sign * weight)
        torch_detector.save(tmp_path / name)
    with torch.no_grad():
        torch_detector.head.weight.copy_(weight)
    return [str(tmp_path / "plain"), str(tmp_path / "turned")]


def test_a_turned_head_turns_the_auroc(folders, measure, tmp_path, capsys):
    compare.main([*folders, "--measure", measure, "--harmless", measure, "--out", str(tmp_path), "--threads", "1"])
    result = json.loads((tmp_path / "compare.json").read_text())
    plain, turned = (result["detectors"][name]["sources"]["made_up"] for name in folders)
    assert result["sources"] == {"made_up": {"n": 60, "harmful": 30}}
    assert turned["auroc"] == pytest.approx(1 - plain["auroc"], abs=1e-6)
    assert "difference" not in plain and turned["difference"]["auroc"] == pytest.approx(1 - 2 * plain["auroc"], abs=1e-5)
    assert turned["difference"]["low"] <= turned["difference"]["auroc"] <= turned["difference"]["high"]
    assert plain["above_harmless"]["n"] == 30 and result["harmless"] == 30  # the harmful half of the file sets no bound
    assert "made_up" in capsys.readouterr().out
    thinned = compare.run(CompareConfig(tuple(folders), (measure,), most=9, name="thinned", out=str(tmp_path)))
    assert thinned["sources"] == {"made_up": {"n": 9, "harmful": 6}}  # rows 0, 6, 13, 20, 26, 33, 40, 46, 53
    table = blocks.RENDERERS["compare"](result)
    assert f"| {folders[1]} | {turned['auroc']:.3f} ({turned['difference']['auroc']:+.3f} [" in table and f"| {folders[0]} | {plain['auroc']:.3f} [{plain['low']:.3f}, {plain['high']:.3f}] |" in table


def test_the_same_detector_differs_by_nothing(folders, measure, tmp_path):
    copy = shutil.copytree(folders[0], tmp_path / "other" / "plain")  # of one name: both are kept
    result = compare.run(CompareConfig((folders[0], str(copy)), (measure,), name="same", out=str(tmp_path)))
    assert (tmp_path / "same.json").exists() and list(result["detectors"]) == [folders[0], str(copy)]
    assert result["detectors"][str(copy)]["sources"]["made_up"]["difference"] == {"auroc": 0, "low": 0, "high": 0}
    with pytest.raises(ValueError, match="detectors must differ, got one twice"):
        compare.run(CompareConfig((folders[0],) * 2, (measure,), out=str(tmp_path)))


def test_a_long_answer_counts_by_its_most_harmful_window(torch_detector):
    template = torch_detector.template
    short = rows.Row("Q", "word " * 3)
    long = rows.Row("Q", " ".join(f"word{i}" for i in range(template.limits.window)))
    ids, question = template.encode(long.answer), template.clip_question("Q")[0]
    found = compare.windows(len(ids), template.limits.window, template.limits.overlap)
    assert len(found) > 1
    alone = [torch_detector.logits([template.detector_sequence(question, ids[window.start:window.stop])[0]])[0] for window in found]
    assert np.allclose(last_logits(torch_detector, [short, long])[1], max(alone), atol=1e-4 if not compare.bf16_is_faster(torch.device("cpu")) else 0.05)


def test_help(capsys):
    """Regression: argparse formats a help text with %, and a bare one in it was a ValueError."""
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    assert ended.value.code == 0 and "--harmless" in capsys.readouterr().out


def test_what_cannot_be_compared(folders, measure, torch_detoxifier, tmp_path):
    with pytest.raises(ValueError, match="harmful and harmless answers, got none"):
        compare.run(CompareConfig(tuple(folders), (measure,), sources=("absent",), out=str(tmp_path)))
    torch_detoxifier.save(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a detector, got a detoxifier"):
        compare.run(CompareConfig((str(tmp_path / "other"),), (measure,), out=str(tmp_path)))


def test_what_the_training_wrote_is_told(folders, measure, tmp_path):
    config = {name: 0.5 for name in compare._SHOWN}
    (tmp_path / "plain" / "run.json").write_text(json.dumps({"config": config, "steps": 3, "tokens": 7, "trained_parameters": 9, "commit": "c"}))
    result = compare.run(CompareConfig((folders[0],), (measure,), out=str(tmp_path)))
    assert result["detectors"][folders[0]]["trained"] == {**config, "steps": 3, "tokens": 7, "parameters": 9, "commit": "c"}
    assert models.load(folders[1]).config.kind == "detector"
