"""How tokens choose their experts.

T tokens, H hidden, E experts, K experts per token
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min.layers import linear
from moeplan.runtime_min.model_config import Choice

Chosen = tuple[Tensor, Tensor]  # weights [T, K] float32, experts [T, K]


def softmax(x: Tensor, gate: Tensor, bias: Tensor | None, top: int, renormalise: bool) -> Chosen:
    """The `top` experts of each token: their shares among all, or where `renormalise`, among those chosen."""
    scores = F.softmax(linear(x, gate, bias).float(), dim=-1)  # [T, E]
    weights, experts = scores.topk(top, dim=-1)
    return (weights.div_(weights.sum(dim=-1, keepdim=True)) if renormalise else weights), experts


def grouped_softmax(x: Tensor, gate: Tensor, top: int, choice: Choice) -> Chosen:
    """Shares among all experts, of those in the groups with the best single ones.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.2.
    """
    scores = F.softmax(F.linear(x.float(), gate.float()), dim=-1)
    if choice.groups > 1:
        best = scores.view(len(x), choice.groups, -1).amax(dim=-1)
        scores = scores.masked_fill(~_in_groups(best, scores, choice), 0.0)
    weights, experts = scores.topk(top, dim=-1)
    return weights.mul_(choice.scale), experts


def sigmoid(
    x: Tensor, gate: Tensor, correction: Tensor, top: int, choice: Choice, renormalise: bool
) -> Chosen:
    """Sigmoids, chosen by their sums with a correction, in the groups with the best two.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    scores = F.linear(x.float(), gate.float()).sigmoid_()
    corrected = scores + correction
    if choice.groups > 1:
        best = corrected.view(len(x), choice.groups, -1).topk(2, dim=-1).values.sum(dim=-1)
        corrected.masked_fill_(~_in_groups(best, scores, choice), -torch.inf)
    experts = corrected.topk(top, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalise:
        weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights.mul_(choice.scale), experts


def _in_groups(best: Tensor, scores: Tensor, choice: Choice) -> Tensor:
    """Which of scores [T, E] are in the kept groups by best [T, groups]."""
    kept = best.topk(choice.kept, dim=-1).indices
    groups = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    return groups.repeat_interleave(scores.shape[1] // choice.groups, dim=1)


def sparsemixer(x: Tensor, gate: Tensor, top: int, jitter: float) -> Chosen:
    """The best experts, each one's share among those not chosen before whose scores are near its own.

    Source: arXiv 2409.12136 in inference, as transformers 5.23.0 has it in `modeling_phimoe.py`.
    """
    scores = linear(x, gate).float()
    left, weights, experts = scores, [], []
    for _ in range(top):
        most, chosen = left.max(dim=-1, keepdim=True)
        far = (most - scores) / scores.abs().clamp(min=most) > 2 * jitter
        weights.append(F.softmax(left.masked_fill(far, -torch.inf), dim=-1).gather(1, chosen))
        experts.append(chosen)
        left = left.scatter(1, chosen, -torch.inf)
    return torch.cat(weights, dim=1), torch.cat(experts, dim=1)


def of_input(x: Tensor, gate: Tensor, top: int) -> Chosen:
    """Sigmoids, to be multiplied with what goes into an expert. Source: Llama 4, `modeling_llama4.py`."""
    scores, experts = linear(x, gate).float().topk(top, dim=-1)
    return scores.sigmoid_(), experts
