"""What is said of measured rounds: spreads, the load before, and the warnings."""
import os

from protector import bench_rounds
from protector.bench_rounds import busy, described, is_loaded


def test_a_wide_number_is_found_in_dicts_and_lists():
    wide = described([8, 10, 12])  # a spread of .4
    assert busy({"cells": [{"us": described([10, 10, 10])}, {"us": wide}], "x": wide, "n": 3}) == ["cells, 1, us", "x"]
    assert busy([wide]) == ["0"]


def test_more_than_half_of_the_cores_is_other_work():
    assert not is_loaded(1.0, 2) and is_loaded(1.01, 2) and not is_loaded(None)
    assert is_loaded(0.51 * os.cpu_count()) and not is_loaded(0.5 * os.cpu_count())


def test_both_reasons_are_told(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    bench_rounds.warn("bench_ray", {"load_before": 1.5, "busy": ["ray"]})
    assert capsys.readouterr().err.splitlines() == [
        "bench_ray: the load before the start was 1.5 on 2 cores. Run again on a quiet machine.",
        "bench_ray: ray spread over more than 10 %. Run again on a quiet machine."]
    bench_rounds.warn("bench_ray", {"load_before": 0.9, "busy": []})
    bench_rounds.warn("bench_ray", {"load_before": None, "busy": []})
    assert capsys.readouterr().err == ""
