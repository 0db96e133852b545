"""The greedy passes of the search: in the spirit of Ray's own policies, but for all pools together and in bulk."""

from __future__ import annotations

from rolecall.placement.search import (
    MERGE,
    Counts,
    Demand,
    Item,
    Move,
    Moves,
    Problem,
    State,
    added,
    fill,
    joined,
    moved,
    pack_moves,
    take,
    take_all,
)


def greedy(problem: Problem, order: tuple[int, ...], *, tight: bool) -> Moves | None:
    """Place the items one by one in `order`; None where one finds no place.

    Args:
        tight: PACK pools take the tightest node each time; otherwise the tightest that takes all the rest, or
            else the one that takes most, which uses fewest nodes.
    """
    counts: Counts = dict(problem.counts)
    moves: Moves = []
    for number in order:
        item = problem.items[number]
        if item.strategy == "STRICT_PACK":
            result = _one_node(problem, number, item, counts)
        elif item.strategy == "PACK":
            result = _pack(problem, number, item, counts, tight)
        else:
            result = _spread(problem, number, item, counts, strict=item.strategy == "STRICT_SPREAD")
        if result is None:
            return None
        counts, more = result
        moves += [*more, MERGE]
    return moves


def _one_node(problem: Problem, number: int, item: Item, counts: Counts) -> tuple[Counts, Moves] | None:
    found = [(after, state) for state in counts if state.kind in item.kinds and (after := take_all(state, item)) is not None]
    if not found:
        return None
    after, before = min(found, key=lambda pair: problem.left(pair[0]))
    return added(moved(counts, before, 1), after, 1), pack_moves(number, item, before)


def _pack(problem: Problem, number: int, item: Item, counts: Counts, tight: bool) -> tuple[Counts, Moves] | None:
    moves: Moves = []
    for demand, todo in item.bundles:
        while todo:
            found = []
            for state in counts:
                if state.kind in item.kinds:
                    each, after = fill(state, demand, todo)
                    if each:
                        found.append((0 if tight else -each, problem.left(after), state, each, after))
            if not found:
                return None
            _, _, before, each, after = min(found)
            nodes = min(counts[before], todo // each)
            counts = added(moved(counts, before, nodes), after, nodes)
            moves.append(Move(number, demand, each, nodes, before, after, False))
            todo -= nodes * each
    return counts, moves


def _spread(problem: Problem, number: int, item: Item, counts: Counts, *, strict: bool) -> tuple[Counts, Moves] | None:
    """One bundle a node, round by round; a second round only where the strategy allows it."""
    moves: Moves = []
    aside: Counts = {}
    for demand, todo in item.bundles:
        while todo:
            step = _one_each(problem, item, demand, counts)
            if step is None:
                if strict or not aside:
                    return None
                counts, aside = joined(counts, aside), {}
                moves.append(MERGE)
                if _one_each(problem, item, demand, counts) is None:
                    return None
                continue
            before, after = step
            nodes = min(counts[before], todo)
            counts = moved(counts, before, nodes)
            aside = added(aside, after, nodes)
            moves.append(Move(number, demand, 1, nodes, before, after, True))
            todo -= nodes
    return joined(counts, aside), moves


def _one_each(problem: Problem, item: Item, demand: Demand, counts: Counts) -> tuple[State, State] | None:
    found = [(state, after) for state in counts if state.kind in item.kinds and (after := take(state, demand)) is not None]
    if not found:
        return None
    return min(found, key=lambda pair: (problem.left(pair[1]), pair))
