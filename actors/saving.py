"""A run's checkpoints: one folder with what each group must remember, whole or not there.

```
checkpoints/step-000040/
  policy/     as `policy.save` writes it; plain transformers loads it
  run.json    step, and the state of each data group; written last, so that a folder without it is no checkpoint
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rolecall.actors.group import Group
from rolecall.protocols import ConfigError, UserError

FILE, FOLDER = "run.json", "checkpoints"


class Saved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `run.json` says."""

    step: int
    folders: tuple[str, ...] = ()  # groups that have a folder in the checkpoint
    states: dict[str, list[dict[str, int]]] = {}  # group → state of each member that keeps one


def write(folder: Path, step: int, groups: tuple[Group, ...], states: dict[str, list[dict[str, int]]]) -> Path:
    """Save what can be saved of each group: a folder of those with a verb `save`, the given states of the others.

    Returns:
        The checkpoint's folder; `policy/` in it is a model folder.

    Raises:
        UserError: a group can neither be saved nor has a state here.
    """
    target = folder / FOLDER / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    open_ = []
    for group in groups:
        if "save" in group.verbs:
            open_.append(group.one(0).save(str(target / group.name)))
        elif group.name not in states:
            raise UserError(f"group {group.name!r} has no verb 'save', nor did this run take data from it.", remedy="leave it out")
    for pending in open_:
        pending.wait()
    named = {group.name for group in groups}
    saved = Saved(
        step=step,
        folders=tuple(sorted(group.name for group in groups if "save" in group.verbs)),
        states={name: state for name, state in states.items() if name in named},
    )
    aside = target / f".{FILE}"
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(saved)) + b"\n")
    aside.rename(target / FILE)
    return target


def find(given: str) -> tuple[Path, Saved]:
    """The checkpoint in a folder: of a checkpoint, or of a run, of which it is the newest whole one.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(given).expanduser()
    places = [folder] if (folder / FILE).is_file() else sorted(folder.glob(f"{FOLDER}/step-*/"), reverse=True)
    for place in places:
        if (place / FILE).is_file():
            try:
                return place.absolute(), msgspec.json.decode((place / FILE).read_bytes(), type=Saved)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place / FILE} is damaged: {error}.", remedy="resume from another checkpoint") from error
    have = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "an empty folder" if folder.is_dir() else "no such folder"
    raise ConfigError(f"There is no checkpoint in {folder}.", have=have, remedy="give the folder of a run that saved one (run.save)")


def restore(place: Path, saved: Saved, groups: tuple[Group, ...]) -> None:
    """Give each group what the checkpoint has of it.

    Raises:
        ConfigError: it has nothing of a group.
    """
    open_: list[Any] = []
    for group in groups:
        if group.name in saved.folders:
            open_.append(group.all.restore(str(place / group.name)))
        elif group.name not in saved.states:
            have = ", ".join((*saved.folders, *saved.states))
            raise ConfigError(
                f"The checkpoint {place} has nothing of the group {group.name!r}.", have=have, remedy="resume with those alone"
            )
        else:
            states = saved.states[group.name]
            if len(states) == 1:
                open_.append(group.all.restore(states[0]))
            elif len(states) == group.world:
                open_ += [group.one(rank).restore(state) for rank, state in enumerate(states)]
            else:  # the number of members has changed: each finds its share from all the states
                open_.append(group.all.restore(states))
    for pending in open_:
        pending.wait()
