"""What a role holds in memory."""

from __future__ import annotations

import msgspec


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one member of a role, in GB of 10^9 bytes.

    Args:
        weights, gradients, optimiser, activations, cache: parts of it on the device.
        host_gb: main memory beside that.
        pool: the pool it runs in; "" means the pool with the role's name.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    host_gb: float = 0.0
    pool: str = ""

    @property
    def device_gb(self) -> float:
        """All that lies on the device (in main memory where a pool has no GPU)."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.cache
