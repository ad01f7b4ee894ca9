"""The benchmark: its arithmetic by hand, what it compares with against the code it measures, and one small run of each kind."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protector import bench
from protector.bench import Bare, BenchConfig, busy, compared, described, in_turns
from protector.evaluate import blocks
from protector.llama import LlamaDetoxifier

ROOT = Path(__file__).parents[1]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_S", 0)


def test_median_quartiles_and_spread():
    # 9, 10, 11: the quartiles lie half-way to the neighbours, 9.5 and 10.5, and 1 / 10 is the spread.
    assert described([11, 9, 10]) == {"median": 10.0, "low": 9.5, "high": 10.5, "spread": 0.1, "n": 3}
    assert described([0.0, 0.0])["spread"] == 0.0


def test_everyone_takes_a_turn_in_each_round_after_a_warm_up(impatient):
    calls = []
    functions = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    values = in_turns(functions, 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert values == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_a_ratio_survives_a_machine_that_slows_down():
    # Half the speed in each round than in the one before: the numbers spread, the ratio doesn't.
    row = compared("tokens/s", {"guard": [90, 45, 22.5], "bare": [100, 50, 25]})
    assert row["ratios"]["bare"] == {"median": 0.9, "low": 0.9, "high": 0.9, "spread": 0.0, "n": 3}
    assert busy({"compared": {"detector": row}}) == ["compared, detector, values, guard", "compared, detector, values, bare"]
    assert busy({"kind": "bench", "rows": {"x": described([10, 10, 10])}}) == []


def test_one_round_is_refused():
    with pytest.raises(ValueError, match=r"^bench: rounds must be at least 2, got 1\. One number has no spread\.$"):
        bench.run(BenchConfig(rounds=1))


def test_bare_writes_what_the_detoxifier_writes(detoxifier_gguf, tiny):
    # What is compared must do the same work: the same greedy tokens from the same file and adapter.
    detoxifier = LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation="base", n_threads=1)
    bare = Bare(detoxifier.context.weights, 1, bench._adapter(detoxifier))
    prompt = detoxifier.template.detoxifier_prompt([900, 901, 902], list(range(1000, 1060)))
    text, n, _ = detoxifier.generate(prompt, 12)
    ids, first_s, rest_s = bare.write(prompt, n)
    assert n > 4 and detoxifier.tokenizer.decode(ids) == text and first_s > 0 and rest_s > 0
    without, _, _ = Bare(detoxifier.context.weights, 1).write(prompt, n)
    assert without != ids, "the adapter counts"
    # A token that is banned isn't written, and the rest goes on.
    banned, _, _ = bare.write(prompt, n, end=ids[0])
    assert ids[0] not in banned and len(banned) == n


def test_bare_says_when_llama_cpp_fails(detoxifier_gguf, tiny):
    weights = LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation="base", n_threads=1).context.weights
    with pytest.raises(RuntimeError, match=r"^bench: llama.cpp must decode \d+ tokens, got status 1\.$"):
        Bare(weights, 1, n_ctx=512).read([900] * 600)


def test_loaded_weights_and_parameters_of_the_tiny_model(detoxifier_gguf, tiny):
    model = LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation="base", n_threads=1)
    described = bench._of_file(model)
    # A block: q and o of 64 x 64, k and v of 32 x 64, three products with 128, two norms; four of them. Outside: vocabulary and last norm.
    assert described["parameters_of_blocks"] == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64)
    assert described["parameters"] == described["parameters_of_blocks"] + 49152 * 64 + 64
    assert described["adapter_at_run_time"] and bench._loaded_bytes(model) == os.path.getsize(tiny.gguf) + os.path.getsize(detoxifier_gguf)


def made_up(spread=0.0):
    """A result with round numbers."""
    def number(median):
        return {"median": median, "low": median, "high": median, "spread": spread, "n": 9}

    def row(unit, guard, bare, plain):
        return {"unit": unit, "values": {"guard": number(guard), "bare": number(bare), "transformers": number(plain)},
                "ratios": {"bare": number(guard / bare), "transformers": number(guard / plain)}, "not_measured": {"compiled": "no compiler"}}

    result = {
        "kind": "bench", "quick": False, "threads": 2, "busy_bound": bench.BUSY,
        "compared": {"detector, 128 tokens": row("tokens/s", 950.0, 1000.0, 500.0), "rewriting, token by token": row("tokens/s", 80.0, 100.0, 10.0),
                     "start to first verdict": row("s", 1.4, 0.7, 7.0)},
        "guarding": {"answer_tokens": 200, "model": "base.gguf", "generate_s": number(2.0), "guard_percent": number(15.0),
                     "streamed_percent": number(30.0), "wait_steps": number(2.5)},
        "run": {"config": {"rounds": 9}, "cpu": "Some CPU", "cores": 2, "python": "3.11", "versions": {"torch": "2.13.0", "numpy": "2"}}}
    return {**result, "targets": bench.targets(result), "busy": busy(result)}


def test_targets_say_what_was_missed():
    found = {target["what"]: target["met"] for target in made_up()["targets"]}
    assert found == {
        "cost of a harmless answer, % of its generation": True,  # 15 of at most 15
        "wait at a stream's end, generation steps": False,  # 2.5 of at most 2
        "detector, 128 tokens: share of llama.cpp bare": True,  # 0.95 of at least 0.9
        "detector, 128 tokens: times transformers eager": True,  # 1.9 of at least 1.5
        "rewriting: share of llama.cpp bare": False,  # 0.8
        "start to first verdict, s": True}


def test_the_readme_table_comes_from_the_result():
    text = blocks.RENDERERS["bench"](json.loads(json.dumps(made_up())))
    assert "| detector, 128 tokens | tokens/s | 950 (±0 %) | 1,000 (±0 %) | 500 (±0 %) | - | 0.95 | 1.90 |" in text
    assert "costs 15.0 (±0 %) % more" in text and "| wait at a stream's end, generation steps | at most 2 | 2.50 | **missed** |" in text
    assert "2 thread(s), Some CPU, 2 cores, Python 3.11, torch 2.13.0. Median of 9 rounds" in text
    assert "busy" not in text and "mean nothing" not in text


def test_a_busy_machine_is_named_in_the_table():
    text = bench.markdown({**made_up(spread=0.3), "quick": True})
    assert "950 (±15 %, busy)" in text and "**The machine was busy**: 19 numbers spread over more than 10 %." in text
    assert "**A quick run: these numbers mean nothing.**" in text


def protector(*arguments):
    done = subprocess.run([sys.executable, "-m", "protector", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_quick_run_measures_everything(real_base, tmp_path):
    pytest.importorskip("torch", reason="transformers are compared where torch is")
    done = protector("bench", "--quick", "--threads", "1", "--out", str(tmp_path / "bench.json"))
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["compared"]) == {"detector, 32 tokens", "detector, token by token", "rewriting, token by token", "first rewritten token",
                                       "start to first verdict", "resident memory", "training"}
    for title, row in result["compared"].items():
        assert {"guard", "transformers"} <= row["values"].keys(), title
        assert all(number["median"] > 0 for number in [*row["values"].values(), *row["ratios"].values()]), title
        assert "bare" in row["values"] or title == "training"
    assert len(result["targets"]) == 8 and result["guarding"]["guard_percent"]["median"] > 0
    assert result["machine"]["matmul_flop_per_s"]["median"] > 0 and all(np.isfinite(share) for share in result["machine"]["shares"].values())
    assert result["threads"] == 1 and result["run"]["config"]["quick"] and result["run"]["versions"]["llama_cpp_python"]
    assert done.stdout.strip() == bench.markdown(result).strip()
    for name in result["busy"]:
        assert f"bench: {name} spread over more than 10 %. Run again on a quiet machine." in done.stderr


def test_a_quick_sweep_measures_each_axis(real_base, tmp_path):
    done = protector("bench", "--quick", "--sweep", "--threads", "1", "--out", str(tmp_path / "sweep.json"))
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["kind"] == "bench_sweep" and set(result["axes"]) == {
        "depth", "quantisation", "LoRA", "threads", "detoxifier, merged", "detoxifier, LoRA at run time"}
    assert set(result["axes"]["LoRA"]) == {"merged, or none", "at run time"} and "1" in result["axes"]["threads"]
    points = [point for axis in result["axes"].values() for point in axis.values()]
    assert all(point["prefill"]["median"] > 0 and point["token by token"]["median"] > 0 for point in points)
    assert result["axes"]["depth"]["2"]["bytes"] < result["axes"]["quantisation"]["Q8_0"]["bytes"]
    assert done.stdout.strip() == blocks.RENDERERS["bench_sweep"](result).strip()
