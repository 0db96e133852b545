"""A checkpoint's data states go to as many members as there are now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rolecall.actors import saving
from rolecall.roles.base import Member
from rolecall.roles.data import Data
from tiny import tiny_tokenizer

RECORDS = [{"prompt": f"question {number}"} for number in range(30)]


class Done:
    """A call that is over."""

    def wait(self) -> None:
        pass


class Members:
    """A group whose members live in this process."""

    name = "data"

    def __init__(self, roles: list[Data]) -> None:
        self.roles, self.world = roles, len(roles)

    @property
    def all(self) -> Members:
        return self

    def one(self, rank: int) -> Members:
        return Members([self.roles[rank]])

    def restore(self, state: Any) -> Done:
        for role in self.roles:
            role.restore(state)
        return Done()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)])
def test_prompts_go_on_with_any_number_of_members(tmp_path: Path, before: int, after: int):
    model = tiny_tokenizer(tmp_path / "model")
    roles: list[Data] = []

    def members(world: int) -> list[Data]:
        made = [Data(RECORDS, model=model, held_out=0) for _ in range(world)]
        roles.extend(made)
        for rank, role in enumerate(made):
            role.setup(Member(role="data", rank=rank, world=world))
        return made

    try:
        first = members(before)
        given = {key for rank, role in enumerate(first) for key in role.prompts(rank + 2).keys.tolist()}
        saved = saving.Saved(step=1, states={"data": [role.state() for role in first]})
        second = members(after)
        saving.restore(tmp_path, saved, (Members(second),))  # type: ignore[arg-type]
        later = [key for role in second for key in role.prompts(10).keys.tolist()]
        assert len(set(later)) == len(later)
        assert not given & set(later)
        assert set(range(min(max(later), 9))) <= given | set(later)  # nothing is left out
    finally:
        for role in roles:
            role.close()
