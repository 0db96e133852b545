"""AdamW with float32 master weights, and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from rolecall.roles.policy.gradients import Gradients, parts
from torch import Tensor

EPSILON = 1e-8  # AdamW's, as everywhere


class Optimiser:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over named parameters.

    Parameters of a narrower dtype than their gradients have a master copy in the gradients' dtype, which is what is
    updated; the parameter is that, rounded. The masters of a bucket of gradients lie in one buffer as these do, so that an update is a
    few calls however many parameters there are. Vectors (gains of norms, biases) are not decayed.
    """

    def __init__(
        self,
        named: Mapping[str, torch.nn.Parameter],
        gradients: Gradients,
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.steps = 0  # updates applied
        names = list(named)
        self._units = [
            unit
            for bucket, buffer in zip(gradients.buckets, gradients.buffers, strict=True)
            for unit in _units([names[number] for number in bucket], named, buffer)
        ]
        groups = [
            {"params": [unit.master for unit in self._units if unit.decayed == decayed], "weight_decay": weight_decay * decayed}
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
        narrow = [unit for unit in self._units if unit.narrow]
        if narrow:
            torch._foreach_copy_(
                [parameter for unit in narrow for parameter in unit.parameters],
                [part for unit in narrow for part in parts(unit.master, unit.parameters)],
            )

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The state: "mean/<name>", "square/<name>" (moments of the gradient) and, for narrow parameters, "master/<name>"."""
        found: dict[str, Tensor] = {}
        for unit in self._units:
            state = self._adam.state[unit.master]
            kinds = {"mean": state["exp_avg"], "square": state["exp_avg_sq"]} if state else {}
            if unit.narrow:
                kinds["master"] = unit.master.detach()
            for kind, flat in kinds.items():
                found |= {f"{kind}/{name}": part for name, part in zip(unit.names, parts(flat, unit.parameters), strict=True)}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over a state as `tensors` gave it, after so many updates; the parameters are restored apart from this.

        Raises:
            KeyError: a tensor is missing. Nothing was changed then.
        """
        kinds = ["mean", "square"] if steps else []
        for unit in self._units:  # all that is missing is missed before anything changes
            for kind in [*kinds, *(["master"] if unit.narrow else [])]:
                for name in unit.names:
                    tensors[f"{kind}/{name}"]
        self._adam.state.clear()
        for unit in self._units:
            if unit.narrow:
                _fill(unit.master.data, unit, "master", tensors)
            if steps:
                moments = [_fill(torch.empty_like(unit.master), unit, kind, tensors) for kind in kinds]
                step = torch.tensor(float(steps), device=unit.master.device)
                self._adam.state[unit.master] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        self.steps = steps

    def adopt(self) -> None:
        """Start again from the parameters as they are now: masters follow, moments and steps are forgotten."""
        for unit in self._units:
            if unit.narrow:
                for part, parameter in zip(parts(unit.master.data, unit.parameters), unit.parameters, strict=True):
                    part.copy_(parameter.data)
        self._adam.state.clear()
        self.steps = 0


class _Unit(NamedTuple):
    """What AdamW sees as one parameter."""

    master: torch.nn.Parameter  # the parameter itself, or the float32 copies of some, end to end
    names: list[str]
    parameters: list[torch.nn.Parameter]
    narrow: bool
    decayed: bool


def _units(names: list[str], named: Mapping[str, torch.nn.Parameter], buffer: Tensor) -> list[_Unit]:
    """Of one bucket; its parameters are all of one dtype, and all vectors or none."""
    parameters = [named[name] for name in names]
    decayed = parameters[0].ndim > 1
    if parameters[0].dtype == buffer.dtype:
        return [_Unit(named[name], [name], [named[name]], False, decayed) for name in names]  # each has its gradient
    master = torch.nn.Parameter(torch.cat([parameter.detach().flatten().to(buffer.dtype) for parameter in parameters]))
    master.grad = buffer
    return [_Unit(master, names, parameters, True, decayed)]


def _fill(flat: Tensor, unit: _Unit, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    for part, name in zip(parts(flat, unit.parameters), unit.names, strict=True):
        part.copy_(tensors[f"{kind}/{name}"])
    return flat


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
