"""SFT on a few words spelled backward, then GRPO on fresh ones, which is paid letter by letter. Whole words are measured."""

from typing import Annotated, Literal

from msgspec import Meta
from rolecall.actors import Run, RunArgs, launch, pack, weigh
from rolecall.kernels.advantages import group_advantages
from rolecall.kernels.losses import clipped_surrogate, nll
from rolecall.placement import Pool, place, together
from rolecall.roles import Data, Documents, Policy, ReasoningGym, Reward, Rollout, check_model, ends_with, letters_in_place


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="of weights and computation")] = "float32"
    pools: tuple[Pool, ...] = together("train", "sample", "judge", "data", members=2)
    worked: ReasoningGym = ReasoningGym("spell_backward", {"min_word_len": 3, "max_word_len": 4}, size=128, seed=1)
    task: ReasoningGym = ReasoningGym("spell_backward", {"min_word_len": 3, "max_word_len": 4}, size=4000, seed=2)
    held_out: Annotated[int, Meta(ge=1, description="problems of `task` that accuracy is measured on")] = 256
    sft_steps: Annotated[int, Meta(ge=0, description="updates on worked problems")] = 56
    grpo_steps: Annotated[int, Meta(ge=0, description="updates on completions")] = 100
    prompts: Annotated[int, Meta(ge=1, description="problems a step")] = 8
    group_size: Annotated[int, Meta(ge=2, description="completions a problem, compared with each other")] = 8
    sft_rate: Annotated[float, Meta(gt=0, description="learning rate of AdamW on worked problems")] = 1e-4
    grpo_rate: Annotated[float, Meta(gt=0, description="the same, on completions")] = 1e-5


def main(args: Args) -> None:
    check_model(args.model, chat_template=True)
    with Run(args) as run, place(args.pools, address=args.address, memory=args.memory) as pools:
        policy = run.spawn(Policy(args.model, dtype=args.dtype), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=24), on=pools["sample"])
        reward, exact = (run.spawn(Reward(one), on=pools["judge"], name=one.__name__) for one in (letters_in_place, ends_with))
        data = run.spawn(Data(args.task, model=args.model, held_out=args.held_out), on=pools["data"], members=1)
        questions = data.any.held_out(args.held_out)
        hidden = set(questions.result().texts)  # what is measured is never shown
        known = [(each["prompt"], each["answer"]) for _, each in args.worked.records(repeats=False) if each["prompt"] not in hidden]
        known = [{"prompt": ask, "completion": f"{' '.join(a[::-1])}, {' '.join(a)}, {a}"} for ask, a in known]  # h a y, y a h, yah
        worked = run.spawn(Documents(known, model=args.model), on=pools["data"], name="worked")
        before = run.evaluate("before", rollout, exact, questions)
        for step, rows in run.batches(worked, args.sft_steps, rows=2):
            policy.split.accumulate(weigh(rows), loss=nll)
            policy.all.update(args.sft_rate)
            run.log(step)
        rollout.all.load(policy.all.publish())
        policy.all.load(policy.all.publish())  # AdamW starts anew: it goes by the size of gradients, and SFT's are ten times larger
        run.evaluate("shown", rollout, exact, questions)
        for step, prompts in run.steps(data, args.sft_steps + args.grpo_steps, prompts=args.prompts):
            samples = rollout.split.generate(prompts, per_prompt=args.group_size)
            verdicts = reward.split.score(samples).result()
            advantages = group_advantages(verdicts.values, verdicts.counts, scored=verdicts.scored)
            policy.split.accumulate(pack(samples, advantages=advantages, keep=verdicts.scored), loss=clipped_surrogate)
            policy.all.update(args.grpo_rate)
            rollout.all.load(policy.all.publish())
            run.log(step, samples=samples, scores=verdicts)
        run.report(before, run.evaluate("after", rollout, exact, questions), run.save(args.sft_steps + args.grpo_steps, policy))


if __name__ == "__main__":
    launch(main, Args)
