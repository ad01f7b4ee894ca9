"""One backbone for both tasks: its states, the prompt that goes on from the detector's sequence, and a run on the tiny models."""
import json

import numpy as np
import pytest
from conftest import MILD_PAIRS, sequences_of

torch = pytest.importorskip("torch", reason="states are compared with torch's")

from protector import bench  # noqa: E402
from protector.evaluate import blocks, shared  # noqa: E402
from protector.evaluate.shared import SharedConfig  # noqa: E402
from protector.llama import LlamaDetoxifier, _Context  # noqa: E402

ROWS = [{"question": f"How do I clean item {i // 2}?", "answer": f"Use water and wait {i} minutes." if i % 2 else f"Drink it, all {i} of it.",
         "label": 1 - i % 2, "source": "made_up"} for i in range(40)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def detoxifier(detoxifier_gguf, tiny):
    return LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation="F32", n_threads=1)


def test_states_are_those_of_the_detoxifier(detoxifier, torch_detoxifier, llama_detector):
    sequences = sequences_of(llama_detector, MILD_PAIRS) + [[900 + i for i in range(600)]]  # the last one is longer than a batch
    found = shared.states(_Context(detoxifier.context.weights, None, 1024, True, 1), sequences)
    for state, ids in zip(found, sequences):
        with torch.inference_mode():
            expected = torch_detoxifier.lm(torch.tensor([ids]), output_hidden_states=True, logits_to_keep=1).hidden_states[-1][0, -1].numpy()
        assert np.abs(state - expected).max() < 1e-2 and np.ptp(expected) > 1  # llama.cpp keeps keys and values in float16


def test_the_cache_of_the_detectors_sequence_leads_to_the_same_rewrite(detoxifier, llama_detector):
    bare = bench.Bare(detoxifier.context.weights, 1)

    def logits():
        return np.ctypeslib.as_array(bench.llama_cpp.llama_get_logits_ith(bare.pointer, -1), (bare.n_vocab,)).copy()

    parts = shared.prompts(detoxifier)
    row = bench.data.spread(bench.data.read("own")[1], shared.REWRITES)[0]
    template = llama_detector.template  # the detector's own: both read one sequence
    assert parts[0][0] == template.detector_sequence(template.clip_question(row.question)[0], template.encode(row.rejected))[0]
    for read, behind in parts:
        bare.read(read + behind)
        whole = logits()
        bare.read(read)
        bare.step(behind)
        assert len(behind) < 10 and np.abs(logits() - whole).max() < 5e-3 * np.ptp(whole)  # bare's attention sums values in float16
        bare.step(behind)
        assert np.abs(logits() - whole).max() > 0.1 * np.ptp(whole), "a cache of other ids leads elsewhere"


def test_a_run_writes_quality_speed_and_memory(llama_detector, detoxifier, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    monkeypatch.setattr(shared, "ROUNDS", 2)
    monkeypatch.setattr(shared, "LlamaDetector", lambda path, n_threads: llama_detector)
    monkeypatch.setattr(shared, "LlamaDetoxifier", lambda path, n_threads: detoxifier)
    shared.main(["--train", rows, "--measure", rows, "--most", "30", "--threads", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "shared.json").read_text())
    theirs, ours = llama_detector.context.weights.path, detoxifier.context.weights.path
    two, one = (sum(path.stat().st_size for path in files) for files in ((theirs, theirs.with_suffix(".npy"), ours), (ours,)))
    assert result["kind"] == "shared" and 0 <= result["others_share"] <= 1 and result["bytes"] == {"two": two, "one": one} and result["fitted_on"] == 30
    found = result["sources"]["made_up"]
    assert found["n"] == 30 and found["one backbone"]["auroc"] > 0.95  # fitted on the same rows
    assert found["one backbone"]["difference"]["auroc"] == pytest.approx(found["one backbone"]["auroc"] - found["detector"]["auroc"], abs=1e-5)
    numbers = [number for part in (*result["scoring_ms"].values(), result["first_token_ms"]) for number in part.values() if isinstance(number, dict)]
    assert len(numbers) == 8 and all(number["median"] > 0 and number["n"] == 2 for number in numbers)
    assert 0 < result["first_token_ms"]["of_them_cached"] < result["first_token_ms"]["prompt_tokens"]
    table = blocks.RENDERERS["shared"](result)
    assert f"| made_up | 30 ({found['harmful']}) | {found['detector']['auroc']:.3f} [" in table and "| scoring 200 answer tokens, ms |" in table
    assert f"| files loaded, MB | {two / 1e6:.0f} | {one / 1e6:.0f} | {one / 1e6:.0f} |" in table
    assert ["**Busy**" in blocks.RENDERERS["shared"]({**result, "load_before": load, "others_share": 0.0}) for load in (1e6, None)] == [True, False]
    assert "made_up" in capsys.readouterr().out and "clean item" not in (tmp_path / "shared.json").read_text()


def test_rows_of_one_label_fit_nothing(rows, tmp_path):
    harmless = tmp_path / "harmless.jsonl"
    harmless.write_text("".join(json.dumps(row) + "\n" for row in ROWS if not row["label"]))
    message = r"^shared: train, and a source of measure, must hold harmful and harmless answers, got none of one\. Pass other files\.$"
    for train, measure, sources in ((str(harmless), rows, ()), (rows, str(harmless), ()), (rows, rows, ("absent",))):
        with pytest.raises(ValueError, match=message):
            shared.run(SharedConfig((train,), (measure,), sources, out=str(tmp_path)))
