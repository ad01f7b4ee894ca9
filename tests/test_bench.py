"""The benchmark: its arithmetic by hand, what it compares with against the code it measures, and one small run of each kind."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MILD_PAIRS, canaries_of, sequences_of

from protector import bench
from protector.bench import Bare, BenchConfig, busy, compared, described, in_turns
from protector.errors import ModelError
from protector.evaluate import blocks, record
from protector.gguf import export_merged
from protector.llama import LlamaDetector, LlamaDetoxifier

ROOT = Path(__file__).parents[1]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_S", 0)


def test_median_quartiles_and_spread():
    # 9, 10, 11: the quartiles lie half-way to the neighbours, 9.5 and 10.5, and 1 / 10 is the spread.
    assert described([11, 10, 9, 10]) == {"median": 10.0, "low": 9.75, "high": 10.25, "spread": 0.05, "n": 4}
    assert described([11, 9]) == {"median": 10.0, "low": 9.0, "high": 11.0, "spread": 0.2, "n": 2}  # quartiles would hide half of it
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
    for name in ("rounds", "trainings"):
        with pytest.raises(ValueError, match=rf"^bench: {name} must be at least 2, got 1\. One number has no spread\.$"):
            bench.run(BenchConfig(**{name: 1}))


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


def test_bare_runs_the_detectors_own_file(llama_detector):
    # It has no vocabulary: rows of the embedding go in, and what comes out under the head is the guard's own logit.
    context, metadata, ids = llama_detector.context, llama_detector.metadata, sequences_of(llama_detector, MILD_PAIRS)[0]
    bare = Bare(context.weights, 1)
    assert context.weights.embedding is not None

    def logit():
        hidden = np.ctypeslib.as_array(bench.llama_cpp.llama_get_logits_ith(bare.pointer, -1), (context.n_embd,))
        return hidden @ metadata.head_weight + metadata.head_bias

    wanted = llama_detector.running_logits([ids], [0])[0]
    bare.read(ids)
    # Keys and values are float16 in both; bare's attention sums values in float16 as well (llama.py), some 8e-3.
    assert logit() == pytest.approx(wanted[-1], abs=2e-2) and np.ptp(wanted) > 0.5
    assert bare.feed(ids[:3], ids[3:9]) > 0 and logit() == pytest.approx(wanted[8], abs=2e-2)


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


def test_loaded_bytes_of_a_merged_detector(llama_detector, torch_detector, tiny, tmp_path):
    # The copy with the adapter merged has no vocabulary: the embedding's rows are a file beside it, 49,152 x 64 float32 behind NumPy's 128 bytes.
    path = llama_detector.context.weights.path
    assert path.with_suffix(".npy").stat().st_size == 128 + 49152 * 64 * 4
    assert bench._loaded_bytes(llama_detector) == path.stat().st_size + 128 + 49152 * 64 * 4
    # A whole model is one file, whatever lies beside it.
    export_merged(torch_detector, tmp_path / "merged.gguf", "F16", tiny.gguf, canaries_of(torch_detector))
    np.save(tmp_path / "merged.npy", np.zeros((3, 3)))
    assert bench._loaded_bytes(LlamaDetector(tmp_path / "merged.gguf", n_threads=1)) == (tmp_path / "merged.gguf").stat().st_size


@pytest.fixture
def plain(torch_detector, torch_detoxifier, tmp_path, monkeypatch):
    """Plain on the tiny models, in float32."""
    import torch
    from protector import export, train

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend="eager", **options))  # traced; the kernels aren't ours
    monkeypatch.setattr(train, "bf16_is_faster", lambda device: False)
    monkeypatch.setattr(export, "CANARIES", [(c["question"], c["answer"], c["label"]) for c in canaries_of(torch_detector)])
    torch_detector.save(tmp_path / "detector")
    torch_detoxifier.save(tmp_path / "detoxifier")
    threads = torch.get_num_threads()
    plain = bench.Plain(tmp_path / "detector", tmp_path / "detoxifier", tmp_path / "hf", 1)
    torch.set_num_threads(threads)
    return plain


def test_the_compiled_model_scores_as_the_eager_one(plain, torch_detector):
    """Regression: `model or self.classifier` asked the compiled one for its length, and every run said TypeError."""
    ids = sequences_of(torch_detector, MILD_PAIRS)[0]
    assert plain.score(ids, plain.compiled) == pytest.approx(plain.score(ids), abs=1e-5)
    # The checkpoint's head has no bias. Products in another order: 1e-4, as in test_export.py.
    assert plain.score(ids) == pytest.approx(torch_detector.logits([ids])[0] - torch_detector.head.bias.item(), abs=1e-4)


def test_the_exported_detector_must_be_the_guards(plain, llama_detector):
    plain.check(llama_detector)
    plain.classifier.config.head_bias = 0.0  # it was -0.25
    with pytest.raises(ModelError, match=r"^bench: exported detector must have the guard's logit, -?\d\.\d{3}, to within 0\.2, got -?\d\.\d{3}\. Run tests"):
        plain.check(llama_detector)


def test_prompts_and_tokens_behind_them_are_compiled(plain, torch_detoxifier, impatient, monkeypatch):
    import torch

    prompts, read = iter([list(range(900, 930)), list(range(900, 945))]), []
    model = SimpleNamespace(
        template=SimpleNamespace(rewrite_prompt=lambda question, rejected: next(prompts)), context=SimpleNamespace(weights=None),
        limits=SimpleNamespace(rewrite_tokens=9), generate=lambda prompt, most, deadline: [deadline() for _ in range(3)])
    monkeypatch.setattr(bench, "Bare", lambda *arguments: SimpleNamespace(write=lambda prompt, n: ([], 1.0, 1.0)))
    compiled = plain.compiled_lm
    plain.compiled_lm = lambda **arguments: read.append((arguments["input_ids"].shape[1], compiled(**arguments))) or read[-1][1]
    rows = bench._rewriting(model, plain, 2, bench.Sizes(rewrites=2), 1)
    for row in rows.values():
        assert row["values"].keys() == {"guard", "bare", "transformers", "compiled"} and not row["not_measured"]
    # To compile, to warm up and in two rounds: two tokens behind each prompt, then both prompts.
    assert [n for n, _ in read] == 4 * [1, 1, 1, 1, 30, 45]
    # The logits are the detoxifier's, also on the cache of a fixed length.
    ids = list(range(900, 930))
    with torch.no_grad():
        for i in (4, 0, 1):
            logits = torch_detoxifier.lm(torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(read[i][1].logits[0, -1], logits, atol=2e-3)  # as in test_export.py: logits of up to 20
            ids.append(int(logits.argmax()))


def test_a_compiled_detector_reads_on_as_the_eager_one(plain, torch_detector):
    ids, states = sequences_of(torch_detector, MILD_PAIRS)[0], []
    wanted = plain.classifier.base_model(input_ids=plain._batch(ids)).last_hidden_state[0]
    compiled = plain.compiled_body
    assert plain.feed(ids[:-3], ids[-3:], lambda **arguments: states.append(compiled(**arguments)) or states[-1]) > 0
    for state, expected in zip(states, wanted[-3:], strict=True):
        assert np.allclose(state.last_hidden_state[0, -1].detach(), expected.detach(), atol=1e-4)


def test_why_a_compiler_failed_is_kept(impatient, monkeypatch):
    class Model:
        template = metadata = context = SimpleNamespace(weights=None)

        def running_logits(self, sequences, starts):
            return []

    class Plain:
        compiled, backend = "compiled", Model()

        def score(self, ids, model=None):
            if model is not None:
                raise RuntimeError("no compiler:\n  c++ is missing")

    monkeypatch.setattr(bench, "_ids", lambda detector, n: ([7] * n, 0))
    monkeypatch.setattr(bench, "Bare", lambda weights, n_threads: SimpleNamespace(read=lambda ids: None))
    row = bench._prefill(Model(), Plain(), 4, 2, bench.Sizes(), 1)
    assert row["not_measured"] == {"compiled": "torch.compile failed with RuntimeError: no compiler: c++ is missing"}
    assert row["values"].keys() == {"guard", "bare", "torch", "transformers"}


def test_int8_stands_beside_the_eager_and_the_compiled_model(plain, torch_detector, exact_int8, impatient, monkeypatch, capsys):
    loaded, int8 = [], plain.int8
    monkeypatch.setattr(plain, "int8", lambda compile: loaded.append((compile, int8(compile))) or loaded[-1][1])
    sizes = bench.Sizes(prefill=(40, 70))
    rows = bench._in_int8(torch_detector, plain, 2, sizes)
    assert [compile for compile, _ in loaded] == [False, True] and all(model.quantisation == "INT8" for _, model in loaded)
    assert list(rows) == ["detector in INT8, 40 tokens", "detector in INT8, 70 tokens", "detector in INT8, compiled, 40 tokens", "detector in INT8, compiled, 70 tokens"]
    for row in rows.values():
        assert row["values"].keys() == {"guard", "transformers", "compiled"} and row["not_measured"] == {"bare": "int8 is PyTorch's"}

    def refuses(compile):
        raise ModelError("check_product: int8 products must be exact on this CPU, got others. Choose another quantisation.")

    monkeypatch.setattr(plain, "int8", refuses)
    assert bench._in_int8(torch_detector, plain, 2, sizes) == {}
    assert "bench: detector in INT8, compiled isn't measured: ModelError: check_product: int8 products" in capsys.readouterr().err


def test_a_machines_limit_is_the_faster_product(monkeypatch):
    import torch

    asked = []

    def in_turns(functions, rounds, warms_up=True):
        asked.append({name: function() > 0 for name, function in functions.items()})
        return {"float32": [100.0] * rounds, "bfloat16": [400.0] * rounds, "copy": [50.0] * rounds}

    monkeypatch.setattr(bench, "in_turns", in_turns)
    number = {"guard": {"median": 10.0}}
    result = {"compared": {"detector, 32 tokens": {"values": number}, "rewriting, token by token": {"values": number},
                           "detector, token by token": {"values": number}},
              "models": {"detector": {"parameters_of_blocks": 6, "bytes": 4}, "detoxifier": {"bytes": 3}}}
    plain = SimpleNamespace(torch=torch, device=torch.device("cpu"), dtype=torch.bfloat16)
    machine = bench._machine(plain, bench.QUICK, 2, result)
    assert asked == [{"float32": True, "bfloat16": True, "copy": True}]
    assert (machine["device"], machine["matmul_type"], machine["matmul_flop_per_s"]["median"]) == ("cpu", "bfloat16", 400.0)
    # 2 operations x 6 weights x 10 tokens/s of 400; 3 and 4 bytes x 10 tokens/s of 50
    assert machine["shares"] == {"detector, 32 tokens, of the matrix product": 0.3, "rewriting, of the copy": 0.6, "detector, token by token, of the copy": 0.8}
    plain.dtype = torch.float32  # bf16 is emulated there
    monkeypatch.setattr(bench, "in_turns", lambda functions, rounds: {name: [1.0] * rounds for name in functions})
    assert bench._machine(plain, bench.QUICK, 2, result)["matmuls_flop_per_s"].keys() == {"float32"}


def test_training_is_timed_eager_and_compiled_in_one_precision(impatient, hf_ids, tmp_path, monkeypatch):
    import torch
    from protector import models, train

    # Steps of 10, 20, 30 and 40 tokens that begin at 0, 5, 6 and 8 s: the second and the third took 3 s.
    batches = [[[{"ids": [7] * 10}] * n] for n in (1, 2, 3, 4)]
    trained, theirs = [], []

    def fake_train(config, progress):
        trained.append((config.compile, config.epochs, config.seed))
        out, speed = Path(config.out), 2 if config.compile else 1
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").write_text("".join(json.dumps({"elapsed_s": at / speed}) + "\n" for at in (0, 5, 6, 8)))
        (out / "run.json").write_text(json.dumps({"bf16": True}))

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setattr(train, "load_rows", lambda config: [])
    monkeypatch.setattr(train, "_epoch", lambda config, rows, template, epoch: batches)
    monkeypatch.setattr(models, "load_tokenizer", lambda: hf_ids)
    monkeypatch.setattr(models, "build", lambda config: SimpleNamespace(backbone=None))
    monkeypatch.setattr(bench, "_trainer_rate", lambda *arguments: theirs.append((len(arguments[1]), *arguments[-3:])) or 10.0)
    plain, sizes = SimpleNamespace(torch=torch, device=torch.device("cpu")), bench.Sizes(trainings=2, steps=2)
    rows = bench._training(2, plain, tmp_path / "both", sizes, 1, compiles=True)
    assert {title: row["values"]["guard"]["median"] for title, row in rows.items()} == {
        "training": pytest.approx(50 / 3), "training, compiled": pytest.approx(100 / 3)}
    # Like beside like: both eager, both compiled, each in the column of its name; and compiled beside the eager Trainer.
    assert {title: {name: ratio["median"] for name, ratio in row["ratios"].items()} for title, row in rows.items()} == {
        "training": {"transformers": pytest.approx(5 / 3)}, "training, compiled": {"compiled": pytest.approx(10 / 3), "transformers": pytest.approx(10 / 3)}}
    assert sorted(trained) == 2 * [(False, 3.5 / 4, 0)] + 2 * [(True, 3.5 / 4, 0)], "two rounds, always of the same batches"
    # Twice the 6 rows of 3 steps, of which 2 count as in train, in the precision that train chose.
    assert sorted(theirs) == 2 * [(12, 3, True, False)] + 2 * [(12, 3, True, True)]
    assert [row["not_measured"].keys() for row in rows.values()] == [{"bare", "compiled"}, {"bare"}]
    assert bench._training(2, plain, tmp_path / "eager", sizes, 1, compiles=False).keys() == {"training"}


def made_up(spread=0.0):
    """A result with round numbers."""
    def number(median):
        return {"median": median, "low": median, "high": median, "spread": spread, "n": 9}

    def row(unit, guard, bare, plain):
        return {"unit": unit, "values": {"guard": number(guard), "bare": number(bare), "transformers": number(plain)},
                "ratios": {"bare": number(guard / bare), "transformers": number(guard / plain)}, "not_measured": {"compiled": "no compiler"}}

    result = {
        "kind": "bench", "quick": False, "threads": 2, "busy_bound": bench.BUSY,
        "compared": {"detector, 128 tokens": row("tokens/s", 950.0, 1000.0, 500.0), "detector, 512 tokens": row("tokens/s", 800.0, 1000.0, 500.0),
                     "detector, token by token": row("tokens/s", 10.0, 100.0, 10.0), "rewriting, token by token": row("tokens/s", 80.0, 100.0, 10.0),
                     "start to first verdict": row("s", 1.4, 0.7, 7.0)},
        "guarding": {"answer_tokens": 200, "model": "base.gguf", "generate_s": number(2.0), "guard_percent": number(15.0),
                     "streamed_percent": number(30.0), "wait_steps": number(2.5), "push_steps": number(1.5), "begin_steps": number(3.0)},
        "run": {"config": {"rounds": 9}, "cpu": "Some CPU", "cores": 2, "python": "3.11", "versions": {"torch": "2.13.0", "numpy": "2"}}}
    return {**result, "targets": bench.targets(result), "busy": busy(result)}


def test_targets_say_what_was_missed():
    found = {target["what"]: target["met"] for target in made_up()["targets"]}
    assert found == {
        "cost of a harmless answer, % of its generation": True,  # 15 of at most 15
        "wait at a stream's end, generation steps": False,  # 2.5 of at most 2
        "longest wait within a stream, generation steps": True,  # 1.5
        "detector, 128 tokens: share of llama.cpp bare": True,  # 0.95 of at least 0.9
        "detector, 128 tokens: times transformers eager": True,  # 1.9 of at least 1.5
        "detector, 512 tokens: share of llama.cpp bare": False,  # 0.8
        "detector, 512 tokens: times transformers eager": True,  # 1.6
        "rewriting: share of llama.cpp bare": False,  # 0.8
        "start to first verdict, s": True}


def test_targets_of_training_name_what_stands_beside_it():
    rows = {title: {"ratios": {"transformers": {"median": ratio, "spread": 0.0}}} for title, ratio in (("training", 1.4), ("training, compiled", 1.6))}
    result = made_up()
    found = {target["what"]: target["met"] for target in bench.targets({**result, "compared": {**result["compared"], **rows}})}
    assert not found["training: times a plain Trainer, both eager"] and found["training, compiled: times a plain Trainer, eager"]
    rows["training, compiled"]["ratios"] = {"compiled": rows["training"]["ratios"]["transformers"]}  # as results had it before
    assert len(bench.targets({**result, "compared": {**result["compared"], **rows}})) == len(found) - 1


def test_the_readme_table_comes_from_the_result():
    text = blocks.RENDERERS["bench"](json.loads(json.dumps(made_up())))
    assert "| detector, 128 tokens | tokens/s | 950 (±0 %) | 1,000 (±0 %) | - | 500 (±0 %) | - | 0.95 | 1.90 |" in text
    assert "costs 15.0 (±0 %) % more" in text and "| wait at a stream's end, generation steps | at most 2 | 2.50 | **missed** |" in text
    assert "| detector, 512 tokens: share of llama.cpp bare | at least 0.9 | 0.80 | **missed** |" in text
    assert "2 thread(s), Some CPU, 2 cores, Python 3.11, torch 2.13.0. Median of 9 rounds" in text
    assert "busy" not in text and "mean nothing" not in text and "This machine" not in text


def test_the_machines_limits_stand_under_the_table():
    number = {"median": 327e9, "spread": 0.02}
    machine = {"matmul_flop_per_s": number, "copy_bytes_per_s": {**number, "median": 23.9e9}, "shares": {"detector, 512 tokens, of the matrix product": 0.359}}
    # Results of before the product had other types are float32's, on the CPU.
    for new, where in (({}, "cpu): a matrix product in float32"), ({"device": "cuda", "matmul_type": "bfloat16"}, "cuda): a matrix product in bfloat16")):
        text = bench.markdown({**made_up(), "machine": {**machine, **new}})
        assert f"\n\nThis machine ({where} with 327 (±1 %) GFLOP/s, a copy with 23.9 (±1 %) GB/s.\nReached: detector, 512 tokens, of the matrix product 36 %.\n" in text


def test_a_busy_machine_is_named_in_the_table():
    text = bench.markdown({**made_up(spread=0.3), "quick": True})
    assert "950 (±15 %, busy)" in text and "**Busy**: numbers that spread over more than 10 %, here 31." in text
    assert "**A quick run: these numbers mean nothing.**" in text
    assert "| 15.00 | met, busy |" in text and "| 2.50 | **missed**, busy |" in text


def test_other_work_before_the_start_is_named_in_the_table():
    quiet, loaded = (bench.markdown({**made_up(), "load_before": load}) for load in (1.0, 1.1))  # of 2 cores
    assert "Load average before the start 1.0.\n" in quiet + "\n" and "busy" not in quiet
    assert "Load average before the start 1.1; **busy**: above 0.5 of the cores, or 5 %." in loaded
    for state in ({"load_before": 1e6}, {"load_before": 0.0, "others_share": 0.06}):
        assert all(target["busy"] for target in bench.targets({**made_up(), **state}))
    assert "Load average before the start 0.0; other processes took 6.0 % of the CPU time since; **busy**" in bench.markdown({**made_up(), **state})


@pytest.mark.parametrize("elsewhere", [{"run": {**made_up()["run"], "cores": 4}}, {"models": {"gpu_offload": True}}, {"transformers": {"device": "cuda"}}])
def test_targets_for_two_cores_are_not_judged_elsewhere(elsewhere):
    result = {**made_up(), **elsewhere}
    text = bench.markdown({**result, "targets": bench.targets(result)})
    assert {target["met"] for target in bench.targets(result)} == {None} and "| 15.00 | not judged |" in text and "missed" not in text


def test_the_table_says_what_is_left_out_and_names_the_gpu(impatient, monkeypatch, tmp_path):
    for name in ("LlamaDetector", "LlamaDetoxifier", "_of_file", "_prefill", "_streaming", "_rewriting", "_guarding", "_starting"):
        monkeypatch.setattr(bench, name, lambda *arguments, **options: {})
    monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
    result = bench.measure(BenchConfig(), bench.QUICK, 2, 1)
    assert result["transformers"] is None and "machine" not in result and result["left_out"].endswith("training: they need the package torch")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "Some GPU"),
                                                              version=SimpleNamespace(cuda="12.8")))
    run = {**made_up()["run"], **{name: value for name, value in record.provenance().items() if name in ("gpu", "cuda")}}
    text = bench.markdown({**made_up(), "left_out": result["left_out"], "run": run})
    assert "2 cores, Some GPU with CUDA 12.8, Python" in text and f"\nLeft out: {result['left_out']}." in text


def test_a_killed_process_is_named(monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda *arguments, **options: SimpleNamespace(returncode=-9, stderr=""))
    with pytest.raises(RuntimeError, match=r"^bench: a fresh guard process must end well, got: status -9$"):
        bench._child("guard", {})


def test_a_rewrite_may_have_no_token(impatient, monkeypatch):
    lengths = iter([0, 3, 0, 3, 0, 3, 0, 3])  # of two prompts, once counted, once to warm up, in two rounds

    def generate(prompt, most, deadline):
        for _ in range(1 + next(lengths)):
            deadline()

    template = SimpleNamespace(rewrite_prompt=lambda question, rejected: [1])
    model = SimpleNamespace(template=template, generate=generate, context=SimpleNamespace(weights=None), limits=SimpleNamespace(rewrite_tokens=9))
    monkeypatch.setattr(bench, "Bare", lambda *arguments: SimpleNamespace(write=lambda prompt, n: ([], 1.0, 1.0)))
    sizes = bench.Sizes(rewrites=2)
    rows = bench._rewriting(model, None, 2, sizes, 1)
    assert rows["rewriting, token by token"]["tokens_written"] == 3 and rows["first rewritten token"]["values"]["guard"]["median"] > 0
    with pytest.raises(ModelError, match="must rewrite one of the harmful answers"):
        lengths = iter([0, 0])
        bench._rewriting(model, None, 2, sizes, 1)


def protector(*arguments):
    done = subprocess.run([sys.executable, "-m", "protector", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_quick_run_measures_everything(real_base, tmp_path):
    pytest.importorskip("torch", reason="transformers are compared where torch is")
    done = protector("bench", "--quick", "--threads", "1", "--out", str(tmp_path / "bench.json"))
    result = json.loads((tmp_path / "bench.json").read_text())
    has_int8 = "detector in INT8 isn't measured: ModelError: check_product" not in done.stderr
    assert set(result["compared"]) - ({"detector in INT8, 32 tokens"} if has_int8 else set()) == {
                                       "detector, 32 tokens", "detector, token by token", "rewriting, token by token", "first rewritten token",
                                       "start to first verdict", "peak memory", "training"}
    for title, row in result["compared"].items():
        assert {"guard", "transformers"} <= row["values"].keys(), title
        assert all(number["median"] > 0 for number in [*row["values"].values(), *row["ratios"].values()]), title
        assert "bare" in row["values"] or title in ("training", "detector in INT8, 32 tokens") and "bare" in row["not_measured"]
        assert "compiled" in row["not_measured"]
    assert len(result["targets"]) == 10 + has_int8 and result["guarding"]["push_steps"]["median"] > 0 and result["guarding"]["guard_percent"]["median"] > 0
    assert result["machine"]["matmul_flop_per_s"]["median"] > 0 and all(np.isfinite(share) for share in result["machine"]["shares"].values())
    both = result["compared"]["peak memory"]["both"]
    assert both["of_gguf"]["median"] >= both["of_mapped"]["median"] > 0 and result["others_bound"] == bench.OTHERS and result["load_before"] >= 0
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
