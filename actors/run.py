"""A run: one folder with the resolved configuration, metrics, samples, logs and checkpoints, and the loop's bookkeeping."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from rolecall.actors import saving
from rolecall.actors.config import dump
from rolecall.actors.evaluation import Evaluation, table_of
from rolecall.actors.feeding import Feed
from rolecall.actors.group import Group
from rolecall.actors.pending import TRAFFIC, Pending
from rolecall.actors.progress import Progress
from rolecall.actors.spawn import spawn
from rolecall.protocols import ConfigError, PackedBatch, Prompts, Samples, Scores, UserError
from rolecall.roles.base import Role

if TYPE_CHECKING:
    from rolecall.placement import PlacedPool


class RunArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What every run has; a controller's `Args` subclass it."""

    name: Annotated[str, msgspec.Meta(description="of the run and its folder; made from script and time without it")] = ""
    runs: Annotated[str, msgspec.Meta(description="folder that run folders are made in")] = "runs"
    address: Annotated[str | None, msgspec.Meta(description="host:port of a Ray cluster, or auto; a local one without it")] = None
    seed: Annotated[int, msgspec.Meta(description="of data order, sampling and initialisation")] = 0
    memory: Annotated[
        dict[str, dict[str, Any]], msgspec.Meta(description="what roles hold in memory: tables [memory.ROLE], for the plan")
    ] = msgspec.field(default_factory=dict)
    resume: Annotated[str, msgspec.Meta(description="folder of a run, or of one of its checkpoints, to go on from")] = ""
    samples_every: Annotated[int, msgspec.Meta(ge=0, description="steps between saved samples; 0 saves none")] = 10


class Run:
    """Use as a context: `with Run(args) as run`. Making it makes the folder, which must not be there yet.

    Attributes:
        folder: of the run, absolute.

    Raises:
        ConfigError: the folder exists or can't be made, or there is no checkpoint to resume from.
    """

    def __init__(self, args: RunArgs) -> None:
        name = args.name or f"{_script(args)}-{datetime.now():%Y%m%d-%H%M%S}"
        self.args, self.name = args, name
        if args.resume:
            saving.find(args.resume)  # a wrong folder is told before anything starts
        self.folder = _made((Path(args.runs) / name).absolute(), name)
        (self.folder / "config.toml").write_text(dump(args))
        self._metrics = (self.folder / "metrics.jsonl").open("a", buffering=1)
        self._groups: list[Group] = []
        self._step_started = self._started = time.monotonic()
        self._progress: Progress | None = None
        self._done = 0  # last step that was taken, here or in the run that is resumed
        self._places: dict[str, Any] = {}  # data group → where it is after this step: states to come, or block and row
        self._restored: dict[str, dict[str, int]] = {}  # data group → where it was
        self._waited: dict[str, float] = {}  # data group → seconds that this step waited for it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.close()
        self._metrics.close()
        mistaken = isinstance(error, UserError) and not any(group.called for group in self._groups)
        if error is not None and (mistaken or not self._groups) and not (self.folder / "metrics.jsonl").stat().st_size:
            self._forget()

    def _forget(self) -> None:
        """Nothing was asked of anybody: leave no folder, so that the name can be used again once the mistake is corrected."""
        logs = [Path(group.log(rank)) for group in self._groups for rank in range(group.world) if group.log(rank)]
        for file in (self.folder / "config.toml", self.folder / "metrics.jsonl", *logs):
            file.unlink(missing_ok=True)
        for folder in (self.folder / "logs", self.folder):
            with contextlib.suppress(OSError):  # it is not there, or somebody put something in
                folder.rmdir()

    def spawn(self, role: Role, *, on: PlacedPool, **options: Any) -> Group:
        """`spawn` with this run's folder and seed."""
        group = spawn(role, on=on, folder=self.folder, seed=self.args.seed, **options)
        self._groups.append(group)
        return group

    def steps(self, data: Group, count: int, *, prompts: int) -> Iterator[tuple[int, Pending[Prompts]]]:
        """Steps up to `count`, each with its prompts, which the data members prepare one step ahead.

        They begin at 1, or go on where an earlier loop of this run, or the run that is resumed, has come to.
        """
        ahead = data.any.prompts(prompts) if self._done < count else None
        for step in self._numbers(count):
            current = ahead
            if "state" in data.verbs:
                self._places[data.name] = data.all.state()  # before they prepare what is not of this step
            if step < count:
                ahead = data.any.prompts(prompts)
            yield step, current  # type: ignore[misc]  # there is one as long as there are steps

    def batches(self, data: Group, count: int, *, rows: int, ahead: int = 0) -> Iterator[tuple[int, Pending[PackedBatch]]]:
        """Steps up to `count`, each with its packed rows; numbered as those of `steps`.

        The data members make blocks of rows ahead of the training: `ahead` rows beyond the step's, those of three steps without
        it. `data/wait_share` is the part of a step that was spent waiting for them. Where the data ends, so do the steps.
        """
        place = self._restored.get(data.name, {})
        feed = Feed(data, ahead=ahead or 3 * rows, block=place.get("block", 0), row=place.get("row", 0))
        for step in self._numbers(count):
            taken = feed.take(rows, (count - step) * rows)
            if taken is None:
                return
            self._waited[data.name] = feed.waited
            self._places[data.name] = (feed.block, feed.row)
            yield step, taken

    def _numbers(self, count: int) -> Iterator[int]:
        """The steps to take, from where an earlier loop of this run, or the run that is resumed, has come to."""
        self._progress = Progress(self.name, count, self._done)
        for step in range(self._done + 1, count + 1):
            self._begin(step)
            yield step
            self._done = step
        self._progress.close()

    def _begin(self, step: int) -> None:
        self._step_started = time.monotonic()
        for group in self._groups:
            group.step = step
        for pool in {id(group.pool.connection): group.pool for group in self._groups}.values():
            pool.connection.check(f"step {step}")  # Ray would go on without its head for a minute, then end this process

    def save(self, step: int, *groups: Group) -> str:
        """Write a checkpoint of these groups after a step: the policy's folder, and where the data was. Returns the policy's folder.

        `--resume` goes on from it exactly: the next updates are those of a run that never stopped.
        """
        states: dict[str, list[dict[str, int]]] = {}
        for group in groups:
            place = self._places.get(group.name)
            if isinstance(place, Pending):
                states[group.name] = place.result()
            elif place is not None:
                states[group.name] = [group.one(0).state(*place).result()]
        return str(saving.write(self.folder, step, groups, states))

    def resume(self, *groups: Group) -> int:
        """With `--resume`, give these groups what the checkpoint has of them. Returns its step, 0 without `--resume`.

        Raises:
            ConfigError: there is no checkpoint, or it has nothing of a group.
        """
        if self.args.resume:
            place, saved = saving.find(self.args.resume)
            saving.restore(place, saved, groups)
            self._done = saved.step
            self._restored = {name: states[0] for name, states in saved.states.items()}
            print(f"resumed after step {saved.step} of {place}", flush=True)
        return self._done

    def log(self, step: int, *, samples: Pending[Samples] | None = None, scores: Scores | None = None, **extra: float) -> dict[str, float]:
        """End a step: wait for all open calls, write one line of metrics, show it, now and then save the samples."""
        line: dict[str, float] = {"step": step, **extra}
        for group in self._groups:
            line.update(group.drain())
            if group.version:
                line[f"{group.name}/version"] = group.version
        if scores is not None and len(scores.scored):  # a reward of one's own need not measure itself
            line.setdefault("reward/failed", float((scores.status == scores.STATUS.index("failed")).mean()))
            if scores.scored.any():
                line.setdefault("reward/mean", float(scores.values[scores.scored].mean()))
        line["time/step_s"] = took = time.monotonic() - self._step_started
        line |= {f"{name}/wait_share": waited / took for name, waited in self._waited.items()}
        self._waited = {}
        line["time/run_s"] = time.monotonic() - self._started
        line["controller/fetched_bytes"], line["controller/forwarded_bytes"] = TRAFFIC.fetched, TRAFFIC.forwarded
        self._metrics.write(
            json.dumps({name: round(value, 8) if isinstance(value, float) else value for name, value in line.items()}) + "\n"
        )
        every = self.args.samples_every
        if samples is not None and every and (step % every == 0 or step == 1):
            table_of(samples.result(), scores).save(self.folder / "samples" / f"step-{step:06d}.parquet")
        if self._progress is not None:
            self._progress.show(line)
        return line

    def evaluate(
        self, word: str, rollout: Group, reward: Group, prompts: Pending[Prompts], *, measured: Pending[Any] | None = None, **sampling: Any
    ) -> Evaluation:
        """Score completions of held-out prompts; greedy unless `sampling` says otherwise. Saved under `word`.

        Between two steps: what is measured here is part of none. `measured`, of `policy.split.measure`, gives the held-out loss.
        """
        samples = rollout.split.generate(prompts, **{"temperature": 0.0, **sampling})
        scores = reward.split.score(samples).result()
        line: dict[str, Any] = {"evaluation": word}
        if measured is not None:
            found = [receipt.metrics["held_out_loss"] for receipt in measured.receipts() if "held_out_loss" in receipt.metrics]
            line["loss"] = sum(total for total, _ in found) / sum(weight for _, weight in found)
        for group in {rollout, reward, *(part.group for part in (measured.parts if measured else ()))}:
            group.drain()
        evaluation = table_of(samples.result(), scores)
        evaluation.save(self.folder / "samples" / f"{word}.parquet")
        self._metrics.write(json.dumps(line | {"accuracy": evaluation.mean, "count": len(evaluation.values)}) + "\n")
        loss = f", held-out loss {line['loss']:.3f}" if "loss" in line else ""
        print(f"{word}: {evaluation.mean:.3f} on {len(evaluation.values)} held-out prompts{loss}", flush=True)
        return evaluation

    def explain(self, *, prompts: int, per_prompt: int, policy: Group, updates: int = 1) -> None:
        """Print the batch arithmetic in words."""
        total = prompts * per_prompt
        share = -(-total // policy.world)
        print(
            f"{_counted(prompts, 'prompt')} × {_counted(per_prompt, 'completion')} = {_counted(total, 'sample')} a step, "
            f"{_counted(policy.world, 'policy member')}, about {share} each, {_counted(updates, 'update')} a step\n"
            f"run folder: {self.folder}",
            flush=True,
        )

    def report(self, before: Evaluation, after: Evaluation, checkpoint: str) -> None:
        """Print what was learned: accuracy before and after, sample completions, what became of the records, where everything is."""
        if self._progress is not None:
            self._progress.close()
        from rolecall.actors.progress import show_report

        records = {group.name: _added(group.all.report().result()) for group in self._groups if "report" in group.verbs}
        places = {"checkpoint": checkpoint, "run folder": str(self.folder)}
        places |= {f"records of {name}": ", ".join(f"{count} {what}" for what, count in found.items()) for name, found in records.items()}
        show_report(before, after, places, time.monotonic() - self._started)
        (self.folder / "result.json").write_text(
            json.dumps(
                {
                    "before": before.mean,
                    "after": after.mean,
                    "seconds": round(time.monotonic() - self._started, 1),
                    "count": len(after.values),
                    "records": records,
                }
            )
        )


def _made(folder: Path, name: str) -> Path:
    """The run's folder, which must be a new one."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"run folder {folder} exists.",
            ask=f"a new run {name!r}",
            have="a folder of that name, which is left as it is",
            remedy="give another --name, or move the folder away",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run folder {folder} can't be made: {error.strerror}.", remedy="give --runs a folder that can be written to"
        ) from None
    return folder


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _added(reports: list[dict[str, int]]) -> dict[str, int]:
    """What became of records, added up over the members; of each reason the first place is kept."""
    found: dict[str, tuple[str, int]] = {}
    for what, count in (item for report in reports for item in report.items()):
        reason = what.partition(" (first: ")[0]
        first, so_far = found.get(reason, (what, 0))
        found[reason] = (first, so_far + count)
    return dict(found.values())


def _script(args: RunArgs) -> str:
    """The controller's name: that of the file, also when it is run as a script."""
    module = type(args).__module__
    return Path(sys.argv[0]).stem if module == "__main__" else module.rpartition(".")[2]
