"""harm_score(): the linear harm head. One function for NumPy arrays and torch tensors, one operator
`protector::harm_score` for CPU and CUDA, and the plain PyTorch reference that both are tested against.

NumPy callers need no torch: it is looked at only where a caller already imported it.
"""
import ctypes
import math
import sys
import warnings
from typing import NamedTuple

import numpy as np

from protector import _native

OUTPUTS = ("score", "logit")


class HarmScore(NamedTuple):
    values: object  # (n,) float32, P(harmful) or logit per row; NumPy array or torch tensor, as hidden was
    backend: str  # what ran: "cuda" (kernel), "cpp" (its CPU twin), "torch" or "numpy" (reference)


def harm_score(hidden, weight, bias=0.0, *, index=None, gain=None, eps=None, temperature=1.0, output="score"):
    """Score hidden states with the linear harm head, in one pass and without a gather.

        y = ((weight * gain) . x / sqrt(mean(x^2) + eps) + bias) / temperature,   score = sigmoid(y)

    The division by the root stands only where `eps` is given. A row's bits never depend on the rows around it. NaN in
    gives NaN out, which a guard must treat as an error. No gradient: train through harm_score_ref or nn.Linear.

    Source: MLLM-Protector, harm detector s = sigmoid(w . phi(q, a) + b).

    Args:
        hidden: rows to score, float32 or float16 (torch also bfloat16), contiguous in the last dimension.
            (n, d) every token, or packed tokens with `index`; (B, T, d) padded sequences with `index`.
        weight: (d,) float32; a bf16 head moves a logit by 5e-2.
        bias: float.
        index: (B,) int64 row of (n, d), or position in each sequence of (B, T, d). Negative ones don't count from the
            end. One outside is a ValueError; on CUDA, where looking would stall the stream, its row is NaN.
        gain: (d,) float32 RMSNorm weight. Multiply it into `weight` once at load to save that product per call.
        eps: float >= 0, RMSNorm's; None for hidden states that are already normed.
        temperature: float > 0.
        output: "score" for P(harmful) in [0, 1], "logit" for y.
    Returns:
        HarmScore: values (n,) or (B,) float32, and the backend that ran.
    Raises:
        ValueError: a wrong type, shape, dtype, device, stride, index or number; nothing was read.
        RuntimeError: the kernel failed.
    Example:
        harm_score(np.array([[1., 2.]], np.float32), np.array([1., -1.], np.float32)).values  # [0.26894143]
    """
    # NaN passes no comparison, so each test is written to be true for what is allowed.
    if not isinstance(bias, (float, int)):
        raise _wrong("bias", "a float", type(bias).__name__, "Call float() on it")
    if not (isinstance(temperature, (float, int)) and 0 < temperature < math.inf):
        raise _wrong("temperature", "a finite float > 0", temperature, "Pass 1.0 for none")
    if not (eps is None or isinstance(eps, (float, int)) and 0 <= eps < math.inf):
        raise _wrong("eps", "None or a finite float >= 0", eps, "Pass None for hidden states that are already normed")
    if output not in OUTPUTS:
        raise _wrong("output", '"score" or "logit"', repr(output), "Choose one")
    if isinstance(hidden, np.ndarray):
        return _score_numpy(hidden, weight, bias, index, gain, eps, temperature, output)
    if _torch is None:
        register()
    if _torch is None or not isinstance(hidden, _torch.Tensor):
        raise _wrong("hidden", "a NumPy array or torch tensor", type(hidden).__name__, "Convert it")
    # Here and not in the operator: its dispatcher would answer these with a page of its own.
    if hidden.device.type not in ("cpu", "cuda"):
        raise _wrong("hidden", "on cpu or cuda", hidden.device, "Move it, or call harm_score_ref")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("index", index), ("gain", gain)):
        if tensor is None and name in ("index", "gain"):
            continue
        if not isinstance(tensor, _torch.Tensor) or tensor.layout != _torch.strided:
            got = tensor.layout if isinstance(tensor, _torch.Tensor) else type(tensor).__name__
            raise _wrong(name, "a dense torch tensor", got, "Convert it")
    if gain is not None:
        d = hidden.shape[-1] if hidden.dim() else 0
        _check_weight("weight", weight, d, hidden.device)
        _check_weight("gain", gain, d, hidden.device)
        weight = weight * gain
    values = _operator(hidden, weight, bias, index, eps, temperature, output)
    return HarmScore(values, _torch_backend(hidden.device.type))


def harm_score_ref(hidden, weight, bias=0.0, *, index=None, gain=None, eps=None, temperature=1.0, output="score"):
    """Score as harm_score does, in plain PyTorch: the definition, and the differentiable form.

    Equivalent to:
        x = hidden[index] or hidden[arange(B), index] or hidden, as float32            # (n, d)
        x = x / sqrt(mean(x^2) + eps)                                                  # where eps is given
        y = (sum(x * weight * gain) + bias) / temperature                              # (n,)
        sigmoid(y), or y where output is "logit"

    Source: RMSNorm as in Llama; detector as in harm_score.

    Args:
        hidden, weight, bias, index, gain, eps, temperature, output: as in harm_score, torch tensors only.
    Returns:
        (n,) float32 tensor.
    Example:
        harm_score_ref(tensor([[1., 2.]]), tensor([1., -1.]))  # tensor([0.2689])
    """
    if index is not None and hidden.dim() == 3:
        index = (index.new_ones(index.shape).cumsum(0) - 1, index)
    x = (hidden if index is None else hidden[index]).float()  # (B, T, d) or (n, d) -> (n, d)
    if eps is not None:
        x = x / (_row_sum(x.square())[:, None] / x.shape[-1] + eps).sqrt()
    if gain is not None:
        weight = weight * gain
    logit = (_row_sum(x * weight) + bias) / temperature  # (n, d) -> (n,)
    # In float64, because torch's vector and scalar exp differ by an ulp and a row's place decides which it gets.
    return logit.double().sigmoid().float() if output == "score" else logit


def _row_sum(x):
    """Sum of the last dimension by halving: torch's sum and BLAS choose their order by the number of rows as well."""
    from torch import cat
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = cat((x[:, :half] + x[:, half:2 * half], x[:, 2 * half:]), -1)
    return x[:, 0]


def _wrong(argument, rule, got, way_out):
    return ValueError(f"harm_score: {argument} must be {rule}, got {got}. {way_out}.")


def _layout(shape, strides, index_shape):
    """(rows, positions, batch_stride, row_stride) of csrc/harm_score.h; strides in elements, index_shape None for none."""
    if len(shape) not in (2, 3):
        raise _wrong("hidden", "(n, d) or (B, T, d)", f"shape {tuple(shape)}", "Reshape it")
    if shape[-1] < 1:
        raise _wrong("hidden", "at least 1 wide", f"shape {tuple(shape)}", "Pass hidden states of the model's width")
    if strides[-1] != 1 and shape[-1] > 1 and shape[0] > 0:  # NumPy gives an empty array strides of 0
        raise _wrong("hidden", "contiguous in its last dimension", f"stride {strides[-1]}", "Call .contiguous() or .copy() on it")
    if index_shape is None:
        if len(shape) == 3:
            raise _wrong("hidden", "(n, d) without an index", f"shape {tuple(shape)}", "Pass index, or .reshape(-1, d)")
        return shape[0], shape[0], 0, strides[0]
    if len(index_shape) != 1 or len(shape) == 3 and index_shape[0] != shape[0]:
        rule = f"({shape[0]},), one position per sequence" if len(shape) == 3 else "(B,)"
        raise _wrong("index", rule, f"shape {tuple(index_shape)}", "Pass one int64 per score")
    if len(shape) == 2:
        return index_shape[0], shape[0], 0, strides[0]
    return shape[0], shape[1], strides[0], strides[1]


_NUMPY_DTYPES = {np.dtype(np.float32): _native.FP32, np.dtype(np.float16): _native.FP16}
_FLOAT32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)


def _check_array(name, array, dtype, shape):
    if not isinstance(array, np.ndarray):
        raise _wrong(name, "a NumPy array as hidden is", type(array).__name__, "Convert it")
    if array.dtype != dtype:
        raise _wrong(name, dtype.name, array.dtype, f"Call .astype(np.{dtype.name})")
    if shape is not None and array.shape != shape:
        raise _wrong(name, shape, f"shape {array.shape}", "Pass one number per column of hidden")
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned):
        raise _wrong(name, "contiguous and aligned", f"strides {array.strides}", "Call .copy() on it")


def _address(array):
    """Where an array's first element is; array.ctypes.data says it too, a microsecond later."""
    flags = array.flags
    if flags.c_contiguous and flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return array.ctypes.data


def _score_numpy(hidden, weight, bias, index, gain, eps, temperature, output):
    dtype = _NUMPY_DTYPES.get(hidden.dtype)
    if dtype is None:
        raise _wrong("hidden", "float32 or float16", hidden.dtype, "Call .astype(np.float32)")
    size, shape = hidden.itemsize, hidden.shape
    if not hidden.flags.aligned:
        raise _wrong("hidden", "aligned to its elements", f"strides of {hidden.strides} bytes", "Call .copy() on it")
    if index is not None:
        _check_array("index", index, _INT64, None)
    rows, positions, batch_stride, row_stride = _layout(
        shape, [stride // size for stride in hidden.strides], None if index is None else index.shape)
    # As unsigned a negative index is huge, so one maximum finds both kinds.
    if index is not None and rows and index.view(np.uint64).max() >= positions:
        raise _wrong("index", f"in [0, {positions})", f"[{index.min()}, {index.max()}]", "Count from the start, unpadded")
    _check_array("weight", weight, _FLOAT32, shape[-1:])
    if gain is not None:
        _check_array("gain", gain, _FLOAT32, shape[-1:])
        weight = weight * gain
    if _native.LIBRARY is None:
        if index is not None:
            hidden = hidden[index] if len(shape) == 2 else hidden[np.arange(rows), index]
        x = hidden.astype(np.float32)  # (n, d)
        with np.errstate(all="ignore"):  # infinities and NaN are answers here
            if eps is not None:
                x *= 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
            logit = ((x * weight).sum(-1) + np.float32(bias)) / np.float32(temperature)  # (n, d) -> (n,)
            return HarmScore(logit if output == "logit" else 1 / (1 + np.exp(-logit)), "numpy")
    values = np.empty(rows, np.float32)
    _native.check(_native.LIBRARY.protector_harm_score_cpu(_native.Args(
        _address(hidden), None if index is None else _address(index), _address(weight), _address(values),
        rows, shape[-1], positions, batch_stride, row_stride, bias, -1 if eps is None else eps, temperature,
        dtype, output == "logit")))
    return HarmScore(values, "cpp")


_torch = None  # the module, once its operator is registered
_torch_library = None  # an operator lives as long as its Library object
_operator = None  # torch.ops.protector.harm_score.default; finding it anew would cost a microsecond a call
_TORCH_DTYPES = {}  # torch dtype -> its number in csrc/harm_score.h


def register():
    """Register `protector::harm_score` with torch, if torch is imported; again does nothing.

    Importing this module does it where torch came first, and the first tensor does it otherwise. Call it before
    torch.compile traces harm_score if neither has happened.
    """
    global _torch, _torch_library, _operator
    torch = sys.modules.get("torch")
    if _torch is not None or torch is None or not hasattr(torch, "library"):  # no library: torch is half imported
        return
    library = torch.library.Library("protector", "FRAGMENT")
    library.define("harm_score(Tensor hidden, Tensor weight, float bias=0., Tensor? index=None, float? eps=None, "
                   'float temperature=1., str output="score") -> Tensor', tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("harm_score", _score_torch, "CPU")
    library.impl("harm_score", _score_torch, "CUDA")
    torch.library.register_fake("protector::harm_score", _score_fake, lib=library)
    torch.library.register_autograd("protector::harm_score", _no_backward, lib=library)
    _TORCH_DTYPES.update({torch.float32: _native.FP32, torch.float16: _native.FP16, torch.bfloat16: _native.BF16})
    _torch, _torch_library, _operator = torch, library, torch.ops.protector.harm_score.default


def _torch_backend(device_type):
    if device_type == "cuda":
        return "cuda" if _native.HAS_CUDA else "torch"
    return "cpp" if _native.LIBRARY is not None else "torch"


def _check_tensor(name, tensor, dtype, device):
    if tensor.dtype != dtype:
        raise _wrong(name, dtype, tensor.dtype, f"Call .to({dtype})")
    if tensor.device != device:
        raise _wrong(name, f"on {device} as hidden is", tensor.device, "Move it there")
    if not tensor.is_contiguous():
        raise _wrong(name, "contiguous", f"stride {tensor.stride()}", "Call .contiguous() on it")


def _check_weight(name, tensor, d, device):
    if tensor.dim() != 1 or tensor.shape[0] != d:
        raise _wrong(name, (d,), f"shape {tuple(tensor.shape)}", "Pass one number per column of hidden")
    _check_tensor(name, tensor, _torch.float32, device)


def _check_torch(hidden, weight, index):
    if hidden.dtype not in _TORCH_DTYPES:
        raise _wrong("hidden", "float32, float16 or bfloat16", hidden.dtype, "Convert it")
    shape, device = hidden.shape, hidden.device
    if index is not None:
        _check_tensor("index", index, _torch.int64, device)
    layout = _layout(shape, hidden.stride(), None if index is None else index.shape)
    _check_weight("weight", weight, shape[-1], device)
    return layout


def _score_torch(hidden, weight, bias=0.0, index=None, eps=None, temperature=1.0, output="score"):
    rows, positions, batch_stride, row_stride = _check_torch(hidden, weight, index)
    on_cuda = hidden.is_cuda
    if index is not None and rows and not on_cuda:
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= positions:
            raise _wrong("index", f"in [0, {positions})", f"[{low}, {high}]", "Count from the start, unpadded")
    if on_cuda and not _native.HAS_CUDA or _native.LIBRARY is None:
        if _native.LIBRARY is not None:  # Python shows a warning of one place once
            warnings.warn("harm_score: protector/_kernels was built without CUDA, the PyTorch reference runs instead. "
                          "Put nvcc on the PATH and run `pip install .`.", RuntimeWarning, stacklevel=1)
        return harm_score_ref(hidden, weight, bias, index=index, eps=eps, temperature=temperature, output=output)
    values = _torch.empty(rows, dtype=_torch.float32, device=hidden.device)
    args = _native.Args(
        hidden.data_ptr(), None if index is None else index.data_ptr(), weight.data_ptr(), values.data_ptr(),
        rows, hidden.shape[-1], positions, batch_stride, row_stride, bias, -1 if eps is None else eps, temperature,
        _TORCH_DTYPES[hidden.dtype], output == "logit")
    if on_cuda:
        stream = _torch.cuda.current_stream(hidden.device).cuda_stream
        _native.check(_native.LIBRARY.protector_harm_score_cuda(args, hidden.device.index, stream))
    else:
        _native.check(_native.LIBRARY.protector_harm_score_cpu(args))
    return values


def _score_fake(hidden, weight, bias=0.0, index=None, eps=None, temperature=1.0, output="score"):
    return hidden.new_empty(_check_torch(hidden, weight, index)[0], dtype=_torch.float32)


def _no_backward(ctx, gradient):
    raise RuntimeError("harm_score: a training step must not go through the fused operator, got a backward. It has none, "
                       "because the head is under 0.1 % of a step. Use harm_score_ref or nn.Linear.")


register()
