"""What a low-rank adaptation is: settings alone, light to import. `rolecall.roles.models.adapters` puts it into a model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from rolecall.protocols.errors import ConfigError, ModelError

ALL = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
# What peft can do and these adapters can't, with the value that means without.
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
}
# A block's linears by our names and by those that all families here have in Hugging Face's checkpoints.
LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685): W + alpha / r · B A.

    A starts uniform in ±1/√inputs, equal in all members, and B at 0, as peft does: an adapter changes nothing at first.
    """

    r: Annotated[int, Meta(description="rank of the adapters")] = 16
    alpha: Annotated[float, Meta(description="the adapters' output is scaled by alpha / r")] = 32.0
    targets: Annotated[
        str | tuple[str, ...],
        Meta(description='"all-linear": every linear of the blocks; a regular expression for whole names; or endings of names'),
    ] = ALL
    dropout: Annotated[float, Meta(description="share of an adapter's input set to 0 in training")] = 0.0
    rank_stabilised: Annotated[bool, Meta(description="scale by alpha / √r instead (arXiv:2312.03732; peft: use_rslora)")] = False
    seed: Annotated[int, Meta(description="of the adapters' start and of dropout")] = 0
    start: Annotated[str, Meta(description="folder of an adapter in peft's format to go on from; r, alpha and targets are as there")] = ""

    @property
    def scale(self) -> float:
        """What the adapters' output is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def hits(self, *names: str) -> bool:
        """Whether a linear of the blocks, known by any of these names, gets an adapter.

        A regular expression must match a whole name; endings must be whole words of it: ("q_proj", "v_proj").
        """
        if self.targets == ALL:
            return True
        if isinstance(self.targets, str):
            return any(re.fullmatch(self.targets, name) for name in names)
        return any(name == ending or name.endswith(f".{ending}") for name in names for ending in self.targets)

    def check(self) -> None:
        """Raise ConfigError for settings that can't work."""
        if self.r < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1 or not self.targets:
            raise ConfigError(
                "The adapters can't be made like this.",
                ask=f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, targets={self.targets!r}",
                remedy="give r of 1 or more, a positive alpha, dropout from 0 to below 1, and targets",
            )
        if isinstance(self.targets, str):
            check_pattern("targets", self.targets)


def check_pattern(setting: str, pattern: str) -> None:
    """Raise ConfigError, naming the setting, if a pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{setting} is no regular expression: {error}.", ask=f"{setting}={pattern!r}", remedy='write one, such as ".*[qv]_proj"'
        ) from None


def names_of(linear: str) -> tuple[str, ...]:
    """Our name of a block's linear ("blocks.3.attention.q") and Hugging Face's ("model.layers.3.self_attn.q_proj")."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", linear)
    if found is None or found[2] not in LINEARS:
        return (linear,)
    return linear, f"model.layers.{found[1]}.{LINEARS[found[2]]}"


def read_lora(folder: str | Path) -> tuple[Lora, str]:
    """The settings of an adapter that peft (or `Policy.save`) wrote, and the folder or name of the model it is for.

    Raises:
        ModelError: there is none, or it has parts that are unknown here.
    """
    path = Path(folder).expanduser() / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if config.get("peft_type") != "LORA":
            raise ModelError(f"The adapter {folder} is not LoRA.", ask=str(config.get("peft_type")), remedy="give a LoRA adapter")
        strange = [f"{name}={config[name]!r}" for name, plain in UNKNOWN.items() if config.get(name) not in plain]
        if strange:
            raise ModelError(f"The adapter {folder} has parts that are unknown here.", ask=", ".join(strange), remedy="merge it with peft")
        targets = config["target_modules"]
        lora = Lora(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=targets if isinstance(targets, str) else tuple(targets),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilised=bool(config.get("use_rslora", False)),
            start=str(folder),
        )
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"There is no adapter in {folder}: {error}", remedy="give a folder with " + ADAPTER_CONFIG) from error
    lora.check()
    return lora, str(config.get("base_model_name_or_path") or "")


def resolve(lora: Lora) -> Lora:
    """The settings, with rank, scale and targets as in the folder `start`, if there is one; dropout and seed stay."""
    if not lora.start:
        return lora
    there, _ = read_lora(lora.start)
    return msgspec.structs.replace(there, dropout=lora.dropout, seed=lora.seed)
