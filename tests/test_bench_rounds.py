"""What is said of measured rounds: spreads, the load before, and the warnings."""
import os

from protector import bench_rounds
from protector.bench_rounds import busy, described, loaded, others, watched


def test_a_wide_number_is_found_in_dicts_and_lists():
    wide = described([8, 10, 12])  # a spread of .4
    assert busy({"cells": [{"us": described([10, 10, 10])}, {"us": wide}], "x": wide, "n": 3}) == ["cells, 1, us", "x"]
    assert busy([wide]) == ["0"]


def test_more_than_half_of_the_cores_is_other_work():
    assert not loaded({"load_before": 1.0, "run": {"cores": 2}}) and loaded({"load_before": 1.01, "run": {"cores": 2}}) and not loaded({"load_before": None})
    assert loaded({"load_before": 0.51 * os.cpu_count()}) and not loaded({"load_before": 0.5 * os.cpu_count()})
    assert not loaded({"others_share": 0.05}) and loaded({"others_share": 0.051}) == ["other processes took 5 % of the CPU time"]


def test_what_others_took_is_all_work_without_this_process_and_its_descendants(tmp_path):
    me = os.getpid()

    def proc(work, idle, **spent):  # ticks
        (tmp_path / "stat").write_text(f"cpu  {work - 4} 1 1 {idle - 1} 1 0 1 1 0 0\ncpu0 9 9 9 9\n")  # user nice system idle iowait irq softirq steal
        for pid, parent, name in ((me, 1, "me"), (me + 1, me, "child"), (me + 2, me + 1, "grandchild"), (1, 0, "other")):
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) S 7) R {parent} {'0 ' * 9}{spent[name]} 1 1 1 0 0\n")

    proc(1000, 5000, me=10, child=20, grandchild=30, other=900)
    since = watched(tmp_path)
    proc(1600, 5400, me=110, child=120, grandchild=230, other=1100)  # 600 of work in 1000, of which 100, 100 and 200 are own
    assert since()["others_share"] == 0.2 and watched(tmp_path)()["others_share"] is None  # no time has passed
    assert watched(tmp_path / "not Linux")()["others_share"] is None
    assert others(tmp_path)().keys() == {"others_share", "others_bound"}  # the load average holds this process's own earlier work


def test_both_reasons_are_told(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    bench_rounds.warn("bench_ray", {"load_before": 1.5, "others_share": 0.2, "busy": ["ray"]})
    assert capsys.readouterr().err.splitlines() == [
        "bench_ray: the load average before the start was 1.5. Run again on a quiet machine.",
        "bench_ray: other processes took 20 % of the CPU time. Run again on a quiet machine.",
        "bench_ray: ray spread over more than 10 %. Run again on a quiet machine."]
    bench_rounds.warn("bench_ray", {"load_before": 0.9, "busy": []})
    bench_rounds.warn("bench_ray", {"load_before": None, "busy": []})
    assert capsys.readouterr().err == ""
