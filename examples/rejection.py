"""Rejection-sampling fine-tuning: sample several answers to each prompt, keep those that are correct, imitate them.

As RAFT (Dong et al. 2023, arXiv:2304.06767) and STaR (Zelikman et al. 2022, arXiv:2203.14465), sampled anew at each step.
"""

from typing import Annotated, Literal

from msgspec import Meta
from rolecall.actors import Run, RunArgs, launch, pack
from rolecall.kernels.losses import nll
from rolecall.placement import Pool, place, together
from rolecall.roles import Data, Policy, ReasoningGym, Reward, Rollout, check_model, last_number

SUMS = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, size=4000)


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="of weights and computation")] = "float32"
    pools: tuple[Pool, ...] = together("train", "sample", "judge", "data", members=2)
    task: Annotated[ReasoningGym, Meta(description="where problems come from")] = SUMS
    ask: Annotated[str, Meta(description="added to each problem")] = " Give only the final answer."
    held_out: Annotated[int, Meta(ge=1, description="problems that accuracy is measured on")] = 256
    steps: Annotated[int, Meta(ge=1, description="rounds of sampling, with an update if anything was correct")] = 60
    prompts: Annotated[int, Meta(ge=1, description="prompts a step")] = 16
    tries: Annotated[int, Meta(ge=1, description="completions a prompt")] = 4
    correct: Annotated[float, Meta(description="least value of a completion that is kept")] = 1.0
    max_tokens: Annotated[int, Meta(ge=1, description="longest completion")] = 24
    learning_rate: Annotated[float, Meta(gt=0, description="of AdamW")] = 1e-5


def main(args: Args) -> None:
    check_model(args.model, chat_template=True)  # before anything starts
    with Run(args) as run, place(args.pools, address=args.address, memory=args.memory) as pools:
        policy = run.spawn(Policy(args.model, dtype=args.dtype), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=args.max_tokens), on=pools["sample"])
        reward = run.spawn(Reward(last_number), on=pools["judge"])
        data = run.spawn(Data(args.task, model=args.model, held_out=args.held_out, suffix=args.ask), on=pools["data"], members=1)
        run.explain(prompts=args.prompts, per_prompt=args.tries, policy=policy)
        before = run.evaluate("before", rollout, reward, data.any.held_out(args.held_out))
        for step, prompts in run.steps(data, args.steps, prompts=args.prompts):
            samples = rollout.split.generate(prompts, per_prompt=args.tries)
            verdicts = reward.split.score(samples).result()
            kept = verdicts.scored & (verdicts.values >= args.correct)
            if kept.any():  # else there is nothing to learn from
                policy.split.accumulate(pack(samples, advantages=kept, keep=kept), loss=nll)
                policy.all.update(args.learning_rate)
                rollout.all.load(policy.all.publish())
            run.log(step, samples=samples, scores=verdicts, **{"reward/kept": float(kept.mean())})
        after = run.evaluate("after", rollout, reward, data.any.held_out(args.held_out))
        run.report(before, after, policy.one(0).save(str(run.folder / "checkpoint")).result())


if __name__ == "__main__":
    launch(main, Args)
