"""The streams' benchmark: its bounds by hand, and one small run on the tiny model."""
import json
import mmap

import numpy as np
import pytest

from protector import Protector, bench, bench_stream
from protector.bench_stream import StreamBenchConfig, targets
from protector.evaluate import blocks


def test_targets_by_hand():
    def number(median, spread=0.0):
        return {"median": median, "spread": spread}

    result = {"generation": {"share": number(0.25), "wait_steps": number(2.1), "push_steps": number(1.9)}, "flat": {"ratio": number(1.0, spread=0.11)},
              "clients": {"streams": {"ratio": number(1.49)}}, "in_a_row": {"grown_bytes": None}}
    assert [(found["holds"], found["busy"]) for found in targets(result).values()] == [(True, False), (False, False), (True, False), (True, True), (False, False)]
    result |= {"in_a_row": {"grown_bytes": (8 << 20) + 1}, "load_before": 1e6}
    assert [found["busy"] for found in targets(result).values()] == [True, True, True, True, True, False]
    assert targets(result)["bytes grown over all short streams"] == {"value": (8 << 20) + 1, "spread": None, "bound": 8 << 20, "at_least": False,
                                                                     "holds": False, "busy": False}
    assert [found["at_least"] for found in targets(result).values()] == [False, False, False, False, True, False]


def test_the_wait_is_the_longest_of_an_answers_ends_and_a_view_adds_a_pass(llama_detector, tiny, monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    guard, ends = Protector(llama_detector, False, threshold=1.0, on_flag="report"), []
    monkeypatch.setattr(bench_stream, "base_path", lambda: tiny.gguf)

    def finish_s(guard, pieces):
        ends.append((len(pieces), len(guard._plan(("", "".join(pieces), ()), None)["windows"])))
        return 0.3 if ends[-1] == (16, 1) else 0.9 if ends[-1][1] == 2 else 0.1

    monkeypatch.setattr(bench_stream, "finish_s", finish_s)
    found = bench_stream.generation(guard, bench_stream.Sizes(answer=20), 2, 1)
    assert {n for n, windows in ends if windows == 1} == set(range(15, 21)) and {n for n, windows in ends if windows == 2} == {21}
    assert found["wait_ms"]["median"] == pytest.approx(300) and found["view_wait_steps"]["median"] == pytest.approx(3 * found["wait_steps"]["median"])


def test_tokens_that_are_written_and_not_shown_when_text_is_let_out(llama_detector, tiny, monkeypatch):
    """Each token is a word of five characters. With steps of 6 and 11 held, the nth step's end lets out what lies 11 tokens behind it.

    A word's end is only seen at the next word's beginning: step n is scored at token 6 n + 1. The first lets out nothing, the second one of
    13 that were written; each later one lets out 6, and before it 11 held, 6 of its step and the word in the making weren't shown: 18.
    """
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    guard = Protector(llama_detector, False, threshold=1.0, on_flag="report")
    [token] = guard.detector.template.encode(" tram")
    monkeypatch.setattr(bench_stream, "base_path", lambda: tiny.gguf)
    monkeypatch.setattr(guard.detector.tokenizer, "decode", lambda ids: " tram")
    found = bench_stream.generation(guard, bench_stream.Sizes(answer=60), 2, 1)["held_tokens"]
    assert bench_stream.STEP_TOKENS == 6 and found == {"median": 18.0, "largest": 18.0}  # 13, then 18 seven times
    few = bench_stream.generation(guard, bench_stream.Sizes(answer=5), 2, 1)["held_tokens"]
    assert np.isnan([few["median"], few["largest"]]).all(), "nothing was let out"


def test_one_round_is_refused():
    with pytest.raises(ValueError, match=r"^bench_stream: rounds must be at least 2, got 1\. One number has no spread\.$"):
        bench_stream.run(StreamBenchConfig(rounds=1))


def test_resident_memory_counts_what_is_touched():
    before = bench_stream.resident_bytes()
    if before is None:
        pytest.skip("this system doesn't say how much memory a process has")
    block = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)  # new pages: an allocator may give back what another test freed
    block[:] = 1
    assert 60 << 20 < bench_stream.resident_bytes() - before < 96 << 20 and block.all()


def test_a_quick_run_measures_everything(llama_detector, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    monkeypatch.setattr(bench_stream, "Protector", lambda source, *rest, detector_options, **options: Protector(llama_detector, *rest, **options))
    monkeypatch.setattr(bench_stream, "base_path", lambda: tiny.gguf)
    out = tmp_path / "stream.json"
    bench_stream.main(["--quick", "--threads", "1", "--out", str(out)])
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert written["kind"] == "bench_stream" and written["quick"] and written["run"]["versions"]["llama_cpp_python"]
    assert printed == written["targets"] and {name.split(",")[0] for name in printed} == {
        "scoring", "wait after the last token", "longest push before it", "a token of a long stream", "streams of many clients", "bytes grown over all short streams"}
    assert written["flat"]["ratio"]["n"] == 2 and set(written["flat"]["ms_per_token"]) == {"16 tokens", "80 tokens"}
    assert written["generation"]["share"]["median"] > 0 < written["generation"]["wait_steps"]["median"] and written["generation"]["view_wait_steps"]["n"] == 2
    assert written["generation"]["push_steps"]["n"] == 2 and written["generation"]["push_steps"]["median"] * 60 >= written["generation"]["share"]["median"]
    drawn = blocks.RENDERERS["stream"](written)
    assert "| at least 1.5 |" in drawn and "a view of its own it waits" in drawn and f"tokens behind, {written['generation']['held_tokens']['largest']} at most." in drawn
    assert 0 <= written["others_share"] <= 1 and written["generation"]["held_tokens"].keys() == {"median", "largest"} and written["load_before"] >= 0
    assert written["clients"]["streams"]["ratio"]["median"] > 0 < written["clients"]["whole_answers"]["ratio"]["median"]
    assert written["in_a_row"]["streams"] == 20 and not any(cache.places for cache in llama_detector._streams.caches)
