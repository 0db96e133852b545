"""Vector bin packing over equal nodes taken together: the search behind `fit`.

Ray checks plain resources by their sums, but a raylet hands GPUs out device by device: the whole part of what a bundle
asks takes free devices, the fraction goes to the fullest device that still has room. Three bundles of 0.6 GPU
therefore don't fit two GPUs, though 1.8 < 2, and the order in which groups are made can matter. This search
does the same, and `Solution.order` is the order to make the groups in.

A state is what is free on a node; nodes in one state are interchangeable, so the cluster is a count by state.
First two greedy passes over a few orders of the pools (any size); then, where no more than `DEPTH` bundles are asked,
a depth-first search over all placements that remembers dead ends, for at most `STEPS` steps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rolecall.placement.pools import STEP

DEPTH = 64  # bundles up to which the exhaustive search is tried
STEPS = 20_000  # of it; about a second


class Demand(NamedTuple):
    """What one bundle asks: steps of each plain resource, in the order of `Problem.resources`, and of GPU."""

    plain: tuple[int, ...]
    gpu: int


class State(NamedTuple):
    """What is free on a node."""

    kind: int  # index of the node's type
    plain: tuple[int, ...]
    devices: int  # GPUs that are wholly free
    parts: tuple[int, ...]  # steps free on each GPU in part use, ascending


@dataclass(frozen=True)
class Item:
    """A base pool: its bundles as (demand, how many), largest first, and the node types it may use."""

    name: str
    bundles: tuple[tuple[Demand, int], ...]
    strategy: str
    kinds: frozenset[int]

    @property
    def count(self) -> int:
        """Number of bundles."""
        return sum(count for _, count in self.bundles)


class Move(NamedTuple):
    """`nodes` nodes go from state `before` to `after`, each taking `each` bundles of `demand` of the item."""

    item: int
    demand: Demand
    each: int
    nodes: int
    before: State
    after: State
    aside: bool  # the nodes take no more of this item until it is done (or the round is)


MERGE = None  # in a list of moves: nodes set aside may be used again
Moves = list[Move | None]
Counts = dict[State, int]


@dataclass
class Solution:
    """How every item is placed, as moves, and the order of the items that they are for."""

    moves: Moves
    order: tuple[int, ...]


@dataclass
class Answer:
    """A solution, or none; `proven` says that none exists, not only that none was found."""

    solution: Solution | None
    proven: bool = True


def take(state: State, demand: Demand) -> State | None:
    """The state after one more bundle on the node, or None where it does not fit."""
    plain = tuple([free - asked for free, asked in zip(state.plain, demand.plain, strict=True)])
    if plain and min(plain) < 0:
        return None
    if not demand.gpu:
        return state._replace(plain=plain)
    whole, part = divmod(demand.gpu, STEP)
    if whole > state.devices:
        return None
    devices, parts = state.devices - whole, state.parts
    if part:
        for index, free in enumerate(parts):
            if free >= part:
                rest = (free - part,) if free > part else ()
                parts = tuple(sorted(parts[:index] + rest + parts[index + 1 :]))
                break
        else:
            if not devices:
                return None
            devices, parts = devices - 1, tuple(sorted((*parts, STEP - part)))
    return State(state.kind, plain, devices, parts)


def fill(state: State, demand: Demand, limit: int) -> tuple[int, State]:
    """As many bundles of `demand` as the node takes, at most `limit`."""
    done = 0
    while done < limit and (after := take(state, demand)) is not None:
        state, done = after, done + 1
    return done, state


def take_all(state: State, item: Item) -> State | None:
    """All bundles of an item on one node."""
    for demand, count in item.bundles:
        done, state = fill(state, demand, count)
        if done < count:
            return None
    return state


def room(counts: Counts, item: Item, limit: int) -> int:
    """Bundles of the item's largest kind that fit with nothing else placed, at most `limit`; exact for equal bundles."""
    demand, found = item.bundles[0][0], 0
    for state, nodes in counts.items():
        if state.kind in item.kinds:
            each = 1 if item.strategy == "STRICT_SPREAD" else limit
            found += nodes * fill(state, demand, each)[0]
            if found >= limit:
                return limit
    return found


@dataclass
class Problem:
    """Items to place on counted states; `weights` makes scarce resources dear when choosing a node."""

    items: Sequence[Item]
    counts: Counts
    weights: tuple[float, ...] = ()
    gpu_weight: float = 0.0
    dead: set[object] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        width = len(next(iter(self.counts)).plain) if self.counts else 0
        totals = [sum(state.plain[i] * nodes for state, nodes in self.counts.items()) for i in range(width)]
        gpus = sum(free_gpu(state) * nodes for state, nodes in self.counts.items())
        self.weights = tuple(1.0 / total if total else 0.0 for total in totals)
        self.gpu_weight = 4.0 / gpus if gpus else 0.0

    def left(self, state: State) -> float:
        """Worth of what is free on a node: the tightest fit leaves least."""
        plain = sum(weight * free for weight, free in zip(self.weights, state.plain, strict=True))
        return plain + self.gpu_weight * free_gpu(state)

    def possible(self) -> bool:
        """False where an item by itself, or all that are bound to some types of node, ask more than there is."""
        if any(room(self.counts, item, item.count) < item.count for item in self.items if len(item.bundles) == 1):
            return False
        for kinds in {item.kinds for item in self.items} | {frozenset(kind for item in self.items for kind in item.kinds)}:
            states = [(state, nodes) for state, nodes in self.counts.items() if state.kind in kinds]
            asked = [pair for item in self.items if item.kinds <= kinds for pair in item.bundles]
            for index in range(len(self.weights)):
                has = sum(state.plain[index] * nodes for state, nodes in states)
                if sum(demand.plain[index] * count for demand, count in asked) > has:
                    return False
            if sum(demand.gpu * count for demand, count in asked) > sum(free_gpu(state) * nodes for state, nodes in states):
                return False
        return True

    def orders(self) -> Iterator[tuple[int, ...]]:
        """Orders of the items worth trying: hardest to please first, most GPUs first, as given, and back to front."""
        numbers = range(len(self.items))

        def choice(number: int) -> int:
            return sum(nodes for state, nodes in self.counts.items() if state.kind in self.items[number].kinds)

        def gpus(number: int) -> int:
            return max(demand.gpu for demand, _ in self.items[number].bundles)

        def size(number: int) -> float:
            return sum(self._size(demand) * count for demand, count in self.items[number].bundles)

        def free(number: int) -> int:
            return ("STRICT_PACK", "STRICT_SPREAD", "PACK", "SPREAD").index(self.items[number].strategy)

        seen = set()
        for order in (
            sorted(numbers, key=lambda n: (choice(n), free(n), -gpus(n), -size(n))),
            sorted(numbers, key=lambda n: (-gpus(n), free(n), choice(n), -size(n))),
            sorted(numbers, key=lambda n: (free(n), -size(n))),
            list(numbers),
            sorted(numbers, reverse=True),
        ):
            if tuple(order) not in seen:
                seen.add(tuple(order))
                yield tuple(order)

    def _size(self, demand: Demand) -> float:
        plain = sum(weight * asked for weight, asked in zip(self.weights, demand.plain, strict=True))
        return plain + self.gpu_weight * demand.gpu


def free_gpu(state: State) -> int:
    """Steps of GPU free on a node."""
    return state.devices * STEP + sum(state.parts)


def solve(items: Sequence[Item], counts: Counts, *, steps: int = STEPS) -> Answer:
    """A placement of every item, or none.

    Args:
        items: what to place. counts: free states and the number of nodes in each.
        steps: limit of the exhaustive search; 0 leaves it out.
    """
    from rolecall.placement.greedy import greedy

    problem = Problem(items, dict(counts))
    if not problem.possible():
        return Answer(None)
    for order in problem.orders():
        for tight in (False, True):
            moves = greedy(problem, order, tight=tight)
            if moves is not None:
                return Answer(Solution(moves, order))
    if not steps or sum(item.count for item in items) > DEPTH:
        return Answer(None, proven=False)
    return _exhaust(problem, steps)


def _exhaust(problem: Problem, steps: int) -> Answer:
    """Depth first, over every order of the pools with a fraction of a GPU that could make a difference."""
    first = next(problem.orders())
    parts = [n for n in first if any(demand.gpu % STEP for demand, _ in problem.items[n].bundles)]
    rest = [n for n in first if n not in parts]
    orders: Iterator[tuple[int, ...]] = itertools.permutations(parts) if len(parts) <= 5 else iter([tuple(parts)])
    for order in orders:
        problem.dead.clear()
        full = (*rest, *order)
        moves = _descend(problem, full, 0, 0, 0, problem.counts, {}, steps)
        if moves is not None:
            return Answer(Solution(moves, full))
        if problem.steps >= steps:
            return Answer(None, proven=False)
    return Answer(None, proven=len(parts) <= 5)


def _descend(
    problem: Problem, order: tuple[int, ...], at: int, kind: int, done: int, counts: Counts, aside: Counts, steps: int
) -> Moves | None:
    """Place bundle `done` of kind `kind` of item `order[at]` and everything after it; None where that can't be."""
    if at == len(order):
        return []
    item = problem.items[order[at]]
    key = (at, kind, done, frozenset(counts.items()), frozenset(aside.items()))
    problem.steps += 1
    if problem.steps > steps or key in problem.dead:
        return None
    strict = item.strategy == "STRICT_PACK"
    demand, count = item.bundles[kind]
    options = []
    for state in counts:
        if state.kind in item.kinds and (after := take_all(state, item) if strict else take(state, demand)) is not None:
            options.append((problem.left(after), state, after))
    for _, before, after in sorted(options):
        spread = item.strategy == "STRICT_SPREAD"
        rest = moved(counts, before, 1)
        parked = aside
        if spread:
            parked = added(aside, after, 1)
        else:
            rest = added(rest, after, 1)
        here: Moves = pack_moves(order[at], item, before) if strict else [Move(order[at], demand, 1, 1, before, after, spread)]
        next_at, next_kind, next_done = at, kind, done + 1
        if strict or (next_done == count and kind + 1 == len(item.bundles)):
            next_at, next_kind, next_done = at + 1, 0, 0
            here.append(MERGE)
            rest, parked = joined(rest, parked), {}
        elif next_done == count:
            next_kind, next_done = kind + 1, 0
        below = _descend(problem, order, next_at, next_kind, next_done, rest, parked, steps)
        if below is not None:
            return here + below
    problem.dead.add(key)
    return None


def pack_moves(number: int, item: Item, state: State) -> Moves:
    """The moves that put a whole item on one node in `state` (it is known to fit)."""
    moves: Moves = []
    for demand, count in item.bundles:
        _, after = fill(state, demand, count)
        moves.append(Move(number, demand, count, 1, state, after, False))
        state = after
    return moves


def moved(counts: Counts, state: State, nodes: int) -> Counts:
    """`counts` with `nodes` nodes fewer in `state`."""
    rest = dict(counts)
    rest[state] -= nodes
    if not rest[state]:
        del rest[state]
    return rest


def added(counts: Counts, state: State, nodes: int) -> Counts:
    """`counts` with `nodes` nodes more in `state`."""
    return {**counts, state: counts.get(state, 0) + nodes}


def joined(one: Counts, other: Counts) -> Counts:
    """Both together."""
    return dict(Counter(one) + Counter(other)) if other else one
