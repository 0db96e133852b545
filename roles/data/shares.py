"""Which positions of a stream were given, by members who each take every so-manieth, also after their number has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rolecall.protocols.errors import DataError

State = dict[str, int]


@dataclass(frozen=True)
class Shares:
    """What was given before a run went on: for each time that it did, the next position of every member there was.

    Member r of w takes the positions r, r + w, r + 2 w, … So position p was given by w members whose next positions are
    n_0 … n_(w - 1) if p < n_(p mod w).
    """

    layers: tuple[tuple[int, ...], ...] = ()

    def given(self, position: int) -> bool:
        """Whether a position was given already."""
        return any(position < layer[position % len(layer)] for layer in self.layers)

    def first(self, rank: int, world: int) -> int:
        """The first position of a member's share that may not have been given yet."""
        start = min(self.layers[-1]) if self.layers else 0
        return start + (rank - start) % world

    def state(self, following: int, rank: int, world: int) -> State:
        """A member's place as integers; layers that lie behind it are left out."""
        layers = [layer for layer in self.layers if max(layer) > following]
        earlier = {f"given.{number}.{member}": at for number, layer in enumerate(layers) for member, at in enumerate(layer)}
        return {"next": following, "rank": rank, "world": world, **earlier}


def together(states: Sequence[State]) -> Shares:
    """What all members of a run had given, from the states of all of them.

    Raises:
        DataError: a member's state is missing.
    """
    worlds = {state.get("world", 0) for state in states}
    world = max(worlds)
    following = {state.get("rank", -1): state.get("next", -1) for state in states}
    if len(worlds) != 1 or sorted(following) != list(range(world)) or min(following.values()) < 0:
        raise DataError(
            "To go on with another number of data members, the states of all earlier ones are needed.",
            ask=f"states of {len(states)} members",
            have=f"a run of {world} members",
            remedy="restore from the list of all their states",
        )
    earlier = [layer for state in states for layer in earlier_of(state).layers]
    return Shares((*dict.fromkeys(earlier), tuple(following[rank] for rank in range(world))))


def earlier_of(state: State) -> Shares:
    """The layers that a member's state holds."""
    layers: dict[int, dict[int, int]] = {}
    for word, value in state.items():
        if word.startswith("given."):
            number, member = map(int, word.removeprefix("given.").split("."))
            layers.setdefault(number, {})[member] = value
    return Shares(tuple(tuple(layer[member] for member in range(len(layer))) for _, layer in sorted(layers.items())))
