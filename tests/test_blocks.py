"""Blocks that say whether a target is met, by hand; test_readme.py compares every block with its file."""
import pytest

from protector.evaluate import blocks, record, report
from protector.evaluate.judge import OWN, quality


def _rate(k, n):
    return {"rate": k / n if n else None, "low": 0.1, "high": 0.9, "k": k, "n": n}


def _measured(auroc, recall, harmful=50):
    return {"n": 100, "harmful": harmful, "auroc": {"value": auroc, "low": 0.0, "high": 1.0}, "recall_at_5%_fpr": {"value": recall, "low": 0.0, "high": 1.0}}


def test_detector_targets():
    result = {"sources": {"beavertails_test_NC": _measured(0.88, 0.59), "pyrit": _measured(0.899, 0.5), "openai_rbr": _measured(None, None),
                          "msts_english_textonly": _measured(1.0, 1.0, 2), "owleval": {"false_positives": _rate(5, 486)}}}
    lines = blocks._detector_targets(result).splitlines()[2:]
    assert [line.split(" | ")[0][2:] + ": " + line.split(" | ")[-1][:-2] for line in lines] == [
        "AUROC, beavertails_test_NC: yes", "AUROC, pyrit: no", "AUROC, msts_english_textonly: 2 harmful answers: can't be told", "recall at 5 % false positives, beavertails_test_NC: no",
        "recall at 5 % false positives, pyrit: yes", "OwlEval's answers flagged (the threshold was set on them and captions): no"]
    result["sources"]["owleval"]["false_positives"] = _rate(4, 486)
    assert blocks._detector_targets(result).splitlines()[-1].endswith("n 486 | yes |")
    result["sources"]["pyrit"]["reliability"] = [{"low": 0.6, "score": 0.65, "share": 0.0, "n": 500}, {"low": 0.7, "score": 0.75, "share": 0.80, "n": 30},
                                                 {"low": 0.8, "score": 0.85, "share": 0.90, "n": 10}, {"low": 0.9, "score": None, "share": None, "n": 0}]
    last = blocks._detector_targets(result).splitlines()[-1]
    assert ".7 to .9, 0.78 in the mean, n 40 " in last and last.endswith(" | within 0.05 | 0.82 | yes |")  # by hand: (30 x .75 + 10 x .85) / 40
    result["sources"]["beavertails_test_NC"]["reliability"] = [{"low": 0.8, "score": 0.85, "share": 0.5, "n": 40}]
    assert blocks._detector_targets(result).splitlines()[-1].endswith(" | 0.66 | no |")
    result["detector"] = {"model": "mine.gguf", "sha256": "ab" * 32, "backend": "llama.cpp", "quantisation": "F16", "thresholds": {"pair": 0.5}}
    assert blocks._detector_targets(result).endswith("\n\nGuard: mine.gguf (sha256 abababababab), llama.cpp, F16; threshold 0.500.")


def test_rewrite_targets():
    result = {"judge": "a coin", "judged_harmless": _rate(94, 100), "below_threshold_at_first_try": _rate(85, 100), "rewritten": _rate(100, 125),
              "refused_by_guard": _rate(25, 125), "relevance": {"on_topic": _rate(81, 100)}, "refusals": _rate(50, 100)}
    assert [line.split(" | ")[-1] for line in blocks._rewrite_targets(result).splitlines()[2:6]] == ["no |", "yes |", "yes |", "yes |"]
    result["graded"] = {"harmless": _rate(95, 100), "about": _rate(79, 100)}
    lines = blocks._rewrite_targets(result).splitlines()[2:8]
    assert [line.split(" | ")[-1] for line in lines] == ["no |", "yes |", "yes |", "yes |", "no |", "yes |"] and "grades" in lines[1] and "grades" in lines[4]
    assert blocks._rewrite_targets(result).splitlines()[-3:-1] == ["Judge: a coin.", f"Grades: by {report.GRADER}."]
    # By hand: 81 of 125 = 64.8 %, and (50 + 25) of 125 = 60 %.
    assert blocks._rewrite_targets(result).splitlines()[-1] == (
        "Only what was flagged is rewritten, 125 harmful answers. “Below the threshold at the first try” is a share of these, the others are of the 100 rewrites that were "
        "accepted, without the 25 answers that the guard refused instead. With these counted in: on topic by cosine 81 of 125 (64.8 %), refusals 50 + 25 of 125 (60.0 %).")
    result["judge_measured"], result["harmful"] = {OWN: {"n": 20, "accuracy": {**_rate(11, 20), "missing": 0}}}, 2000
    result["graded"]["grader"] = quality([0.9, 0.1, 0.2], [1, 1, 0])
    judged, graded, of = blocks._rewrite_targets(record.plain(result)).splitlines()[-3:]
    assert judged == "Judge: a coin. On this project's short texts, which read like rewrites: accuracy 0.55 [0.10, 0.90], n 20."
    assert "on the 3 answers with human labels among these texts: accuracy 66.7 % [" in graded and "harmful answers missed 50.0 % [9.5, 90.5], n 2 (" in graded
    assert of.startswith("Only what was flagged is rewritten, 125 of 2,000 harmful answers. ")
    result["graded"] = {"harmless": _rate(0, 0), "about": _rate(0, 0)}
    result["refusals"], result["relevance"], result["judged_harmless"] = _rate(51, 100), None, _rate(0, 0)
    lines = blocks._rewrite_targets(result).splitlines()[2:4]
    assert [line.split(" | ")[-1] for line in lines] == ["yes |", "no |"] and "refusal" in lines[1]


def test_a_loaded_machine_is_named():
    result = {"busy": [], "load_before": 1.2, "run": {"cores": 2}}
    assert blocks._busy(result) == " **Busy**: the load average before the start was 1.2."
    assert blocks._busy({**result, "load_before": 1.0}) == "" and blocks._busy({"busy": ["x"], "run": {"cores": 2}}) == " Spread widely: x."


def test_a_part_of_the_detectors_report_is_one_table():
    titles = {"published": "Published guards", "kinds": "Harmful answers flagged, by kind of harm", "alone": "Detector without the question", "calibration": "Calibration"}
    for part, title in titles.items():
        assert [line for line in blocks.draw(f"results/detectors.json#{part}").splitlines() if line.startswith("###")] == [f"### {title}"]
    with pytest.raises(KeyError, match="detectors.json#tragets"):
        blocks.draw("results/detectors.json#tragets")


def test_a_quantisation_without_a_threshold_decides_nothing():
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "k": 5, "n": 10, "missing": 0}
    apart = {"auroc": -0.01, "low": -0.02, "high": 0.01}
    common = {"largest_score_difference": 0.1, "mean_score_difference": 0.01}
    result = {"kind": "parity", "reference": "PyTorch fp32", "rows": 20, "sources": {"a": {"n": 20, "harmful": 10}}, "quantisations": {
        "F16": {**common, "decisions_that_differ": 1, "of_them_outside_the_band": 0, "sources": {"a": {"auroc": 0.9, "difference": apart, "flagged": rate, "false_positives": rate}}},
        "base": {**common, "sources": {"a": {"auroc": 0.8, "difference": apart}}}}}
    assert blocks._parity(result).splitlines()[2:] == ["| F16 | 0.1000 | 0.0100 | 1 of 20 | 0 |", "| base | 0.1000 | 0.0100 | – | – |"]
    assert blocks._quality(result).splitlines()[2:4] == [
        "| F16 | 0.900 (-0.010 [-0.020, +0.010]); 50 % and 50 % |", "| base | 0.800 (-0.010 [-0.020, +0.010]); no threshold |"]
