"""RLOO: REINFORCE, each sample against the mean of its siblings (Ahmadian et al. 2024, arXiv:2402.14740).

1) The baseline leaves the sample itself out. 2) A completion is one action: its tokens add up. 3) k3 KL in the loss.
"""

from functools import partial
from typing import Annotated, Literal

from msgspec import Meta
from rolecall.actors import Run, RunArgs, gather, launch, pack
from rolecall.kernels.advantages import leave_one_out
from rolecall.kernels.aggregation import constant_mean
from rolecall.kernels.losses import policy_gradient
from rolecall.placement import Pool, place, together
from rolecall.roles import Data, Policy, ReasoningGym, Reference, Reward, Rollout, check_model, last_number

SUMS = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, size=4000)


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="of weights and computation")] = "float32"
    pools: tuple[Pool, ...] = together("train", "sample", "reference", "judge", "data", members=2)
    task: Annotated[ReasoningGym, Meta(description="where problems come from")] = SUMS
    ask: Annotated[str, Meta(description="added to each problem")] = " Give only the final answer."
    held_out: Annotated[int, Meta(ge=1, description="problems that accuracy is measured on")] = 256
    steps: Annotated[int, Meta(ge=1, description="updates")] = 60
    prompts: Annotated[int, Meta(ge=1, description="prompts a step")] = 16
    samples: Annotated[int, Meta(ge=2, description="completions a prompt, each other's baseline")] = 4
    max_tokens: Annotated[int, Meta(ge=1, description="longest completion")] = 24
    learning_rate: Annotated[float, Meta(gt=0, description="of AdamW")] = 1e-5
    kl: Annotated[float, Meta(ge=0, description="weight of the KL to the reference")] = 0.01


def main(args: Args) -> None:
    check_model(args.model, chat_template=True)  # before anything starts
    with Run(args) as run, place(args.pools, address=args.address, memory=args.memory) as pools:
        policy = run.spawn(Policy(args.model, dtype=args.dtype), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=args.max_tokens), on=pools["sample"])
        reference = run.spawn(Reference(args.model, dtype=args.dtype), on=pools["reference"])
        reward = run.spawn(Reward(last_number), on=pools["judge"])
        data = run.spawn(Data(args.task, model=args.model, held_out=args.held_out, suffix=args.ask), on=pools["data"], members=1)
        run.explain(prompts=args.prompts, per_prompt=args.samples, policy=policy)
        before = run.evaluate("before", rollout, reward, data.any.held_out(args.held_out))
        for step, prompts in run.steps(data, args.steps, prompts=args.prompts):
            samples = rollout.split.generate(prompts, per_prompt=args.samples)
            scores, base = gather(reward.split.score(samples), reference.split.logprobs(samples))
            verdicts = scores.result()
            advantages = leave_one_out(verdicts.values, verdicts.counts, scored=verdicts.scored)
            batch = pack(samples, advantages=advantages, reference=base, keep=verdicts.scored, mean=partial(constant_mean, horizon=1))
            policy.split.accumulate(batch, loss=partial(policy_gradient, kl=args.kl))
            policy.all.update(args.learning_rate)
            rollout.all.load(policy.all.publish())
            run.log(step, samples=samples, scores=verdicts)
        after = run.evaluate("after", rollout, reward, data.any.held_out(args.held_out))
        run.report(before, after, policy.one(0).save(str(run.folder / "checkpoint")).result())


if __name__ == "__main__":
    launch(main, Args)
