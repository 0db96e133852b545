"""How fast a policy trains: operations a second, and their share of what its GPU can do (MFU)."""

from __future__ import annotations

import numpy as np
import torch
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.models.adapters import Adapters
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.flops import count
from rolecall.roles.models.lora import names_of

# Dense bfloat16 and float16 products a second, in 10^12 operations, by what a device's name contains; the first that
# fits. From NVIDIA's data sheets, which print twice as much where they mean sparse ones.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
}


class Speed:
    """Counts a model's operations as it stands: what is trained, what is frozen, which linears have adapters."""

    def __init__(self, model: CausalModel, adapters: Adapters | None) -> None:
        self._spec = model.spec
        self._trained = {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}
        self._ranks = {}
        for name, _ in model.net.named_modules():
            if adapters is not None and names_of(name)[-1] in adapters.linears:
                self._ranks[name] = adapters.lora.r
        self._peak = peak(model.device, model.dtype)

    def operations(self, part: PackedBatch) -> float:
        """Of a forward and backward pass over these rows; 0 for a model that runs as its Hugging Face class."""
        if not self._spec.family or not len(part.targets):
            return 0.0
        fresh = np.flatnonzero(np.diff(part.segments, prepend=-1))  # where another segment, or room that none uses, begins
        lengths, used = np.diff(fresh, append=len(part.segments)), part.segments[fresh] >= 0
        return count(
            self._spec,
            lengths[used],
            before=part.positions[fresh[used]],
            predicted=len(part.targets),
            trained=self._trained,
            ranks=self._ranks,
        ).total

    def measures(self, operations: float, seconds: float) -> dict[str, tuple[float, float]]:
        """`tflops` (10^12 operations a second) and, on a GPU whose peak is known, `mfu`; as (sum, weight)."""
        if not operations:
            return {}
        found = {"tflops": (operations / 1e12, seconds)}
        return found | {"mfu": (operations / self._peak, seconds)} if self._peak else found


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device can do in 16 bits; 0 where that is not known, or for another dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value * 1e12 for known, value in PEAKS.items() if known in name), 0.0)
