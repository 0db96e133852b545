"""Sparse MLPs, in plain form: a router picks experts for each token, each expert computes its tokens together.

T tokens, D hidden size, E experts, A of them active a token, F size within an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rolecall.roles.models.spec import Experts
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class SparseMLP(nn.Module):
    """A weighted sum of the MLPs that the router picks.

    The loop over experts has the sizes of their shares on the host: one wait for the device a layer.

    Args:
        hidden: D.
        kinds: how many, how large, how routed.
        act: of the gate, where `kinds` does not say another.
    """

    def __init__(self, hidden: int, kinds: Experts, act: Activation) -> None:
        super().__init__()
        self.kinds = kinds
        clamped = kinds.kind == "top_softmax"
        self.router = nn.Linear(hidden, kinds.number, bias=clamped)
        self.experts: GatedExperts | ClampedExperts
        self.experts = ClampedExperts(hidden, kinds) if clamped else GatedExperts(hidden, kinds)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, D] to [R, C, D]."""
        flat = x.reshape(-1, x.shape[-1])
        weights_TA, chosen_TA = self._route(flat)
        order = chosen_TA.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        token = order // self.kinds.active
        counts = torch.bincount(chosen_TA.flatten(), minlength=self.kinds.number).tolist()
        parts = flat[token].split(counts)
        made = [self.experts(part, expert, self.act) for expert, part in enumerate(parts) if len(part)]
        weighted = torch.cat(made) * weights_TA.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, token, weighted.to(flat.dtype)).view_as(x)

    def _route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each token, both [T, A]."""
        logits = self.router(flat)
        if self.kinds.kind == "top_softmax":
            best, chosen = logits.topk(self.kinds.active, dim=-1)
            return best.softmax(-1), chosen
        wide = torch.promote_types(logits.dtype, torch.float32)
        best, chosen = logits.softmax(-1, dtype=wide).topk(self.kinds.active, dim=-1)
        if self.kinds.renormalise:
            best = best / best.sum(-1, keepdim=True)
        return best.to(logits.dtype), chosen


class GatedExperts(nn.Module):
    """Experts of Qwen3-MoE: down(act(gate(x)) x up(x)); gate and up lie one after the other."""

    def __init__(self, hidden: int, kinds: Experts) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(kinds.number, 2 * kinds.intermediate, hidden))
        self.down = nn.Parameter(torch.empty(kinds.number, hidden, kinds.intermediate))

    def forward(self, x: Tensor, expert: int, act: Activation) -> Tensor:
        """[t, D] to [t, D], of one expert."""
        gate, up = nn.functional.linear(x, self.gate_up[expert]).chunk(2, dim=-1)
        return nn.functional.linear(act(gate) * up, self.down[expert])


class ClampedExperts(nn.Module):
    """Experts of GPT-OSS: down((up + 1) x gate x sigmoid(alpha gate)), clamped; gate and up alternate, biases everywhere."""

    def __init__(self, hidden: int, kinds: Experts) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(kinds.number, hidden, 2 * kinds.intermediate))
        self.gate_up_bias = nn.Parameter(torch.empty(kinds.number, 2 * kinds.intermediate))
        self.down = nn.Parameter(torch.empty(kinds.number, kinds.intermediate, hidden))
        self.down_bias = nn.Parameter(torch.empty(kinds.number, hidden))
        self.limit, self.alpha = kinds.limit, kinds.alpha

    def forward(self, x: Tensor, expert: int, act: Activation) -> Tensor:
        """[t, D] to [t, D], of one expert; `act` is not asked."""
        both = x @ self.gate_up[expert] + self.gate_up_bias[expert]
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        return ((up + 1) * (gate * torch.sigmoid(gate * self.alpha))) @ self.down[expert] + self.down_bias[expert]
