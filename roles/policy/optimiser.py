"""AdamW with float32 master weights, and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EPSILON = 1e-8  # AdamW's, as everywhere


class Optimiser:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over named parameters.

    Parameters of a narrower dtype than their gradients have a master copy in the gradients' dtype, which is what is
    updated; the parameter is that, rounded. Vectors (gains of norms, biases) are not decayed.
    """

    def __init__(
        self,
        named: Mapping[str, torch.nn.Parameter],
        gradients: Sequence[Tensor],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.steps = 0  # updates applied
        self._names = list(named)
        self._parameters = list(named.values())
        self._masters = [
            parameter if parameter.dtype == gradient.dtype else torch.nn.Parameter(parameter.detach().to(gradient.dtype))
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        groups = [
            {"params": [master for master in self._masters if (master.ndim > 1) == decayed], "weight_decay": weight_decay * decayed}
            for decayed in (True, False)
        ]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=EPSILON, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters from the gradients given at the start."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.steps += 1
        narrow = [(parameter, master) for parameter, master in self._pairs() if parameter is not master]
        if narrow:
            torch._foreach_copy_([parameter for parameter, _ in narrow], [master for _, master in narrow])

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The state: "mean/<name>", "square/<name>" (moments of the gradient) and, for narrow parameters, "master/<name>"."""
        found: dict[str, Tensor] = {}
        for name, parameter, master in zip(self._names, self._parameters, self._masters, strict=True):
            state = self._adam.state[master]
            if state:
                found[f"mean/{name}"], found[f"square/{name}"] = state["exp_avg"], state["exp_avg_sq"]
            if parameter is not master:
                found[f"master/{name}"] = master.detach()
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over a state as `tensors` gave it, after so many updates; the parameters are restored apart from this.

        Raises:
            KeyError: a tensor is missing. Nothing was changed then.
        """
        moments = [(tensors[f"mean/{name}"], tensors[f"square/{name}"]) for name in self._names] if steps else []
        narrow = [(master, tensors[f"master/{name}"]) for name, (parameter, master) in self._named_pairs() if parameter is not master]
        for master, saved in narrow:
            master.copy_(saved)
        self._adam.state.clear()
        for master, (mean, square) in zip(self._masters, moments, strict=False):
            self._adam.state[master] = {
                "step": torch.tensor(float(steps), device=master.device),
                "exp_avg": mean.to(master, copy=True),
                "exp_avg_sq": square.to(master, copy=True),
            }
        self.steps = steps

    def adopt(self) -> None:
        """Start again from the parameters as they are now: masters follow, moments and steps are forgotten."""
        for parameter, master in self._pairs():
            if parameter is not master:
                master.data.copy_(parameter.data)
        self._adam.state.clear()
        self.steps = 0

    def _pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        return list(zip(self._parameters, self._masters, strict=True))

    def _named_pairs(self) -> list[tuple[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]]:
        return list(zip(self._names, self._pairs(), strict=True))


def scheduled(base: float, step: int, *, schedule: str, warmup: int, total_steps: int, cooldown: int = 0) -> float:
    """Learning rate of update number `step` (from 0): a linear warmup, then one of these.

    "constant"; "linear" or "cosine" to 0 at `total_steps`; "wsd" (warmup, stable, decay: Hu et al. 2024, arXiv:2404.06395), which
    is constant until `cooldown` updates before `total_steps` (0: a tenth of them), and linear to 0 from there.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    begin = total_steps - (cooldown or max(1, total_steps // 10)) if schedule == "wsd" else warmup
    done = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    return base * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
