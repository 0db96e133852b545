"""Policies in several real processes, joined by gloo on loopback."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from rolecall.kernels.losses import policy_gradient
from rolecall.protocols.messages import PackedBatch, Weights
from rolecall.roles.base import Member
from rolecall.roles.policy import Policy

DEADLINE = 150.0  # seconds; a loaded machine needs many to start the processes
# What a policy imports, lazily imported parts of transformers too: once in the fork server, not once in each process.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.distributed_c10d",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "rolecall.roles.policy.checkpoint",
]


class Trained(NamedTuple):
    """What a member has after its updates."""

    weights: Weights  # its shard
    whole: Weights  # all of its tensors
    norms: list[float]  # of the gradient, one an update


def address() -> str:
    """A rendezvous on a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def play(member: Member, model: str, settings: dict[str, Any], updates: Sequence[Sequence[PackedBatch]], rate: float) -> Trained:
    """Be one member: accumulate each update's batches, then update."""
    from rolecall.roles.weights import export

    policy = Policy(model, deadline=DEADLINE, **settings)
    policy.setup(member)
    norms = []
    for batches in updates:
        for batch in batches:
            policy.accumulate(batch, policy_gradient)
        policy.update(rate)
        norms.append(policy.meter.drain()["grad_norm"][0])
    shard, whole = policy.publish(), export(policy._training.model.named_tensors(), policy.version)
    policy.close()
    return Trained(shard, whole, norms)


def play_all(model: str, settings: dict[str, Any], shares: Sequence[Sequence[Sequence[PackedBatch]]], rate: float) -> list[Trained]:
    """Play a group: `shares[rank]` are that member's batches of each update."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    where = address()
    with ProcessPoolExecutor(len(shares), mp_context=context) as pool:
        members = [Member(role="policy", rank=rank, world=len(shares), rendezvous=where) for rank in range(len(shares))]
        played = [pool.submit(play, member, model, settings, share, rate) for member, share in zip(members, shares, strict=True)]
        return [one.result(DEADLINE) for one in played]
