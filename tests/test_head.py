"""harm_score against float64 and against itself: NumPy and torch, every layout, every wrong input."""
import json
import math
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from protector import _native, head
from protector.head import harm_score, harm_score_ref

pytestmark = pytest.mark.skipif(_native.LIBRARY is None, reason="protector/_kernels was not built (PROTECTOR_BUILD=0)")
WIDTHS = [1, 8, 31, 64, 576, 1000, 4096, 4097]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
generator = torch.Generator().manual_seed(0)


def rows(n, d, dtype=torch.float32, pad=3):
    """(n, d) rows of a wider tensor, so that the stride is real."""
    return (3 * torch.randn(n, d + pad, generator=generator)).to(dtype)[:, :d]


def head_of(d):
    return torch.randn(d, generator=generator) / math.sqrt(d)


def score64(hidden, weight, bias=0.0, gain=None, eps=None, temperature=1.0, output="score"):
    """The equation of csrc/harm_score.h in float64, of the same rounded inputs."""
    x, weight = hidden.double(), weight.double() * (1 if gain is None else gain.double())
    logit = x @ weight
    if eps is not None:
        logit = logit / (x.square().mean(-1) + eps).sqrt()
    logit = (logit + bias) / temperature
    return logit.sigmoid() if output == "score" else logit


def test_a_row_worked_by_hand():
    # x = (1, 2), w = (1, -1): logit -1, score 1 / (1 + e). With the norm, mean x^2 = 2.5: logit -1 / sqrt(2.5).
    hidden, weight = np.array([[1, 2]], np.float32), np.array([1, -1], np.float32)
    assert harm_score(hidden, weight).values[0] == pytest.approx(1 / (1 + math.e), abs=1e-7)
    assert harm_score(hidden, weight, output="logit").values[0] == -1
    assert harm_score(hidden, weight, eps=0.0, output="logit").values[0] == pytest.approx(-1 / math.sqrt(2.5), abs=1e-7)
    # bias 3 and temperature 4: (-1 + 3) / 4.
    assert harm_score(hidden, weight, 3.0, temperature=4.0, output="logit").values[0] == 0.5
    # gain (2, 3): 1 * 2 * 1 - 1 * 3 * 2 = -4.
    assert harm_score(hidden, weight, gain=np.array([2, 3], np.float32), output="logit").values[0] == -4


# A lane of the twin sums d / 32 products in fp32: at 4097 columns and |logit| < 8 some 1e-6 of the logit, and the
# sigmoid's slope is at most 1/4. The reference sums in another order, so it gets the same bound.
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_m63_matches_float64(d, dtype, eps):
    for n in (0, 1, 7, 129):
        hidden, weight, gain = rows(n, d, dtype), head_of(d), 1 + 0.1 * head_of(d)
        expected = score64(hidden, weight, -0.3, gain, eps, 1.5)
        options = {"gain": gain, "eps": eps, "temperature": 1.5}
        result = harm_score(hidden, weight, -0.3, **options)
        assert result.backend == "cpp" and result.values.dtype == torch.float32 and result.values.shape == (n,)
        torch.testing.assert_close(result.values.double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(harm_score_ref(hidden, weight, -0.3, **options).double(), expected, atol=1e-6, rtol=0)
        if dtype != torch.bfloat16:
            values, backend = harm_score(hidden.numpy(), weight.numpy(), -0.3, **{**options, "gain": gain.numpy()})
            assert backend == "cpp" and values.dtype == np.float32
            np.testing.assert_array_equal(values, result.values.numpy())


def test_every_half_is_read_exactly():
    # All 65,536 bit patterns, infinities, subnormals and NaN among them, as logits of a one-column head.
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    one = np.ones(1, np.float32)
    np.testing.assert_array_equal(harm_score(halves, one, output="logit").values, halves[:, 0].astype(np.float32))
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(-1, 1)
    torch.testing.assert_close(harm_score(patterns, torch.ones(1), output="logit").values, patterns[:, 0].float(),
                               atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("library", [True, False], ids=["cpp", "reference"])
def test_layouts_agree_with_a_gather(library, monkeypatch):
    if not library:
        monkeypatch.setattr(_native, "LIBRARY", None)
    packed, weight = rows(129, 576), head_of(576)
    index = torch.tensor([128, 0, 5, 5])
    gathered = score64(packed[index], weight, eps=1e-6)
    # A padded batch seen through strides: every other sequence, without its first two positions.
    padded = torch.randn(8, 12, 600, generator=generator)[::2, 2:, 7:583]  # (4, 10, 576)
    last = torch.tensor([9, 0, 3, 3])
    expected = score64(padded[torch.arange(4), last], weight, eps=1e-6)
    for convert in (lambda x: x, lambda x: x.numpy()):
        w = convert(weight)
        for hidden, positions, wanted in ((packed, index, gathered), (padded, last, expected)):
            values = torch.as_tensor(harm_score(convert(hidden), w, index=convert(positions), eps=1e-6).values)
            torch.testing.assert_close(values.double(), wanted, atol=1e-6, rtol=0)
    read_only = packed.numpy().copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(harm_score(read_only, weight.numpy()).values, harm_score(packed.numpy(), weight.numpy()).values)
    upside_down = packed.numpy()[::-2]
    np.testing.assert_array_equal(harm_score(upside_down, weight.numpy()).values,
                                  harm_score(upside_down.copy(), weight.numpy()).values)


@pytest.mark.parametrize("library", [True, False], ids=["cpp", "reference"])
@pytest.mark.parametrize("d", WIDTHS)
def test_a_row_does_not_depend_on_its_batch(d, library, monkeypatch):
    if not library:
        monkeypatch.setattr(_native, "LIBRARY", None)
    for dtype in DTYPES:
        hidden, weight = rows(129, d, dtype), head_of(d)
        together = harm_score(hidden, weight, eps=1e-5).values
        for first, size in ((0, 1), (7, 1), (128, 1), (3, 7), (64, 65)):
            part = harm_score(hidden[first:first + size].clone(), weight, eps=1e-5).values
            assert torch.equal(part, together[first:first + size]), (dtype, first, size)
        if dtype != torch.bfloat16:
            array, head_weight = hidden.numpy(), weight.numpy()
            whole = harm_score(array, head_weight, eps=1e-5).values
            assert all(harm_score(array[row:row + 1].copy(), head_weight, eps=1e-5).values[0] == whole[row] for row in range(129))


@pytest.mark.parametrize("library", [True, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_m52_nan_in_gives_nan_out(library, eps, monkeypatch):
    if not library:
        monkeypatch.setattr(_native, "LIBRARY", None)
    for position in (0, 31, 32, 99):
        hidden = rows(3, 100)
        hidden[1, position] = math.nan
        for values in (harm_score(hidden, head_of(100), eps=eps).values,
                       harm_score(hidden.numpy(), head_of(100).numpy(), eps=eps).values):
            assert np.isnan(np.asarray(values)).tolist() == [False, True, False]
    weight = head_of(100)
    weight[99] = math.nan
    assert harm_score(rows(3, 100), weight, eps=eps).values.isnan().all()
    assert harm_score(rows(3, 100), head_of(100), math.nan).values.isnan().all()


def test_extreme_logits_saturate_without_a_warning():
    hidden, weight = np.array([[1e4], [-1e4]], np.float32), np.ones(1, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert harm_score(hidden, weight).values.tolist() == [1, 0]


X, W = np.zeros((4, 6), np.float32), np.zeros(6, np.float32)
TX, TW = torch.zeros(4, 6), torch.zeros(6)
WRONG = {
    "list": (([[0.0]], W), {}, "hidden must be a NumPy array or torch tensor, got list. Convert it."),
    "one dimension": ((X[0], W), {}, "hidden must be (n, d) or (B, T, d), got shape (6,). Reshape it."),
    "no columns": ((X[:, :0], W[:0]), {}, "hidden must be at least 1 wide, got shape (4, 0). Pass hidden states of the model's width."),
    "no index": ((X[None], W), {}, "hidden must be (n, d) without an index, got shape (1, 4, 6). Pass index, or .reshape(-1, d)."),
    "double": ((X.astype(np.float64), W), {}, "hidden must be float32 or float16, got float64. Call .astype(np.float32)."),
    "byte order": ((X.astype(">f4"), W), {}, "hidden must be float32 or float16, got >f4. Call .astype(np.float32)."),
    "column stride": ((X[:, ::2], W[:3]), {}, "hidden must be contiguous in its last dimension, got stride 2. Call .contiguous() or .copy() on it."),
    "unaligned": ((np.frombuffer(bytes(25), np.float32, 6, 1).reshape(1, 6), W), {},
                  "hidden must be aligned to its elements, got strides of (24, 4) bytes. Call .copy() on it."),
    "mixed": ((X, TW), {}, "weight must be a NumPy array as hidden is, got Tensor. Convert it."),
    "weight dtype": ((X, W.astype(np.float16)), {}, "weight must be float32, got float16. Call .astype(np.float32)."),
    "weight shape": ((X, W[:5]), {}, "weight must be (6,), got shape (5,). Pass one number per column of hidden."),
    "weight stride": ((X, np.zeros(12, np.float32)[::2]), {}, "weight must be contiguous and aligned, got strides (8,). Call .copy() on it."),
    "gain shape": ((X, W), {"gain": W[:5]}, "gain must be (6,), got shape (5,). Pass one number per column of hidden."),
    "index dtype": ((X, W), {"index": np.zeros(2, np.int32)}, "index must be int64, got int32. Call .astype(np.int64)."),
    "index shape": ((X[None], W), {"index": np.zeros(2, np.int64)},
                    "index must be (1,), one position per sequence, got shape (2,). Pass one int64 per score."),
    "index 2-d": ((X, W), {"index": np.zeros((2, 1), np.int64)}, "index must be (B,), got shape (2, 1). Pass one int64 per score."),
    "index high": ((X, W), {"index": np.array([0, 4])}, "index must be in [0, 4), got [0, 4]. Count from the start, unpadded."),
    "index negative": ((X, W), {"index": np.array([-1, 3])}, "index must be in [0, 4), got [-1, 3]. Count from the start, unpadded."),
    "bias": ((X, W, W), {}, "bias must be a float, got ndarray. Call float() on it."),
    "eps": ((X, W), {"eps": -1.0}, "eps must be None or a finite float >= 0, got -1.0. Pass None for hidden states that are already normed."),
    "temperature": ((X, W), {"temperature": 0}, "temperature must be a finite float > 0, got 0. Pass 1.0 for none."),
    "temperature nan": ((X, W), {"temperature": math.nan}, "temperature must be a finite float > 0, got nan. Pass 1.0 for none."),
    "output": ((X, W), {"output": "probability"}, "output must be \"score\" or \"logit\", got 'probability'. Choose one."),
    "torch one dimension": ((TX[0], TW), {}, "hidden must be (n, d) or (B, T, d), got shape (6,). Reshape it."),
    "torch double": ((TX.double(), TW), {}, "hidden must be float32, float16 or bfloat16, got torch.float64. Convert it."),
    "torch sparse": ((TX.to_sparse(), TW), {}, "hidden must be a dense torch tensor, got torch.sparse_coo. Convert it."),
    "torch meta": ((TX.to("meta"), TW.to("meta")), {}, "hidden must be on cpu or cuda, got meta. Move it, or call harm_score_ref."),
    "torch column stride": ((TX.t(), TW[:4]), {}, "hidden must be contiguous in its last dimension, got stride 6. Call .contiguous() or .copy() on it."),
    "torch mixed": ((TX, W), {}, "weight must be a dense torch tensor, got ndarray. Convert it."),
    "torch weight dtype": ((TX, TW.bfloat16()), {}, "weight must be torch.float32, got torch.bfloat16. Call .to(torch.float32)."),
    "torch weight device": ((TX, TW.to("meta")), {}, "weight must be on cpu as hidden is, got meta. Move it there."),
    "torch weight shape": ((TX, TW[:5]), {}, "weight must be (6,), got shape (5,). Pass one number per column of hidden."),
    "torch weight stride": ((TX, torch.zeros(12)[::2]), {}, "weight must be contiguous, got stride (2,). Call .contiguous() on it."),
    "torch gain shape": ((TX, TW), {"gain": torch.ones(1)}, "gain must be (6,), got shape (1,). Pass one number per column of hidden."),
    "torch index dtype": ((TX, TW), {"index": torch.zeros(2, dtype=torch.int32)}, "index must be torch.int64, got torch.int32. Call .to(torch.int64)."),
    "torch index high": ((TX, TW), {"index": torch.tensor([4])}, "index must be in [0, 4), got [4, 4]. Count from the start, unpadded."),
    "torch index negative": ((TX[None], TW), {"index": torch.tensor([-1])}, "index must be in [0, 4), got [-1, -1]. Count from the start, unpadded."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_value_error_before_any_pointer_is_passed_on(case, monkeypatch):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")
    monkeypatch.setattr(_native, "LIBRARY", Untouchable())
    arguments, options, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        harm_score(*arguments, **options)
    assert str(error.value) == f"harm_score: {message}"


def test_opcheck():
    hidden, weight = rows(7, 64), head_of(64)
    padded = torch.randn(3, 5, 64, generator=generator)
    for arguments in ((hidden, weight), (hidden.half(), weight, 0.5, torch.tensor([6, 0]), 1e-5, 2.0, "logit"),
                      (padded, weight, 0.0, torch.tensor([4, 0, 1]))):
        torch.library.opcheck(torch.ops.protector.harm_score.default, arguments)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    weight = head_of(64)
    scored = torch.compile(lambda x, index: harm_score(2 * x, weight, 0.5, index=index).values + 1, fullgraph=True,
                           backend="aot_eager", dynamic=True)
    for n in (3, 7, 11):
        hidden, index = rows(n, 64), torch.tensor([n - 1, 0])
        assert torch.equal(scored(hidden, index), harm_score(2 * hidden, weight, 0.5, index=index).values + 1)
    backend = torch.compile(lambda x: harm_score(x, weight).backend, fullgraph=True, backend="eager")
    assert backend(rows(2, 64)) == "cpp"
    with pytest.raises(Exception, match="hidden must be float32"):
        torch.compile(lambda x: harm_score(x, weight).values, fullgraph=True, backend="eager")(rows(2, 64).double())


def test_backward_says_why_not_and_the_reference_has_one():
    hidden, weight = rows(5, 64).requires_grad_(), head_of(64).requires_grad_()
    scores = harm_score(hidden, weight).values
    assert scores.requires_grad
    with pytest.raises(RuntimeError, match="harm_score: a training step must not go through the fused operator.*nn.Linear"):
        scores.sum().backward()
    double = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    harm_score_ref(hidden, weight, eps=1e-5).sum().backward()
    score64(*double, eps=1e-5).sum().backward()
    for fp32, fp64 in zip((hidden, weight), double):
        torch.testing.assert_close(fp32.grad.double(), fp64.grad, atol=1e-6, rtol=1e-5)


def test_reference_serves_where_the_library_is_missing(monkeypatch):
    hidden, weight = rows(7, 576), head_of(576)
    compiled = harm_score(hidden, weight, eps=1e-5).values
    monkeypatch.setattr(_native, "LIBRARY", None)
    for x, w, backend in ((hidden, weight, "torch"), (hidden.numpy(), weight.numpy(), "numpy")):
        result = harm_score(x, w, eps=1e-5)
        assert result.backend == backend
        np.testing.assert_allclose(result.values, compiled, atol=1e-6, rtol=0)


def test_m52_a_failed_kernel_is_a_runtime_error():
    # A CUDA call on a library without CUDA, or without a device: a status, turned into an error with its text.
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; protector.bench_head tests it")
    status = _native.LIBRARY.protector_harm_score_cuda(_native.Args(rows=1, d=1), 0, None)
    with pytest.raises(RuntimeError, match=r"harm_score: the kernel must return 0, got \d+ \(.+\)"):
        _native.check(status)
    assert _native.LIBRARY.protector_harm_score_cpu(_native.Args(rows=1, d=0)) == 1
    assert _native.LIBRARY.protector_harm_score_cpu(_native.Args(rows=1, d=1, dtype=3)) == 1


def test_threads_share_nothing():
    hidden, weight = rows(64, 576).numpy(), head_of(576).numpy()
    expected, wrong = harm_score(hidden, weight).values, []

    def score_often():
        for _ in range(200):
            if not np.array_equal(harm_score(hidden, weight).values, expected):
                wrong.append(1)
    threads = [threading.Thread(target=score_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_numpy_path_runs_without_torch():
    code = """
import sys
sys.modules["torch"] = None  # any import of it fails
import numpy as np
from protector.head import harm_score
print(harm_score(np.ones((1, 8), np.float32), np.zeros(8, np.float32)))"""
    assert "".join(run_python(code)) == "HarmScore(values=array([0.5],dtype=float32),backend='cpp')"


def test_torch_may_be_imported_after_the_head():
    code = """
import sys
from protector.head import harm_score
print("torch" in sys.modules)
import torch
print(harm_score(torch.ones(1, 8), torch.zeros(8)).backend)"""
    assert run_python(code) == ["False", "cpp"]


def test_bench_rehearses_the_gpu_script_on_the_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the training step's backbone needs transformers (extra train)")
    from protector import bench_head
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # inductor's own minute isn't ours to test
    bench_head.main(["--rehearse", "--rounds", "1", "--round-s", "0", "--layers", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "head_cpu.json").read_text())
    assert capsys.readouterr().out == f"{tmp_path / 'head_cpu.json'}\n"
    assert result["checks"]["check_correct"]["largest_error"] <= 1e-6
    assert len(result["rehearsal"]["cells"]) == 8 and len(result["on_cpu"]["targets"]) == 4
    assert all(us > 0 for cell in result["rehearsal"]["cells"] for us in (*cell["call_us"].values(), *cell["device_us"].values()))
    assert result["training"]["step_us"] > result["training"]["head_forward_backward_us"]["fused"] > 0
