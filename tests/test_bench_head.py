"""bench_head's arithmetic; its script is rehearsed in test_head.py."""
import json
import subprocess
import sys
from dataclasses import fields

import pytest


def test_rounds_have_a_median_and_a_spread():
    pytest.importorskip("torch", reason="bench_head measures torch")
    from protector import bench_head

    times = iter([100, 100, 8, 10, 10, 10, 12, 10])  # one call each to size the rounds, then three rounds of both
    found = bench_head.in_turns({"a": None, "b": None}, 3, 0, clock=lambda function, calls: next(times))
    assert bench_head.medians(found) == {"a": 10.0, "b": 10.0}
    assert (found["a"]["spread"], found["b"]["spread"]) == (0.4, 0.0)  # 8 and 12 about 10
    assert bench_head.judged(True, {"rounds_us": {"b": found["b"]}}) == {"met": True, "busy": False}
    assert bench_head.judged(False, {"rounds_us": {"b": found["b"]}}, {"rounds_us": found}) == {"met": False, "busy": True}


def test_no_target_is_met_without_a_word_beside_other_work(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="bench_head measures torch")
    from protector import bench_head

    if bench_head._native.LIBRARY is None or torch.cuda.is_available():
        pytest.skip("the script ends early without the built library, and measures more where there is a GPU")
    number = bench_head.described([8, 10, 12])
    monkeypatch.setattr(bench_head, "bench_cpu", lambda options: {"targets": {"fast": bench_head.judged(True)}})
    monkeypatch.setattr(bench_head, "bench_training", lambda options, device: {"rounds_us": {"step": number}})
    for load, is_busy in ((0.0, False), (1e6, True)):
        monkeypatch.setattr(bench_head, "watched", lambda: lambda: {"load_before": load, "others_share": 0.0})
        bench_head.main(["--out", str(tmp_path)])
        result = json.loads((tmp_path / "head_cpu.json").read_text())
        assert result["on_cpu"]["targets"]["fast"] == {"met": True, "busy": is_busy}
        assert (result["load_before"], result["busy"]) == (load, ["training, rounds_us, step"])
        told = capsys.readouterr().err
        assert "bench_head: training, rounds_us, step spread over more than 10 %." in told and ("the load average before" in told) == is_busy


def test_every_option_has_a_help(capsys):
    pytest.importorskip("torch", reason="bench_head measures torch")
    from protector import bench_head

    assert all(item.metadata.get("help") for item in fields(bench_head.Options))
    with pytest.raises(SystemExit) as ended:
        bench_head.main(["--help"])
    assert ended.value.code == 0 and "walk the GPU part on the CPU (default: False)" in capsys.readouterr().out


def test_the_kernel_is_proven_without_llama_cpp():
    pytest.importorskip("torch", reason="bench_head measures torch")
    code = "import sys; sys.modules['llama_cpp'] = None; import protector.bench_head"  # None: its import fails
    subprocess.run([sys.executable, "-c", code], check=True)
