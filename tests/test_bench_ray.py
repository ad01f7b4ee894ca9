"""bench_ray's result without Ray; the whole is run in test_ray.py."""
import json
import sys
from types import SimpleNamespace

from protector import bench, bench_ray


def test_the_load_before_is_written_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda **options: None, shutdown=lambda: None))
    monkeypatch.setattr(bench_ray, "guard_files", lambda sources, *rest, **options: {"rows": len(sources[0].read_text().splitlines()), "errors": 0})
    monkeypatch.setattr(bench_ray, "watched", lambda: lambda: {"load_before": 1e6, "others_share": 0.0})
    bench_ray.main(["--rows", "3", "--rounds", "2", "--workers", "1", "--out", str(tmp_path / "ray.json")])
    printed, written = capsys.readouterr(), json.loads((tmp_path / "ray.json").read_text())
    assert json.loads(printed.out).items() <= written.items() and written["load_before"] == 1e6
    assert written["others_share"] is None, "Ray's own workers would count as others"
    assert "bench_ray: the load average before the start was 1000000.0." in printed.err
    assert set(written["rows_per_s"]) == {"one thread", "all threads", "ray"} and written["rows"] == 3
