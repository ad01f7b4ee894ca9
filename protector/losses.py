"""The two training losses, as pure functions of tensors.

    L_harm  = -1/N sum_i [ y_i log s_i + (1 - y_i) log(1 - s_i) ],   s = sigmoid(logit),  y = 1 - h
    L_detox = -1/N sum_i sum_t log p( a_acc[i,t] | a_acc[i,<t], a_rej[i], q[i] )

Source: Pi et al., MLLM-Protector, EMNLP 2024, in the form of the project's design.
"""
import torch
import torch.nn.functional as F

IGNORE = -100  # target id of a position that carries no loss; the value is torch's own default


def harm_loss(logits, labels, weights=None):
    """Binary cross-entropy of the harm detector.

        L = -sum_i w_i [ y_i log s_i + (1 - y_i) log(1 - s_i) ] / sum_i w_i,   s = sigmoid(logit)

    Source: MLLM-Protector, detector loss, with y = 1 - h (the paper's h is 1 for harmless) and w = 1.

    Args:
        logits: (B,) float, unbounded, higher is more harmful.
        labels: (B,) 0. or 1.; 1 is harmful. A soft label in between is a teacher's score.
        weights: (B,) float >= 0 with a positive sum, or None for equal weights.
    Returns:
        () float32.
    Raises:
        ValueError: shapes differ.
    Example:
        harm_loss(tensor([0.]), tensor([1.]))  # tensor(0.6931)
    """
    if logits.shape != labels.shape or logits.dim() != 1:
        raise ValueError(f"harm_loss: logits and labels must be (B,) of one size, got {tuple(logits.shape)} and "
                         f"{tuple(labels.shape)}. Pass one logit and one label per answer.")
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")  # (B,)
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / weights.sum()


def prefix_harm_loss(logits, labels, mask, weights=None):
    """harm_loss of every answer prefix: a stream is scored before its end, so each position has to know the label.

        L = sum_i w_i (1/T_i sum_t BCE(logit[i,t], y_i) r[i,t]) / sum_i w_i,   r[i,t] ~ position in the answer, mean 1

    The ramp r grows linearly: the first words of an answer say little about its label.

    Args:
        logits: (B, T) float, one per position.
        labels: (B,) 0. or 1.; 1 is harmful. A soft label in between is a teacher's score.
        mask: (B, T) bool, true on answer tokens; every row has at least one.
        weights: (B,) float >= 0 with a positive sum, or None.
    Returns:
        () float32.
    Raises:
        ValueError: shapes differ.
    Example:
        prefix_harm_loss(tensor([[9., 0.]]), tensor([1.]), tensor([[False, True]]))  # tensor(0.6931)
    """
    if logits.dim() != 2 or mask.shape != logits.shape or labels.shape != logits.shape[:1]:
        raise ValueError(f"prefix_harm_loss: logits and mask must be (B, T) and labels (B,), got {tuple(logits.shape)}, "
                         f"{tuple(mask.shape)} and {tuple(labels.shape)}. Pass one label per row.")
    mask = mask.float()
    targets = labels.float()[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")  # (B, T)
    ramp = mask.cumsum(1) * mask  # 1, 2, ..., T_i on the answer
    per_row = (ramp * losses).sum(1) / ramp.sum(1)  # (B,)
    if weights is None:
        return per_row.mean()
    return (weights * per_row).sum() / weights.sum()


def detox_loss(logits, targets):
    """Autoregressive loss of the response detoxifier; the prompt (question and rejected answer) carries none.

        L = -1/M sum_{t: targets[t] != IGNORE} log p(targets[t]),   M = number of such t

    The mean is over tokens, where the paper sums over an answer's tokens: the gradient's direction is the same for one
    answer, and a batch isn't ruled by its longest rewrite.

    Args:
        logits: (B, T, V) float; logits[:, t] predicts targets[:, t] (the caller shifts).
        targets: (B, T) int64 token ids, IGNORE on prompt and padding.
    Returns:
        () float32.
    Raises:
        ValueError: shapes differ.
    Example:
        detox_loss(zeros(1, 2, 4), tensor([[IGNORE, 3]]))  # tensor(1.3863) = log 4
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"detox_loss: targets must be {tuple(logits.shape[:-1])} as logits are, got "
                         f"{tuple(targets.shape)}. Shift both by one and pass one id per position.")
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
