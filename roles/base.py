"""The one class that every role subclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """Who this process is within its group; given to `Role.setup`."""

    role: str = "role"
    rank: int = 0
    world: int = 1
    device: str = "cpu"  # "cpu" or "cuda:0"
    threads: int = 1  # CPU threads the bundle pays for
    seed: int = 0  # of the run, the same for all members
    folder: Path | None = None  # of the run
    rendezvous: str = ""  # "tcp://host:port" of rank 0, when world > 1
    backend: str = "gloo"  # "gloo" on CPU, "nccl" on GPU
    node: str = "local"


@dataclass
class Meter:
    """Sums what a role reports during a call, as (value x weight, weight) by name."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Count `value` with `weight` under `name`; means are taken over all calls and members."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value * weight, weights + weight)

    def drain(self) -> dict[str, tuple[float, float]]:
        """What was counted since the last drain."""
        sums, self.sums = self.sums, {}
        return sums


class Role:
    """What a model (or the data) does in a run, as a plain class without Ray.

    The constructor takes plain, picklable settings and does no work: it runs at the controller. `setup` runs once in
    each member's process, before any verb. Every public method is a verb: it takes and returns messages (or small plain
    values) and can be called in process, as tests do.
    """

    member: Member = Member()
    version: int = 0  # of the weights in use; 0 where there are none
    name: str = ""  # word for this role in logs and metrics; "" means the class name in lower case

    def check(self) -> None:
        """Refuse settings that can't work: at the controller, when the role is spawned, before its members start. Must be quick."""

    def setup(self, member: Member) -> None:
        """Take `member`'s place in the group. Subclasses call this first, then load what they need."""
        self.member = member

    def close(self) -> None:
        """Give back what `setup` took (processes, files); called at the end, also after an error."""

    @property
    def meter(self) -> Meter:
        """Where verbs count what they measure: `self.meter.add("kl", value, weight=tokens)` becomes `policy/kl`."""
        found = self.__dict__.get("_meter")
        if found is None:
            found = self.__dict__["_meter"] = Meter()
        return found
