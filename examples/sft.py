"""SFT: a language model learns to answer as the records do.

1) Only what the assistant says is trained. 2) Every trained token counts the same: the update is that of one big batch.
"""

from typing import Annotated, Literal

from msgspec import Meta
from rolecall.actors import Run, RunArgs, launch, weigh
from rolecall.kernels.losses import nll
from rolecall.placement import Pool, place, together
from rolecall.roles import Documents, Lora, Policy, ReasoningGym, Reward, Rollout, check_model, ends_with


class Args(RunArgs, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face folder or hub name")]
    data: Annotated[str, Meta(description="path or URL of records to train on; worked problems of `task` without it")] = ""
    task: Annotated[ReasoningGym, Meta(description="worked problems")] = ReasoningGym("gsm_symbolic", size=20_000, completion="answer_cot")
    columns: Annotated[dict[str, str] | None, Meta(description="columns of other names: --columns.completion answer")] = None
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="of weights and computation")] = "float32"
    lora: Annotated[Lora | None, Meta(description="train adapters in place of the weights: [lora] r = 16")] = None
    pools: tuple[Pool, ...] = together("train", "sample", "judge", "data", members=2)
    steps: Annotated[int, Meta(ge=1, description="updates")] = 40
    rows: Annotated[int, Meta(ge=1, description="packed rows a step, over all members")] = 4
    row_tokens: Annotated[int, Meta(ge=2, description="tokens of a row")] = 1024
    learning_rate: Annotated[float, Meta(gt=0, description="of AdamW, at its highest")] = 1e-4
    schedule: Annotated[Literal["constant", "linear", "cosine", "wsd"], Meta(description="of the learning rate")] = "cosine"
    warmup: Annotated[int, Meta(ge=0, description="updates until it is")] = 2
    one_in: Annotated[int, Meta(ge=2, description="one record in so many is held out")] = 50
    held_out: Annotated[int, Meta(ge=1, description="held-out records that are measured")] = 64
    max_tokens: Annotated[int, Meta(ge=1, description="longest answer to a held-out question")] = 256
    every: Annotated[int, Meta(ge=1, description="steps between two evaluations, and between two checkpoints")] = 100


def main(args: Args) -> None:
    check_model(args.model, chat_template=True)
    with Run(args) as run, place(args.pools, address=args.address, memory=args.memory) as pools:
        plan = {"schedule": args.schedule, "warmup": args.warmup, "total_steps": args.steps}
        policy = run.spawn(Policy(args.model, dtype=args.dtype, lora=args.lora, **plan), on=pools["train"])
        rollout = run.spawn(Rollout(args.model, dtype=args.dtype, max_tokens=args.max_tokens), on=pools["sample"])
        feed = Documents(args.data or args.task, model=args.model, columns=args.columns, row_tokens=args.row_tokens, held_out=args.one_in)
        reward, data = run.spawn(Reward(ends_with), on=pools["judge"]), run.spawn(feed, on=pools["data"])
        held_out, questions = data.one(0).held_out(args.held_out), data.one(0).questions(args.held_out)
        run.resume(policy, data)
        rollout.all.load(policy.all.publish())
        before = run.evaluate("before", rollout, reward, questions, measured=policy.split.measure(weigh(held_out), loss=nll))
        after, checkpoint = before, args.resume
        for step, rows in run.batches(data, args.steps, rows=args.rows):
            policy.split.accumulate(weigh(rows), loss=nll)
            policy.all.update(args.learning_rate)
            run.log(step)
            if step % args.every == 0 or step == args.steps:
                rollout.all.load(policy.all.publish())
                after = run.evaluate(f"step-{step}", rollout, reward, questions, measured=policy.split.measure(weigh(held_out), loss=nll))
                checkpoint = run.save(step, policy, data)
        run.report(before, after, checkpoint)


if __name__ == "__main__":
    launch(main, Args)
