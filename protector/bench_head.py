"""Measure harm_score, and on a GPU prove it first: `python -m protector.bench_head`.

On the CPU: the C++ twin, the NumPy and the torch path against eager PyTorch, and whether a fused linear + BCE would
shorten a training step. Where there is a GPU, before any timing: float64, side stream, second device, graph capture,
compute-sanitizer; then microseconds and GB/s against eager PyTorch, torch.compile, and a device-to-device copy.
`--rehearse` walks the GPU part on the CPU with small sizes. Writes results/head_<card or cpu>.json.

Nothing else may run meanwhile: a ratio taken beside another process is not one.
"""
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from protector import _native
from protector.bench_rounds import busy, described, loaded, warn, watched
from protector.evaluate import record
from protector.head import harm_score, harm_score_ref
from protector.options import option, parsed

BIAS, EPS = -0.3, 1e-5
WIDTHS = (1, 8, 31, 64, 576, 1000, 4096, 4097)  # ugly ones among them: tails, unaligned rows, one warp or four
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCORE_TOLERANCE = 1e-6  # against float64 of the same rounded inputs


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `python -m protector.bench_head`."""

    rounds: int = option(15, "measurements of each function, in turns with the others; the median is reported")
    round_s: float = option(0.2, "seconds each such measurement lasts")
    layers: int = option(30, "blocks of the training step's backbone; 30 is SmolLM2-135M")
    rehearse: bool = option(False, "walk the GPU part on the CPU")
    check_only: bool = option(False, "correctness alone, as compute-sanitizer runs it")
    seed: int = option(0, "of the random rows and weights")
    out: str = option("results", "folder of the JSON")


def eager(hidden, weight, gain):
    """Norm and head as one writes them; harm_score_ref is slower, since it keeps a row's bits free of its batch."""
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
    return torch.sigmoid(x @ weight + BIAS)


def eager_rms_norm(hidden, weight, gain):
    return torch.sigmoid(F.rms_norm(hidden.float(), hidden.shape[-1:], gain, EPS) @ weight + BIAS)


def eager_without_norm(hidden, weight, gain):
    return torch.sigmoid(hidden.float() @ weight + BIAS)


def in_turns(functions, rounds, round_s, clock=None):
    """{name: bench_rounds.described microseconds per call} of rounds in which all functions take turns on one clock."""
    clock = clock or host_us
    calls = {name: max(1, int(round_s * 1e6 / max(clock(function, 3), 1e-3))) for name, function in functions.items()}
    measured = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            measured[name].append(clock(function, calls[name]))
    return {name: described(values) for name, values in measured.items()}


def medians(numbers):
    """{name: microseconds} of what in_turns returns."""
    return {name: round(number["median"], 3) for name, number in numbers.items()}


def judged(met, *cells):
    """Whether cells meet a target (None: there are none), and whether any of their numbers spread too far to say."""
    return {"met": met, "busy": bool(busy(list(cells)))}


def host_us(function, calls):
    """Microseconds a call takes, the device drained at the end."""
    drain = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    drain()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    drain()
    return (time.perf_counter() - start) / calls * 1e6


def bench_cpu(options):
    """The twin, and each way to it, against eager PyTorch for the sizes of the targets."""
    found = {}
    for dtype_name, rows, d in (("fp32", 1, 576), ("fp32", 1, 4096), ("fp32", 2048, 4096), ("bf16", 1, 576), ("bf16", 2048, 4096)):
        dtype = DTYPES[dtype_name]
        hidden, weight, gain = torch.randn(rows, d).to(dtype), torch.randn(d) / d ** 0.5, torch.rand(d)
        folded, out = weight * gain, torch.empty(rows)
        args = _native.Args(hidden.data_ptr(), None, folded.data_ptr(), out.data_ptr(), rows, d, rows, 0, d, BIAS, EPS, 1.0,
                            list(DTYPES).index(dtype_name), 0)
        twin = _native.LIBRARY.protector_harm_score_cpu
        functions = {"twin": lambda: twin(args),
                     "harm_score_torch": lambda: harm_score(hidden, folded, BIAS, eps=EPS),
                     "eager": lambda: eager(hidden, weight, gain),
                     "eager_rms_norm": lambda: eager_rms_norm(hidden, weight, gain),
                     "eager_without_norm": lambda: eager_without_norm(hidden, weight, gain)}
        if dtype_name == "fp32":
            array, head, index = hidden.numpy(), folded.numpy(), np.arange(rows)
            functions["harm_score_numpy"] = lambda: harm_score(array, head, BIAS, eps=EPS)
            functions["harm_score_numpy_index"] = lambda: harm_score(array, head, BIAS, eps=EPS, index=index)
        with torch.inference_mode():
            rounds_us = in_turns(functions, options.rounds, options.round_s)
        us = medians(rounds_us)
        best = min(us["eager"], us["eager_rms_norm"])
        found[f"{dtype_name} {rows}x{d}"] = {
            "us": us, "rounds_us": rounds_us, "eager_over_twin": round(best / us["twin"], 2),
            "eager_without_norm_over_twin": round(us["eager_without_norm"] / us["twin"], 2)}
        report(f"cpu {dtype_name} {rows}x{d}", found[f"{dtype_name} {rows}x{d}"])
    short, long, many = found["fp32 1x576"], found["fp32 1x4096"], found["fp32 2048x4096"]
    found["targets"] = {
        "twin at least 5 times faster than eager, 1x576": judged(short["eager_over_twin"] >= 5, short),
        "twin at least 5 times faster than eager, 1x4096": judged(long["eager_over_twin"] >= 5, long),
        "twin at least 10 times faster than eager, 2048x4096": judged(many["eager_over_twin"] >= 10, many),
        "a score through NumPy under 10 us": judged(short["us"]["harm_score_numpy"] < 10, short)}
    return found


class FusedHarmLoss(torch.autograd.Function):
    """mean BCE(x w + b, y) whose gradient, (sigmoid(logit) - y) / B, is known before backward asks."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels):
        logits = torch.addmv(bias, x, weight)  # (B, d) -> (B,)
        ctx.save_for_backward((logits.sigmoid() - labels) / len(labels), x, weight)
        return F.binary_cross_entropy_with_logits(logits, labels)

    @staticmethod
    def backward(ctx, gradient):
        slope, x, weight = ctx.saved_tensors
        slope = slope * gradient
        return torch.outer(slope, weight), slope @ x, slope.sum().reshape(1), None


def bench_training(options, device):
    """How much of a training step a fused linear + BCE could save."""
    from transformers import LlamaConfig, LlamaModel
    rows, tokens, d = 8, 32, 576
    model = LlamaModel(LlamaConfig(vocab_size=49152, hidden_size=d, intermediate_size=1536, num_hidden_layers=options.layers,
                                   num_attention_heads=9, num_key_value_heads=3)).to(device)
    head = torch.nn.Linear(d, 1).to(device)
    ids, labels = torch.randint(49152, (rows, tokens), device=device), torch.randint(2, (rows,), device=device).float()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-5)
    hidden = torch.randn(rows, d, device=device, requires_grad=True)

    def plain(x):
        return F.binary_cross_entropy_with_logits(head(x)[:, 0], labels)

    def fused(x):
        return FusedHarmLoss.apply(x, head.weight[0], head.bias, labels)

    def gradients(loss):
        return torch.autograd.grad(loss(hidden), (hidden, head.weight, head.bias))

    def step():
        optimizer.zero_grad()
        plain(model(ids).last_hidden_state[:, -1]).backward()
        optimizer.step()

    for a, b in zip(gradients(plain), gradients(fused)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    rounds_us = in_turns({"plain": lambda: gradients(plain), "fused": lambda: gradients(fused)}, options.rounds, options.round_s)
    rounds_us |= in_turns({"step": step}, min(options.rounds, 3), 0)
    us = medians(rounds_us)
    step_us = us.pop("step")
    saved = (us["plain"] - us["fused"]) / step_us
    found = {"rows": rows, "tokens_per_row": tokens, "layers": options.layers, "head_forward_backward_us": us, "step_us": step_us, "rounds_us": rounds_us,
             "fused_saves_percent_of_step": round(100 * saved, 4), "worth_it": saved > 0.01}
    report("training", found)
    return found


def check_correct(device):
    """float64, layouts, batch independence, NaN: AssertionError where one fails, else the largest error seen."""
    torch.manual_seed(1)
    worst = 0.0
    for dtype in DTYPES.values():
        for d in WIDTHS:
            for n in (0, 1, 7, 129):
                for pad in (0, 16 - d % 8):  # without a gap, and with one that keeps rows 16-byte aligned
                    hidden = (3 * torch.randn(n, d + pad, device=device)).to(dtype)[:, :d]
                    weight = torch.randn(d, device=device) / d ** 0.5
                    values = harm_score(hidden, weight, BIAS, eps=EPS).values
                    x = hidden.double()
                    expected = torch.sigmoid((x @ weight.double()) / (x.square().mean(-1) + EPS).sqrt() + BIAS)
                    error = (values - expected).abs().max().item() if n else 0.0
                    assert error <= SCORE_TOLERANCE, (dtype, d, n, pad, error)  # NaN isn't, while max() would lose it
                    worst = max(worst, error)
                    for row in range(min(n, 7)):
                        alone = harm_score(hidden[row:row + 1].clone(), weight, BIAS, eps=EPS).values
                        assert torch.equal(alone, values[row:row + 1]), (dtype, d, n, pad, row)
    padded, weight = torch.randn(4, 9, 600, device=device)[:, 1:, 8:584], torch.randn(576, device=device) / 24
    last = torch.tensor([7, 0, 3, 3], device=device)
    gathered = padded[torch.arange(4, device=device), last]
    assert torch.equal(harm_score(padded, weight, index=last).values, harm_score(gathered, weight).values)
    assert torch.equal(harm_score(gathered, weight, index=last[2:]).values, harm_score(gathered[last[2:]], weight).values)
    gathered[2, 575] = float("nan")
    assert harm_score(gathered, weight).values.isnan().tolist() == [False, False, True, False]
    if device.type == "cuda" and _native.HAS_CUDA:
        outside = torch.tensor([-1, 8, 0, 7], device=device)
        assert harm_score(padded, weight, index=outside).values.isnan().tolist() == [True, True, False, False]
    return {"largest_error": worst, "tolerance": SCORE_TOLERANCE}


def check_side_stream(device):
    """A row written late on a side stream must be read after that, and only that stream may be waited for."""
    hidden, weight = torch.zeros(64, 576, device=device), torch.ones(576, device=device) / 576
    expected = harm_score(torch.ones_like(hidden), weight).values
    if device.type == "cpu":
        hidden.fill_(1)
        assert torch.equal(harm_score(hidden, weight).values, expected)
        return "rehearsed without a stream"
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 0.1 s: a launch on another stream would read the zeros
        hidden.fill_(1)
        values = harm_score(hidden, weight).values
    assert not stream.query(), "the call waited for its stream"
    stream.synchronize()
    assert torch.equal(values, expected)
    return "passed"


def check_second_device(device):
    """Rows on device 1 while device 0 is current, which it must be afterwards."""
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        return "not run: fewer than two devices"
    hidden, weight = torch.randn(64, 576, device="cuda:1"), torch.randn(576, device="cuda:1")
    with torch.cuda.device(0):
        values = harm_score(hidden, weight).values
        assert torch.cuda.current_device() == 0 and values.device.index == 1
    torch.testing.assert_close(values, harm_score_ref(hidden, weight), atol=SCORE_TOLERANCE, rtol=0)
    return "passed"


def check_graph(device):
    """A captured call replays on new rows."""
    hidden, weight = torch.zeros(64, 576, device=device), torch.randn(576, device=device) / 24
    replay, values = captured(lambda: harm_score(hidden, weight, eps=EPS).values, device)
    hidden.normal_()
    replay()
    expected = harm_score(hidden, weight, eps=EPS).values
    assert torch.equal(values() if device.type == "cpu" else values, expected)
    return "passed" if device.type == "cuda" else "rehearsed without a graph"


def captured(function, device):
    """(replay, result) of a CUDA graph of `function`; on the CPU the function itself twice."""
    if device.type == "cpu":
        return function, function
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # modules load before the capture, which forbids it
        function()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def check_sanitizer(device):
    """compute-sanitizer's tools over check_correct in a process of its own, on this project's kernel alone."""
    tool = shutil.which("compute-sanitizer")
    if device.type == "cpu" or tool is None:
        return "not run: " + ("no GPU" if device.type == "cpu" else "compute-sanitizer is not on the PATH")
    found = {}
    for name in ("memcheck", "racecheck", "synccheck"):
        # Without torch's caching each tensor is an allocation of its own, so that a read past its end is seen.
        result = subprocess.run([tool, "--tool", name, "--error-exitcode", "9", "--kernel-name", "kns=harm_score", sys.executable,
                                 "-m", "protector.bench_head", "--check-only"], capture_output=True, text=True,
                                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        found[name] = result.stdout.strip().splitlines()[-1]
    return found


def bench_device(options, device):
    """Microseconds and GB/s for 1 to 131,072 rows, against eager, compiled and a copy of the same bytes."""
    cuda = device.type == "cuda"
    found, cells = {}, []
    row_counts = (1, 32, 1024, 8192, 32768, 131072) if cuda else (1, 64)
    widths = (576, 2048, 4096) if cuda else (576,)
    # The strongest baseline: a compilation for each shape, none for a range of them.
    torch._dynamo.config.recompile_limit = 2 * len(widths) * len(row_counts)
    compiled = {name: torch.compile(function, dynamic=False) for name, function in (("norm", eager), ("no norm", eager_without_norm))}
    for dtype_name in ("bf16", "fp32"):
        for d in widths:
            for rows in row_counts:
                row_bytes = rows * d * DTYPES[dtype_name].itemsize
                # More than twice any L2 in all, so that each call reads from memory; at most 64 buffers of small rows.
                copies = min(64, 256 * 2**20 // row_bytes + 1) if cuda else 2
                inputs = [torch.randn(rows, d, device=device).to(DTYPES[dtype_name]) for _ in range(copies)]
                target = torch.empty_like(inputs[0])
                weight, gain = torch.randn(d, device=device) / d ** 0.5, torch.rand(d, device=device)
                folded = weight * gain
                for norm in ("norm", "no norm"):
                    plain = eager if norm == "norm" else eager_without_norm
                    eps, head = (EPS, folded) if norm == "norm" else (None, weight)
                    per_call = {"harm_score": lambda x: harm_score(x, head, BIAS, eps=eps).values,
                                "eager": lambda x: plain(x, weight, gain),
                                "compiled": lambda x: compiled[norm](x, weight, gain),
                                "copy": target.copy_}
                    for name in ("eager", "compiled"):
                        torch.testing.assert_close(per_call["harm_score"](inputs[0]), per_call[name](inputs[0]), atol=1e-3, rtol=0)
                    calls = in_turns({name: (lambda f=f: f(inputs[0])) for name, f in per_call.items()}, 5, options.round_s / 10)
                    rounds = {name: captured(lambda f=f: [f(x) for x in inputs][-1], device)[0] for name, f in per_call.items()}
                    replays = in_turns(rounds, 5, options.round_s / 10, clock=event_us if cuda else host_us)
                    call_us, device_us = medians(calls), {name: round(us / copies, 3) for name, us in medians(replays).items()}
                    cell = {"dtype": dtype_name, "d": d, "rows": rows, "norm": norm == "norm", "call_us": call_us, "device_us": device_us,
                            "rounds_us": {"call": calls, f"{copies} on the device": replays},
                            "GB_per_s": {"harm_score": round(row_bytes / device_us["harm_score"] / 1e3, 1),
                                         "copy (read + write)": round(2 * row_bytes / device_us["copy"] / 1e3, 1)}}
                    cells.append(cell)
                    report("device", cell)
    found["cells"] = cells
    large = [cell for cell in cells if cell["rows"] >= 8192]
    medium = [cell for cell in cells if cell["rows"] == 1024]
    found["targets"] = {
        "at 8,192 rows and more at least 90 % of the copy's bandwidth":
            judged(all(cell["GB_per_s"]["harm_score"] >= 0.9 * cell["GB_per_s"]["copy (read + write)"] for cell in large) if large else None, *large),
        "never slower than the compiled reference, on the device":
            judged(all(cell["device_us"]["harm_score"] <= cell["device_us"]["compiled"] for cell in cells), *cells),
        "never slower than the compiled reference, as called":
            judged(all(cell["call_us"]["harm_score"] <= cell["call_us"]["compiled"] for cell in cells), *cells),
        "at least 5 times faster than eager at 1,024 rows, as called":
            judged(all(cell["call_us"]["eager"] >= 5 * cell["call_us"]["harm_score"] for cell in medium) if medium else None, *medium),
        "at least 5 times faster than eager at 1,024 rows, on the device":
            judged(all(cell["device_us"]["eager"] >= 5 * cell["device_us"]["harm_score"] for cell in medium) if medium else None, *medium)}
    return found


def event_us(replay, calls):
    """Microseconds of one replay on the device's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replay()
    start.record()
    for _ in range(calls):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def report(what, found):
    print(what, json.dumps(found), file=sys.stderr, flush=True)


def machine():
    """What a reader needs to compare numbers: processor, threads, versions, commit."""
    return {"cpu": record.cpu(), "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "built_with_cuda": _native.HAS_CUDA, "commit": record.commit()}


def main(arguments=None):
    options, meanwhile = parsed(Options, "protector.bench_head", __doc__, arguments), watched()
    torch.manual_seed(options.seed)
    if _native.LIBRARY is None:
        raise SystemExit("bench_head: protector/_kernels must be built, got none. Run `pip install -e .` with a C++ compiler.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not _native.HAS_CUDA:
        raise SystemExit("bench_head: protector/_kernels must be built with CUDA here, got a CPU build. Put nvcc on the PATH and "
                         "run `pip install -e .`.")
    if options.check_only:
        print(json.dumps(check_correct(device)))
        return
    result = {"command": "python -m protector.bench_head " + " ".join(sys.argv[1:]), "options": dataclasses.asdict(options),
              "machine": machine()}
    if device.type == "cuda" or options.rehearse:
        with torch.inference_mode():
            result["checks"] = {check.__name__: check(device) for check in
                                (check_correct, check_side_stream, check_second_device, check_graph, check_sanitizer)}
            report("checks", result["checks"])
            result["device" if device.type == "cuda" else "rehearsal"] = bench_device(options, device)
    result["on_cpu"] = bench_cpu(options)
    result["training"] = bench_training(options, device)
    result |= meanwhile()
    for part in result.values():
        for found in part.get("targets", {}).values() if isinstance(part, dict) else ():
            found["busy"] |= bool(loaded(result))
    result["busy"] = busy(result)
    warn("bench_head", result)
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if device.type == "cuda" else "cpu"
    path = Path(options.out) / f"head_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
