"""GRPO: a language model gets better at a task by comparing its own answers to each prompt.

1) Advantages are centred in the group, not divided by its std. 2) The loss is a mean over tokens, 3) with a k3 KL in it.
"""

from functools import partial
from typing import Annotated, Literal

from msgspec import Meta
from rolecall.actors import Run, RunArgs, gather, launch, pack
from rolecall.kernels.advantages import group_advantages
from rolecall.kernels.losses import clipped_surrogate
from rolecall.placement import Pool, place, together
from rolecall.roles import Data, Policy, ReasoningGym, Reference, Reward, Rollout, check_model, last_number

SUMS = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, size=20_000)


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="of weights and computation")] = "float32"
    pools: tuple[Pool, ...] = together("train", "sample", "reference", "judge", "data", members=2)
    task: Annotated[ReasoningGym, Meta(description="where problems come from")] = SUMS
    ask: Annotated[str, Meta(description="added to each problem")] = " Give only the final answer."
    held_out: Annotated[int, Meta(ge=1, description="problems that accuracy is measured on")] = 256
    steps: Annotated[int, Meta(ge=1, description="updates")] = 40
    prompts: Annotated[int, Meta(ge=1, description="prompts a step")] = 8
    group_size: Annotated[int, Meta(ge=2, description="completions a prompt, compared with each other")] = 8
    max_tokens: Annotated[int, Meta(ge=1, description="longest completion")] = 16
    learning_rate: Annotated[float, Meta(gt=0, description="of AdamW")] = 1e-5
    kl: Annotated[float, Meta(ge=0, description="weight of the KL to the reference")] = 0.001


def main(args: Args) -> None:
    check_model(args.model, chat_template=True)  # before anything starts
    with Run(args) as run, place(args.pools, address=args.address, memory=args.memory) as pools:
        policy = run.spawn(Policy(args.model, dtype=args.dtype), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=args.max_tokens), on=pools["sample"])
        reference = run.spawn(Reference(args.model, dtype=args.dtype), on=pools["reference"])
        reward = run.spawn(Reward(last_number), on=pools["judge"])
        feed = Data(args.task, model=args.model, held_out=args.held_out, suffix=args.ask, repeats=True)
        data = run.spawn(feed, on=pools["data"], members=1)
        run.explain(prompts=args.prompts, per_prompt=args.group_size, policy=policy)
        before = run.evaluate("before", rollout, reward, data.any.held_out(args.held_out))
        for step, prompts in run.steps(data, args.steps, prompts=args.prompts):
            samples = rollout.split.generate(prompts, per_prompt=args.group_size)  # no tensor has moved
            scores, base = gather(reward.split.score(samples), reference.split.logprobs(samples))
            verdicts = scores.result()  # a number a sample: all that the controller reads
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
