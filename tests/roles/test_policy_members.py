"""Several members, each with a part of the batch, give the update that one gives with all of it."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from gloo import Trained, address, play, play_all
from rolecall.protocols.errors import RolecallError
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.weights import assemble, version_digest
from tiny import tiny_samples

RATE = 1e-3
UPDATES = 3
# float32 sums in another order, seen as a share of the learning rate (no weight moves further than that in an update). Adam
# divides a gradient by its own size, so where it is all but 0 rounding decides a good part of the step: a mean over the
# weights (7e-7 seen) and a bound for each (2.4e-4 seen).
MEAN = 1e-5 * RATE
ANY = 1e-2 * RATE
NORM = 1e-5  # relative, of the gradient, for the same reason


def shares(members: int) -> list[list[list[PackedBatch]]]:
    """Units 0, 1, 2, 3 of each update dealt out to the members but the last of several, which gets none in the first update."""
    dealt: list[list[list[PackedBatch]]] = [[] for _ in range(members)]
    for update in range(UPDATES):
        samples = tiny_samples(4, 3, seed=update)
        advantages = np.random.default_rng(update).standard_normal(12).astype(np.float32)
        weight = 1 / float(np.diff(samples.cu_seqlens).sum() - samples.prompt_lengths.sum())
        owners = np.arange(12) // 3 % (members - (members > 1 and update == 0))
        for rank in range(members):
            weights = np.where(owners == rank, weight, 0.0)
            dealt[rank].append([pack_samples(samples, advantages, weights, capacity=48)])
    return dealt


@pytest.fixture(scope="module")
def one(tiny: str) -> Trained:
    return play(Member(), tiny, {"clip": 0.05}, shares(1)[0], RATE)


@pytest.mark.parametrize("members", [2, 3])
def test_members_give_the_update_of_one(tiny: str, one: Trained, members: int) -> None:
    dealt = shares(members)
    assert [len(rank[0][0].targets) > 0 for rank in dealt] == [True] * (members - 1) + [False]
    played = play_all(tiny, {"clip": 0.05}, dealt, RATE)
    assert len({version_digest([member.whole]) for member in played}) == 1  # equal bits in all members
    assert all(member.norms == played[0].norms for member in played)
    assert played[0].norms == pytest.approx(one.norms, rel=NORM)
    assert min(one.norms) > 0.05  # the clip was at work
    together, alone = assemble([member.weights for member in played]), assemble([one.whole])
    assert together.keys() == alone.keys()
    difference = torch.cat([(together[name] - alone[name]).abs().flatten() for name in alone])
    assert difference.mean() <= MEAN
    assert difference.max() <= ANY
    start = assemble([play(Member(), tiny, {}, [], RATE).whole])
    assert torch.cat([(start[name] - alone[name]).abs().flatten() for name in alone]).mean() > 0.5 * RATE


def test_members_that_do_not_come_are_told_of_in_time(tiny: str) -> None:
    policy = Policy(tiny, deadline=2.0)
    started = time.monotonic()
    with pytest.raises(RolecallError, match=r"policy\[0\]: 2 members did not meet at tcp://127\.0\.0\.1:\d+ within 2 s"):
        policy.setup(Member(role="policy", rank=0, world=2, rendezvous=address()))
    assert time.monotonic() - started < 20
    with pytest.raises(RolecallError, match="did not meet at no address"):
        policy.setup(Member(role="policy", rank=0, world=2))
