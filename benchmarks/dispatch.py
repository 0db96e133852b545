"""`dispatch`: what the machinery between the roles costs, with roles that do next to nothing.

Four groups (rollout, reward, reference, policy) on placement groups pass one GRPO step's messages on: rollout makes the
batch, reward and reference read it, policy reads all three, the controller reads the scores. One round is one such step.

Raw Ray is a bound that checks nothing: its references are passed on at once. Beside it ours pays, for each call, for the checks and the
checksum where a message is made and for the checksum again where it is read, and for a second return value, the receipt, which the
controller fetches; and once a step it waits for the sizes of the samples, by which the next call is divided.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import codec
import numpy as np
import ray
from harness import Timing, alternate, arguments, finish
from rolecall.actors import spawn
from rolecall.actors.pending import TRAFFIC
from rolecall.kernels.balancing import balance
from rolecall.placement import PlacedPool, Pool, place
from rolecall.protocols import Logprobs, Metrics, Samples, Scores, encode
from rolecall.roles.base import Role

ROLES, MEMBERS = ("rollout", "reward", "reference", "policy"), 8
CPUS = 64  # what the cluster says it has: verl reserves a whole one for each of its 32 processes
ENVIRONMENT = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": CPUS}), "RAY_prestart_worker_first_driver": "0", "OMP_NUM_THREADS": "1"}
ROUNDS = 200  # of ours and of raw Ray, over all alternations
STARTED = time.perf_counter()
PACKAGES = ("rolecall", "ray", "numpy", "msgspec", "verl", "torch", "tensordict")


class Part(Role):
    """Plays all four roles; as the rollout it has its part of the batch ready."""

    def __init__(self, parts: dict[str, list[Samples]]) -> None:
        self.parts = parts

    def generate(self, which: str) -> Samples:
        return self.parts[which][self.member.rank]

    def score(self, samples: Samples) -> Scores:
        values = (np.diff(samples.cu_seqlens) - samples.prompt_lengths).astype(np.float32)
        return Scores(keys=samples.keys, counts=samples.counts, values=values, status=np.zeros(len(values), np.uint8))

    def logprobs(self, samples: Samples) -> Logprobs:
        return Logprobs(keys=samples.keys, counts=samples.counts, logprobs=samples.logprobs.copy(), cu_seqlens=samples.cu_seqlens)

    def accumulate(self, samples: Samples, base: Logprobs, scores: Scores) -> Metrics:
        same = float(np.array_equal(samples.keys, base.keys) and np.array_equal(samples.keys, scores.keys))
        sums = {"tokens": float(len(samples.tokens)), "logprobs": float(base.logprobs.sum(dtype=np.float64)), "same": same}
        return Metrics(sums={name: (value, 1.0) for name, value in sums.items()})


class Contender:
    """One way to run a round; `run` gives (score of each sample in order, tokens and logprobs that the policy saw)."""

    name: str
    rounds: int  # in one timed sample

    def run(self) -> tuple[np.ndarray, float, float]:
        raise NotImplementedError

    def many(self) -> None:
        """What is timed."""
        for _ in range(self.rounds):
            self.run()


class Ours(Contender):
    """Groups of ours. `parts` is which cut of the batch the rollout members hold."""

    def __init__(self, groups: dict[str, Any], which: str, name: str, rounds: int) -> None:
        self.groups, self.which, self.name, self.rounds = groups, which, name, rounds

    def run(self) -> tuple[np.ndarray, float, float]:
        samples = self.groups["rollout"].all.generate(self.which)
        scores = self.groups["reward"].split.score(samples)
        base = self.groups["reference"].split.logprobs(samples)
        done = self.groups["policy"].split.accumulate(samples, base, scores)
        values = scores.result().values
        self.calls = (samples, scores, base, done)
        sums = [receipt.metrics for receipt in done.receipts()]
        assert all(each["same"][0] == 1.0 for each in sums)
        return values, sum(each["tokens"][0] for each in sums), sum(each["logprobs"][0] for each in sums)

    def controller_bytes(self) -> int:
        """What one round brings through the controller: fetched frames and receipts."""
        before = TRAFFIC.fetched
        self.run()
        receipts = sum(len(ray.cloudpickle.dumps(receipt)) for call in self.calls for receipt in call.receipts())
        return TRAFFIC.fetched - before + receipts


class RawActor:
    """The same work as plain Ray actors do it: arrays in dicts."""

    def __init__(self, part: dict[str, np.ndarray] | None) -> None:
        self.part = part

    def generate(self) -> dict[str, np.ndarray] | None:
        return self.part

    def score(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = (np.diff(batch["cu_seqlens"]) - batch["prompt_lengths"]).astype(np.float32)
        return {"values": values, "status": np.zeros(len(values), np.uint8)}

    def logprobs(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logprobs": batch["logprobs"].copy(), "cu_seqlens": batch["cu_seqlens"]}

    def accumulate(self, batch: dict[str, np.ndarray], base: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> tuple[float, float]:
        assert len(scores["values"]) == len(batch["siblings"])
        return float(len(batch["tokens"])), float(base["logprobs"].sum(dtype=np.float64))


def arrays_of(part: Samples) -> dict[str, np.ndarray]:
    """The message's arrays by name."""
    return {name: value for name in part.__struct_fields__ if isinstance(value := getattr(part, name), np.ndarray)}


class Raw(Contender):
    """References passed on from call to call, nothing waited for before the end: as quick as Ray goes."""

    name = "raw Ray, pipelined"

    def __init__(self, pools: dict[str, PlacedPool], parts: list[Samples], rounds: int) -> None:
        self.rounds = rounds
        actor = ray.remote(RawActor)
        self.actors = {}
        for role in ROLES:
            held = [arrays_of(part) if role == "rollout" else None for part in parts]
            self.actors[role] = [actor.options(**pools[role].options(rank)).remote(given) for rank, given in enumerate(held)]
        self.run()

    def run(self) -> tuple[np.ndarray, float, float]:
        made = [actor.generate.remote() for actor in self.actors["rollout"]]
        scored = [actor.score.remote(batch) for actor, batch in zip(self.actors["reward"], made, strict=True)]
        based = [actor.logprobs.remote(batch) for actor, batch in zip(self.actors["reference"], made, strict=True)]
        done = [actor.accumulate.remote(*given) for actor, *given in zip(self.actors["policy"], made, based, scored, strict=True)]
        values = np.concatenate([each["values"] for each in ray.get(scored)])
        tokens, logprobs = zip(*ray.get(done), strict=True)
        return values, sum(tokens), sum(logprobs)


class Verl(Contender):
    """RayWorkerGroups with registered methods, as verl's trainer calls them: DataProto from group to group by the driver."""

    name = "verl RayWorkerGroup"
    rounds = 1

    def __init__(self, batch: Samples, members: int) -> None:
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

        worker = ray.remote(verl_worker())
        self.groups = {}
        for role in ROLES:
            pool = RayResourcePool(process_on_nodes=[members], use_gpu=False, max_colocate_count=1, name_prefix=role)
            self.groups[role] = RayWorkerGroup(pool, RayClassWithInitArgs(cls=worker), name_prefix=role, device_name="cpu")
        self.groups["rollout"].hold(codec.Verl(batch, "").data)
        self.run()

    def run(self) -> tuple[np.ndarray, float, float]:
        batch = self.groups["rollout"].generate()
        batch = batch.union(self.groups["reward"].score(batch))
        batch = batch.union(self.groups["reference"].logprobs(batch))
        done = self.groups["policy"].accumulate(batch)
        values = batch.batch["rm_scores"].sum(-1).numpy()
        return values, sum(tokens for tokens, _ in done), sum(logprobs for _, logprobs in done)


def verl_worker() -> type:
    """A verl Worker with the four verbs."""
    import torch
    from verl import DataProto
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, collect_dp_compute_data_proto, dispatch_one_to_all, register

    class PartWorker(Worker):
        @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
        def hold(self, data: DataProto) -> None:
            self.data = data

        @register(dispatch_mode={"dispatch_fn": dispatch_one_to_all, "collect_fn": collect_dp_compute_data_proto})
        def generate(self) -> DataProto:
            return self.data

        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def score(self, data: DataProto) -> DataProto:
            mask = data.batch["response_mask"]
            scores = torch.zeros(mask.shape)
            scores[:, 0] = mask.sum(-1)
            return DataProto.from_dict(tensors={"rm_scores": scores})

        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def logprobs(self, data: DataProto) -> DataProto:
            return DataProto.from_dict(tensors={"ref_log_prob": data.batch["rollout_log_probs"].clone()})

        @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
        def accumulate(self, data: DataProto) -> tuple[float, float]:
            assert len(data.batch["rm_scores"]) == len(data)
            return float(data.batch["attention_mask"].sum()), float(data.batch["ref_log_prob"].double().sum())

    return PartWorker


def exact(batch: Samples, contender: Contender) -> None:
    """Every sample was scored, in order, and the policy saw every token and logprob."""
    values, tokens, logprobs = contender.run()
    print(f"{contender.name}: {time.perf_counter() - STARTED:.0f} s after the start all members work", file=sys.stderr, flush=True)
    wanted = np.diff(batch.cu_seqlens) - batch.prompt_lengths
    if not np.array_equal(values, wanted) or tokens != len(batch.tokens) or not np.isclose(logprobs, batch.logprobs.sum(dtype=np.float64)):
        sys.exit(f"{contender.name} loses or mixes up what it passes on")


def contenders(batch: Samples, pools: dict[str, PlacedPool], members: int, each: int) -> tuple[list[Contender], dict[str, str]]:
    """Ours on parts that are balanced already, ours where it has to balance them by tokens, and the peers."""
    sizes = batch.outline().sizes
    as_they_come = np.array_split(np.arange(len(sizes)), members)
    balanced = [np.sort(units) for units in balance(sizes, members)]
    # Both cuts hold the whole batch in an order of their own; the check of exactness wants the order of the even cut.
    parts = {"even": [batch.take(units) for units in balanced], "uneven": [batch.take(units) for units in as_they_come]}
    groups = {role: spawn(Part(parts if role == "rollout" else {}), on=pools[role], name=role) for role in ROLES}
    found: list[Contender] = [Ours(groups, "even", "rolecall", each)]
    exact(Samples.join(parts["even"]), found[0])
    found.append(Ours(groups, "uneven", "rolecall, balancing", each))
    exact(Samples.join(parts["uneven"]), found[1])
    found.append(Raw(pools, parts["even"], each))
    exact(Samples.join(parts["even"]), found[2])
    try:
        found.append(Verl(batch, members))
        exact(batch, found[3])
        return found, {}
    except ImportError as error:
        return found, {Verl.name: str(error)}


def main() -> None:
    """Exactness, timing, table, JSON."""
    options = arguments(__doc__ or "")
    os.environ.update(ENVIRONMENT)  # before Ray starts; it would else begin with one idle process for each of those CPUs
    members = 2 if options.quick else MEMBERS
    each = 5 if options.quick else -(-ROUNDS // options.rounds)
    batch = codec.workload(codec.PROMPTS // 4 if options.quick else codec.PROMPTS)
    with place([Pool(role, members=members, cpus=0.5) for role in ROLES], deadline=120) as pools:
        found, missing = contenders(batch, pools, members, each)
        calls: dict[str, Callable[[], object]] = {contender.name: contender.many for contender in found}
        timings = alternate(calls, options.rounds)
        ours = found[0]
        assert isinstance(ours, Ours)
        through = ours.controller_bytes()
    rounds = {contender.name: contender.rounds for contender in found}
    timings = {name: Timing(tuple(sample / rounds[name] for sample in timing.samples)) for name, timing in timings.items()}
    own = timings["rolecall"].median
    share = through / sum(buffer.nbytes for buffer in encode(batch).buffers)
    raw = own / timings[Raw.name].median
    targets = {"at most 1.15x raw Ray": (raw, raw <= 1.15)}
    if Verl.name in timings:
        targets["at least 3x verl"] = (timings[Verl.name].median / own, timings[Verl.name].median / own >= 3)
    targets["at most 1 % of the batch through the controller"] = (100 * share, share <= 0.01)
    finish(
        bench="dispatch",
        workload=f"{len(ROLES)} roles x {members} members, {len(batch.siblings)} rollouts, {len(batch.tokens)} tokens: one step",
        timings=timings,
        ours="rolecall",
        targets=targets,
        target="at most 1.15x raw Ray; at least 3x verl; at most 1 % of the batch through the controller",
        limit=timings[Raw.name].median * 1e3,
        missing=missing,
        details={"controller_bytes": through, "calls_a_step": len(ROLES) * members, "steps_a_sample": rounds},
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
