"""A detector's blocks in int8 on a CPU: a faster way to score whole answers where the processor multiplies int8 in hardware (VNNI, AMX).

    s[t] = max_k |x[t, k]| / 127      q[t, k] = round(x[t, k] / s[t])      each token by its own largest value
    r[n] = max_k |W[n, k]| / 127      V[n, k] = round(W[n, k] / r[n])      each output by its own largest weight
    y[t, n] = s[t] r[n] sum_k q[t, k] V[n, k] + b[n]                       the sum in int32: exact, in whatever order

All else, attention among it, stays in float32.

Trap: rounding turns a difference in the last bit, as another shape of a batch or a cache makes it, into a step of 1/127, and blocks behind it
make that as large as the rounding itself: .25 in a logit where float32 would differ by 1e-5. So each sequence is scored alone, which makes
its score a function of the text, the machine and whether the blocks are compiled; and streams, which must tell what the whole will, aren't
scored in int8 at all.

Source: token-wise and output-wise quantisation, ZeroQuant (Yao et al., 2022).
"""
import torch
from torch import nn

from .errors import ModelError

_LARGEST = 127
_SMALLEST = 1e-30  # a row of zeros has a scale, too


def quantised_rows(x):
    """(n, K) float32 -> (n, K) int8 and (n, 1) float32 with x = int8 * float32, but for at most half of the latter.

    Example:
        quantised_rows(tensor([[127., -2.6]]))  # tensor([[127, -3]]), tensor([[1.]])
    """
    scale = x.abs().amax(1, keepdim=True).clamp_min(_SMALLEST) / _LARGEST  # NaN stays NaN: a guard must see it
    return (x / scale).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """nn.Linear with rounded weights and activations.

    Args:
        linear: nn.Linear in float32 on the CPU.
    """

    def __init__(self, linear):
        super().__init__()
        weight, scale = quantised_rows(linear.weight.detach().float())
        self.register_buffer("weight", weight)  # (N, K)
        self.register_buffer("scale", scale[:, 0])  # (N,)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x):
        """(..., K) float32 -> (..., N) float32."""
        rows, scale = quantised_rows(x.flatten(0, -2))
        y = product(rows, self.weight).float().mul_(self.scale).mul_(scale)  # (n, N)
        if self.bias is not None:
            y += self.bias
        return y.unflatten(0, x.shape[:-1])


def product(rows, weight):
    """(n, K) int8, (N, K) int8 -> (n, N) int32, exact where the machine's is (`check_product`)."""
    return torch._int_mm(rows, weight.t())


def check_product():
    """See that this machine sums int8 products exactly: instructions before VNNI add pairs of them in int16, where not all fit.

    Raises:
        ModelError: it doesn't.
    """
    signs = 1 - 2 * (torch.arange(1536) % 2)[:, None]  # +1, -1, ...
    rows, weight = ((_LARGEST * signs[:n]).to(torch.int8).expand(n, 576).contiguous() for n in (129, 1536))  # a batch and a layer as they are
    if not torch.equal(product(rows, weight), _LARGEST ** 2 * 576 * signs[:129].int() * signs.int().t()):
        raise ModelError("check_product: int8 products must be exact on this CPU, got others. Choose another quantisation.")


def in_int8(module):
    """Replace every nn.Linear below this module by an Int8Linear, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            in_int8(child)
