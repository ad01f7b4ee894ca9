"""The losses by hand, against float64, and by their gradients."""
import math

import pytest
import torch

from protector.losses import IGNORE, detox_loss, harm_loss, prefix_harm_loss

LOG2, LOG3 = math.log(2), math.log(3)
tensor = torch.tensor


def bce64(logit, label):
    """-[y log s + (1 - y) log(1 - s)] in float64, straight from the equation."""
    score = torch.sigmoid(torch.as_tensor(logit, dtype=torch.float64))
    return -(label * torch.log(score) + (1 - label) * torch.log(1 - score))


# logit log 3 is a score of 3/4: the loss is log(4/3) for a harmful answer and log 4 for a harmless one.
@pytest.mark.parametrize("logits, labels, weights, expected", [
    ([0.0], [1.0], None, LOG2),
    ([LOG3], [1.0], None, math.log(4 / 3)),
    ([LOG3], [0.0], None, math.log(4)),
    ([LOG3, LOG3], [1.0, 0.0], None, (math.log(4 / 3) + math.log(4)) / 2),
    ([LOG3, LOG3], [1.0, 0.0], [3.0, 1.0], (3 * math.log(4 / 3) + math.log(4)) / 4),
    ([LOG3, 5.0], [0.0, 1.0], [0.5, 0.0], math.log(4)),  # weight 0: the row isn't there
    ([0.0], [0.25], None, LOG2),  # an even guess costs log 2 whatever the soft label
    ([LOG3], [0.75], None, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
])
def test_harm_loss_by_hand(logits, labels, weights, expected):
    loss = harm_loss(tensor(logits), tensor(labels), None if weights is None else tensor(weights))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_harm_loss_has_no_cliff():
    # log(1 - s) in float32 is -inf from a logit of 17 on; the loss of a confident error is its logit.
    logits = tensor([100.0, -100.0, 1e4, -100.0])
    losses = [harm_loss(logits[i:i + 1], tensor([y])).item() for i, y in enumerate((0.0, 1.0, 0.0, 0.0))]
    assert losses == pytest.approx([100, 100, 1e4, 0], abs=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_harm_loss_matches_float64(dtype, tolerance):
    # Summed in float32: 129 terms of at most 20 err by under 129 * 2^-24 of the largest. The input is rounded before both.
    generator = torch.Generator().manual_seed(1)
    logits = (6 * torch.randn(129, generator=generator)).to(dtype)
    labels, weights = (torch.rand(129, generator=generator) < 0.4).float(), torch.rand(129, generator=generator)
    expected = (weights.double() * bce64(logits.double(), labels.double())).sum() / weights.double().sum()
    assert harm_loss(logits, labels, weights).item() == pytest.approx(expected.item(), rel=10 * tolerance)
    equal = harm_loss(logits, labels, torch.full((129,), 0.3))
    assert equal.item() == pytest.approx(harm_loss(logits, labels).item(), rel=tolerance * 10)


def test_harm_loss_gradient_is_score_minus_label():
    # dL/dz_i = w_i (s_i - y_i) / sum w
    logits = tensor([LOG3, -LOG3], requires_grad=True)
    harm_loss(logits, tensor([1.0, 1.0]), tensor([1.0, 3.0])).backward()
    assert logits.grad.tolist() == pytest.approx([(0.75 - 1) / 4, 3 * (0.25 - 1) / 4], rel=1e-6)


def test_prefix_harm_loss_by_hand():
    # One row, answer at positions 1..3, ramp 1, 2, 3. Scores 3/4, 1/2, 3/4 of a harmful answer:
    # (1 log(4/3) + 2 log 2 + 3 log(4/3)) / 6. Positions 0 and 4 are prompt and padding.
    logits, mask = tensor([[9.0, LOG3, 0.0, LOG3, -9.0]]), tensor([[False, True, True, True, False]])
    expected = (4 * math.log(4 / 3) + 2 * LOG2) / 6
    assert prefix_harm_loss(logits, tensor([1.0]), mask).item() == pytest.approx(expected, rel=1e-6)
    # A second row with one answer token: log 4. Each row counts by its weight, not by its length.
    logits = torch.cat([logits, tensor([[LOG3, 7.0, 7.0, 7.0, 7.0]])])
    mask = torch.cat([mask, tensor([[True, False, False, False, False]])])
    labels = tensor([1.0, 0.0])
    assert prefix_harm_loss(logits, labels, mask).item() == pytest.approx((expected + math.log(4)) / 2, rel=1e-6)
    weighted = prefix_harm_loss(logits, labels, mask, tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx((expected + 3 * math.log(4)) / 4, rel=1e-6)


def test_prefix_harm_loss_of_one_token_is_harm_loss():
    logits, labels = tensor([[0.3, 5.0], [-2.0, 5.0]]), tensor([1.0, 0.0])
    mask = tensor([[True, False], [True, False]])
    assert prefix_harm_loss(logits, labels, mask).item() == pytest.approx(harm_loss(logits[:, 0], labels).item(), rel=1e-6)


def test_prefix_harm_loss_ignores_what_is_no_answer():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), requires_grad=True)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 2:5], mask[1, 1:], mask[2, 6] = True, True, True
    prefix_harm_loss(logits, tensor([1.0, 0.0, 1.0]), mask).backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).all()


def test_detox_loss_by_hand():
    # Even logits over 4 ids: log 4. Then logits (log 3, 0) with target 0: p = 3/4. Position 1 is prompt.
    assert detox_loss(torch.zeros(1, 2, 4), tensor([[IGNORE, 3]])).item() == pytest.approx(math.log(4), rel=1e-6)
    logits = tensor([[[LOG3, 0.0], [50.0, 0.0], [0.0, 0.0]]])
    loss = detox_loss(logits, tensor([[0, IGNORE, 1]]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2, rel=1e-6)


def test_detox_loss_is_a_mean_over_tokens():
    # Rows of 1 and 3 targets: four tokens of one weight, not two rows of one weight.
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    targets = tensor([[IGNORE, IGNORE, 2], [0, 4, 1]])
    log_p = torch.log_softmax(logits.double(), -1)
    expected = -(log_p[0, 2, 2] + log_p[1, 0, 0] + log_p[1, 1, 4] + log_p[1, 2, 1]) / 4
    assert detox_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_detox_loss_gives_the_prompt_no_gradient():
    logits = torch.zeros(1, 4, 6, requires_grad=True)
    detox_loss(logits, tensor([[IGNORE, IGNORE, 5, 0]])).backward()
    assert (logits.grad[0, :2] == 0).all()
    # dL/dlogit = (p - onehot) / M with p = 1/6 and M = 2
    assert logits.grad[0, 2].tolist() == pytest.approx([1 / 12] * 5 + [-5 / 12], rel=1e-6)


@pytest.mark.parametrize("loss, shape, arguments", [
    (harm_loss, (5,), lambda: (tensor([0.0, 1.0, 0.0, 1.0, 0.5], dtype=torch.float64), torch.rand(5, dtype=torch.float64))),
    (prefix_harm_loss, (2, 4), lambda: (tensor([1.0, 0.0], dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool))),
    (detox_loss, (1, 3, 4), lambda: (tensor([[1, IGNORE, 3]]),)),
])
def test_gradients_are_those_of_finite_differences(loss, shape, arguments):
    # The losses work in float32: central differences with h = 1e-2 err by h^2/6 f''' < 1e-5 and by 2^-24 |L| / h < 2e-5.
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rest = arguments()
    at = logits.clone().requires_grad_()
    loss(at, *rest).backward()
    for i in range(logits.numel()):
        step = torch.zeros_like(logits).flatten()
        step[i] = 1e-2
        step = step.view_as(logits)
        slope = (loss(logits + step, *rest) - loss(logits - step, *rest)).item() / 2e-2
        assert at.grad.flatten()[i].item() == pytest.approx(slope, abs=5e-5)


@pytest.mark.parametrize("call, message", [
    (lambda: harm_loss(torch.zeros(2), torch.zeros(3)),
     "harm_loss: logits and labels must be (B,) of one size, got (2,) and (3,). Pass one logit and one label per answer."),
    (lambda: harm_loss(torch.zeros(2, 1), torch.zeros(2, 1)),
     "harm_loss: logits and labels must be (B,) of one size, got (2, 1) and (2, 1). Pass one logit and one label per answer."),
    (lambda: prefix_harm_loss(torch.zeros(2, 3), torch.zeros(3), torch.ones(2, 3)),
     "prefix_harm_loss: logits and mask must be (B, T) and labels (B,), got (2, 3), (2, 3) and (3,). Pass one label per row."),
    (lambda: prefix_harm_loss(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 2)),
     "prefix_harm_loss: logits and mask must be (B, T) and labels (B,), got (2, 3), (2, 2) and (2,). Pass one label per row."),
    (lambda: detox_loss(torch.zeros(1, 2, 4), torch.zeros(1, 3, dtype=torch.long)),
     "detox_loss: targets must be (1, 2) as logits are, got (1, 3). Shift both by one and pass one id per position."),
])
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
