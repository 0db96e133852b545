"""GRPO: a language model gets better at a task by comparing its own answers to each prompt.

1) Advantages are centred within the group and not divided by its standard deviation. 2) The loss is a mean over tokens.
3) The KL to the reference is the k3 estimate, in the loss. 4) One update a step, so the clip only guards.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from msgspec import Meta

from rolecall.actors import Run, RunArgs, gather, launch, pack
from rolecall.kernels.advantages import group_advantages
from rolecall.kernels.losses import clipped_surrogate
from rolecall.placement import Pool, place
from rolecall.roles.data import Data, ReasoningGym
from rolecall.roles.policy import Policy
from rolecall.roles.reference import Reference
from rolecall.roles.rewards import Reward, last_number
from rolecall.roles.rollout import Rollout

SHARED = tuple(Pool(name, members=2, cpus=0, shares="train") for name in ("sample", "reference", "judge", "data"))


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    dtype: Annotated[str, Meta(description="of weights and computation")] = "float32"
    pools: Annotated[tuple[Pool, ...], Meta(description="train, sample, reference, judge, data")] = (Pool("train", members=2, cpus=1), *SHARED)
    task: Annotated[ReasoningGym, Meta(description="where problems come from")] = ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 2})
    steps: Annotated[int, Meta(ge=1, description="updates")] = 60
    prompts: Annotated[int, Meta(ge=1, description="prompts a step")] = 8
    group_size: Annotated[int, Meta(ge=2, description="completions a prompt; a group of one has no one to be compared with")] = 8
    max_tokens: Annotated[int, Meta(ge=1, description="length of a completion")] = 24
    learning_rate: Annotated[float, Meta(gt=0, description="of AdamW")] = 1e-5
    kl: Annotated[float, Meta(ge=0, description="weight of the KL to the reference")] = 0.001
    held_out: Annotated[int, Meta(ge=1, description="problems to measure accuracy on")] = 256


def main(args: Args) -> None:
    with Run(args) as run, place(args.pools) as pools:
        policy = run.spawn(Policy(args.model, dtype=args.dtype), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=args.max_tokens), on=pools["sample"])
        reference = run.spawn(Reference(args.model, dtype=args.dtype), on=pools["reference"])
        reward = run.spawn(Reward(last_number), on=pools["judge"])
        data = run.spawn(Data(args.task, model=args.model, held_out=args.held_out), on=pools["data"], members=1)

        run.explain(prompts=args.prompts, per_prompt=args.group_size, policy=policy)
        before = run.evaluate("before", rollout, reward, data.any.held_out(args.held_out))
        for step, prompts in run.steps(data, args.steps, prompts=args.prompts):
            samples = rollout.split.generate(prompts, per_prompt=args.group_size)  # no tensor has moved
            scores, base = gather(reward.split.score(samples), reference.split.logprobs(samples))
            verdicts = scores.result()  # one number a sample: all that the controller reads
            advantages = group_advantages(verdicts.values, verdicts.counts, scored=verdicts.scored)
            batch = pack(samples, advantages=advantages, reference=base, keep=verdicts.scored)
            policy.split.accumulate(batch, loss=partial(clipped_surrogate, high=0.28, kl=args.kl))
            policy.all.update(args.learning_rate)
            rollout.all.load(policy.all.publish())
            run.log(step, samples=samples, scores=verdicts)
        after = run.evaluate("after", rollout, reward, data.any.held_out(args.held_out))
        run.report(before, after, policy.one(0).save(str(run.folder / "checkpoint")).result())


if __name__ == "__main__":
    launch(main, Args)
