"""The command line: `rolecall plan`, `model`, `data show`, `verify`. A run has a script of its own: `python -m rolecall.examples.grpo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from cyclopts import App
from rolecall.protocols.errors import RolecallError

app = App(name="rolecall", help="A Ray-native actor system for LLM post-training.")


@app.command
def plan(config: Path | None = None, *, controller: str = "", cluster: Path | None = None, address: str | None = None) -> int:
    """Show where the pools of a run would go, or every reason why they don't fit.

    Args:
        config: TOML file of a run. With `[[pools]]` tables it says all; else name the controller too.
        controller: module, or file, of the controller whose own pools `[pools.NAME]` tables change, or that are meant without a file.
        cluster: TOML file with `[[node]]` tables; without it the live cluster is asked.
        address: of the live cluster; without it a local Ray on this machine.
    """
    from rolecall.actors.planning import pools_of
    from rolecall.placement.command import plan as plan_alone
    from rolecall.placement.command import show

    if config is not None and not controller:
        return plan_alone(config, cluster, address)
    return show(lambda: pools_of(controller, config), cluster, address)


@app.command
def model(folder: Path | None = None) -> int:
    """Fetch SmolLM2-135M-Instruct, the demo's model, as a Hugging Face folder.

    Args:
        folder: where to put it; without it `.cache/models/SmolLM2-135M-Instruct`.
    """
    from rolecall.roles.models.fetch import FOLDER, fetch

    fetch(folder or FOLDER)
    return 0


data = App(name="data", help="Look at data.")
app.command(data)


@data.command(name="show")
def data_show(
    source: str,
    *,
    model: str,
    count: int = 3,
    scan: int = 256,
    columns: dict[str, str] | None = None,
    train: Literal["assistant", "last", "each", "all"] = "assistant",
    plain: bool = False,
    system: str | None = None,
    options: dict[str, str] | None = None,
) -> int:
    """Print a few records as the model will see them, with the tokens that are trained in colour, and what becomes of the rest.

    Args:
        source: path, glob or URL of files, or gym:TASK for a task of reasoning-gym.
        model: folder or hub name whose tokenizer and chat template are used.
        count: records to print.
        scan: records to encode for the counts at the end.
        columns: names of the columns, where they are others: --columns.prompt question --columns.completion answer.
        train: what is trained of a conversation: what the assistant says, only its last turn, each turn in a record of its own, or all.
        plain: take prompts and completions that are texts as they are, without the chat template.
        system: said before every conversation that brings no system message.
        options: further variables of the chat template: --options.enable_thinking false --options.today 2026-01-31.
    """
    from rolecall.roles.data.show import show, values_of

    return show(
        source, model, count=count, scan=scan, columns=columns, train=train, plain=plain, system=system, options=values_of(options or {})
    )


@app.command
def verify(model: str, *, dtypes: tuple[str, ...] = ("float32", "bfloat16"), device: str = "cpu", length: int = 0) -> int:
    """Compare our definition of a model with transformers: alone, packed and cached, on random and real inputs.

    Args:
        model: Hugging Face folder or hub name.
        dtypes: to compare in; repeat the option for several.
        device: to compute on.
        length: tokens of the longest random sequence; 0 chooses one that is longer than short sliding windows.
    """
    from rolecall.roles.models.verify import verify as compare

    return compare(model, dtypes=dtypes, device=device, length=length)


def main() -> None:
    """Run the command; a mistake is printed without a traceback and gives exit code 2."""
    try:
        sys.exit(app())
    except RolecallError as error:
        print(f"rolecall: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
