"""Int8 products: the arithmetic by hand, a detector beside float32's, and what such a detector doesn't do."""
import io
import json

import numpy as np
import pytest
import torch
from conftest import MILD_PAIRS, canaries_of, sequences_of
from torch import nn

from protector import int8, selftest
from protector.__main__ import main
from protector.errors import ModelError
from protector.gguf import export_adapter, export_merged
from protector.guard import Protector
from protector.models import load
from protector.serve import ServeConfig, create_app


@pytest.fixture
def folder(torch_detector, tmp_path, monkeypatch):
    """The tiny detector as a folder that guards."""
    monkeypatch.setattr("protector.canaries.CANARIES", [(c["question"], c["answer"], c["label"]) for c in canaries_of(torch_detector)])
    torch_detector.save(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.fixture
def detector(folder, exact_int8):
    return load(folder, kind="detector", quantisation="INT8")


# -- one linear layer

def test_a_case_by_hand():
    """Row 1 has the scale 2 / 127: 2 -> 127, 1 -> 63.5 -> 64 (to even). W's rows 1 / 127 and .5 / 127: [127, -127], [127, 64]."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.25]]))
        linear.bias.copy_(torch.tensor([10.0, 0.0]))
    y = int8.Int8Linear(linear)(torch.tensor([[2.0, 1.0]]))
    expected = [2 / 127 / 127 * (127 * 127 - 64 * 127) + 10, 2 / 127 * 0.5 / 127 * (127 * 127 + 64 * 64)]
    assert y[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (2, 3, 5), (1, 129, 5)])
def test_it_is_the_equation_in_float64(shape):
    generator = torch.Generator().manual_seed(3)
    linear, x = nn.Linear(5, 11), torch.randn(shape, generator=generator) * torch.tensor([1, 10, 0.1, 1, 100])

    def rounded(values):  # (..., K) -> the same, as its integers times its scale
        scale = values.abs().amax(-1, keepdim=True) / 127
        return (values / scale).round() * scale

    expected = rounded(x).double() @ rounded(linear.weight.detach()).double().T + linear.bias.detach().double()
    # Three roundings of float32 on sums below 500.
    assert (int8.Int8Linear(linear)(x).double() - expected).abs().max() < 3 * 2**-24 * 500


def test_a_part_of_a_larger_tensor():
    linear, x = nn.Linear(6, 4, bias=False), torch.randn(3, 5, 20)
    layer = int8.Int8Linear(linear)
    assert torch.equal(layer(x[:, 1:4, 2:8]), layer(x[:, 1:4, 2:8].contiguous()))


def test_rows_of_zeros_and_what_is_no_number():
    """A row's scale keeps a NaN or Inf from being rounded to a number: a guard must see it."""
    layer = int8.Int8Linear(nn.Linear(3, 2, bias=False))
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, 2.0, 3.0]])
    y = layer(x)
    assert (y[0] == 0).all() and y[1:3].isnan().all() and torch.equal(y[3:], layer(x[3:]))


def test_a_row_does_not_depend_on_its_batch():
    layer, x = int8.Int8Linear(nn.Linear(64, 33)), torch.randn(200, 64)
    whole = layer(x)
    for begin, end in ((0, 1), (3, 12), (0, 128), (199, 200)):
        assert torch.equal(layer(x[begin:end]), whole[begin:end])


def test_a_machine_whose_products_do_not_fit_is_refused(folder, exact_int8, monkeypatch):
    """Before VNNI rows were shifted to 0 to 255, and pairs of their products summed in int16 and cut to it: 2 x 255 x 127 is too much."""
    def saturating(rows, weight):
        sums, shifted, weight = 0, rows.int() + 128, weight.int()
        for k in range(0, weight.shape[1], 2):
            sums += (shifted[:, k:k + 2] @ weight[:, k:k + 2].t()).clamp(-2**15, 2**15 - 1)  # (n, N)
        return sums - 128 * weight.sum(1, dtype=torch.int32)

    few = torch.tensor([[3, -2], [50, 7]], dtype=torch.int8)
    assert torch.equal(saturating(few, few), int8.product(few, few))  # small ones are right there, too
    monkeypatch.setattr(int8, "product", saturating)
    with pytest.raises(ModelError) as error:
        load(folder, kind="detector", quantisation="INT8")
    assert str(error.value) == "check_product: int8 products must be exact on this CPU, got others. Choose another quantisation."


# -- a detector

def test_scores_beside_float32(detector, torch_detector):
    """Adapters merged, every linear layer of the blocks replaced, the head and the norms left."""
    kinds = [type(module) for module in detector.blocks.modules()]
    assert nn.Linear not in kinds and kinds.count(int8.Int8Linear) == 7 * len(detector.blocks.layers) and type(detector.head) is nn.Linear
    sequences = sequences_of(detector, MILD_PAIRS)
    found, wanted = detector.logits(sequences), torch_detector.logits(sequences)
    # A rounding is at most 1/254 of a row's largest value; random ones of some 56 layers on states near 1, over 64 weights of size 1/8.
    assert 0 < np.abs(found - wanted).max() < 56**0.5 * 3 / 254
    assert detector.quantisation == "INT8" and detector.model_sha256 == torch_detector.model_sha256


def test_a_sequence_is_scored_alone(detector, monkeypatch):
    sequences, shapes = sequences_of(detector, MILD_PAIRS), []
    hidden = detector.hidden
    monkeypatch.setattr(detector, "hidden", lambda ids: shapes.append(tuple(ids.shape)) or hidden(ids))
    together = detector.logits(sequences)
    assert sorted(shapes) == sorted((1, len(ids)) for ids in sequences)
    assert np.array_equal(together, [detector.logits([ids])[0] for ids in sequences])
    running = detector.running_logits(sequences, [len(ids) - 3 for ids in sequences])
    assert np.array_equal(together, [part[-1] for part in running])


def test_a_guard_in_int8_of_a_folder_and_of_a_file(folder, detector_gguf, tiny, exact_int8, monkeypatch):
    monkeypatch.setattr("protector.models.base_path", lambda: tiny.gguf)
    q, a = MILD_PAIRS[0]
    scores = []
    for source in (folder, detector_gguf):
        guard = Protector(source, False, threshold=1.0, detector_options={"quantisation": "INT8"})
        verdict = guard.guard(q, a)
        assert (verdict.text, verdict.usage["backend"], verdict.usage["quantisation"]) == (a, "torch", "INT8")
        scores.append(verdict.score)
    assert scores[0] == pytest.approx(scores[1], abs=0.05)  # the file's adapters are float16's
    with pytest.raises(ModelError) as error:
        Protector(detector_gguf, False, backend="llama.cpp", detector_options={"quantisation": "INT8"})
    assert str(error.value) == ("Protector: with backend llama.cpp the model must be a GGUF file that it runs, got quantisation INT8. "
                                "Choose another, or use backend='auto'.")


@pytest.mark.parametrize("options, got", [
    ({"quantisation": "Q8_0"}, "Q8_0, cpu, torch.float32, detector"),
    ({"quantisation": "INT8", "dtype": torch.bfloat16}, "INT8, cpu, torch.bfloat16, detector"),
    ({"quantisation": "INT8", "device": "cuda"}, "INT8, cuda, torch.float32, detector"),
    ({"compile": True}, "None, cpu, torch.float32, detector")])
def test_what_does_not_go_together(folder, options, got):
    with pytest.raises(ValueError) as error:
        Protector(folder, False, threshold=0.5, detector_options=options)
    assert str(error.value) == ("load: quantisation must be INT8, of a detector in float32 on a CPU, and nothing else is compiled, "
                                f"got {got}. Leave it out, or use a GGUF file with llama.cpp.")


def test_a_detoxifier_is_not_rounded(folder, torch_detoxifier, tmp_path):
    """Regression: the shipped one's options were taken, and each flagged answer built it in PyTorch to find that it can't be rounded."""
    torch_detoxifier.save(tmp_path / "detoxifier")
    with pytest.raises(ModelError, match=r"detoxifier must be a detector, got a detoxifier\. Pass the other file\.$"):
        load(tmp_path / "detoxifier", quantisation="INT8")
    for source, backend, known in ((tmp_path / "detoxifier", "auto", "PyTorch must be of device, dtype, n_threads"),
                                   (None, "torch", "PyTorch must be of device, dtype, n_threads")):
        with pytest.raises(ValueError, match=f"^Protector: detoxifier_options of {known}, got quantisation, compile"):
            Protector(load(folder), source, backend=backend, threshold=0.5, detoxifier_options={"quantisation": "INT8", "compile": True})


def test_it_cannot_be_saved_or_exported(detector, tiny, tmp_path):
    for name, write in (("save", detector.save), ("export", lambda path: export_adapter(detector, path, tiny.gguf)),
                        ("export", lambda path: export_merged(detector, path, "F16", tiny.gguf))):
        with pytest.raises(ValueError) as error:
            write(tmp_path / "again")
        assert str(error.value) == f"{name}: model must have the tensors that were trained, got them in INT8. Load it without."
        assert not (tmp_path / "again").exists()


def test_it_scores_no_streams(folder, exact_int8, monkeypatch):
    """Rounding makes a step of a difference in the last bit, so that a stream's score isn't the whole answer's."""
    guard = Protector(folder, False, threshold=0.5, detector_options={"quantisation": "INT8"})
    message = "stream: detector must score streams as the whole answer, got one in INT8, which can't. Choose another quantisation."
    monkeypatch.setattr(selftest, "Protector", lambda *_, **__: guard)
    monkeypatch.setattr(selftest, "measure", lambda *_: pytest.fail("it began"))
    for begin in (lambda: guard.stream("q", ["a"]), lambda: guard.astream("q", iter(())), lambda: create_app(guard, ServeConfig()),
                  lambda: selftest.run(selftest.SelftestConfig())):
        with pytest.raises(ValueError) as error:
            begin()
        assert str(error.value) == message


def test_calibrated_and_used_by_the_command_line(folder, exact_int8, tmp_path, capsys, monkeypatch):
    harmless = tmp_path / "harmless.jsonl"
    harmless.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"It is the number {i}.", "label": 0}) + "\n" for i in range(40)))
    arguments = ["calibrate", str(harmless), "--detector", str(folder), "--fpr", "0.3", "--quantisations", "INT8", "--threads", "1"]
    assert main(arguments) == 0
    entries = json.loads((folder / "calibration.json").read_text())
    assert [(entry["backend"], entry["quantisation"], entry["input"]) for entry in entries] == [
        ("torch", "F32", "pair"), ("torch", "F32", "answer"), ("torch", "INT8", "pair"), ("torch", "INT8", "answer")]
    guard = Protector(folder, False, fpr=0.3, detector_options={"quantisation": "INT8"})
    assert guard.thresholds == {"pair": entries[2]["threshold"], "answer": entries[3]["threshold"]}
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"question": "q", "answer": "An answer."}\n')))
    assert main(["score", "--detector", str(folder), "--quantisation", "INT8", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == guard.score("q", "An answer.")


def test_compiled(folder, detector):
    compiled = load(folder, kind="detector", quantisation="INT8", compile=True)
    sequences = sequences_of(detector, MILD_PAIRS)
    assert all(layer._compiled_call_impl is not None for layer in compiled.blocks.layers)
    assert np.abs(compiled.logits(sequences) - detector.logits(sequences)).max() < 56**0.5 * 3 / 254  # as beside float32
