"""Heads beside a model's own: a value for each token, a score for a sequence, another projection. In a file of their own.

N states, D hidden size, O outputs. A head reads hidden states after the final norm, as the model's own head does. Heads compute
in float32 whatever the model is (float64 for float64): a value or a score is one number, which bfloat16 would round to 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from rolecall.protocols.errors import ConfigError, ModelError
from rolecall.roles.models.reading import check_finite
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# In safetensors' format. Not named so: vLLM reads every *.safetensors of a folder as a part of the model.
HEADS = "heads.tensors"


class HeadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a head is. A value or reward head has the defaults; a projection has more outputs."""

    outputs: Annotated[int, Meta(description="numbers a state; 1 makes one number of it, not a vector of one")] = 1
    inner: Annotated[int, Meta(description="size of a hidden layer with SiLU; 0 for none")] = 0
    bias: Annotated[bool, Meta(description="of the last layer; Hugging Face's classifiers have none")] = True
    unit: Annotated[bool, Meta(description="scale each output vector to length 1, as embeddings are")] = False

    def check(self) -> None:
        """Raise ConfigError for sizes that can't be."""
        if self.outputs < 1 or self.inner < 0 or (self.unit and self.outputs == 1):
            raise ConfigError(
                "A head can't be made like this.",
                ask=f"outputs={self.outputs}, inner={self.inner}, unit={self.unit}",
                remedy="give outputs of 1 or more (more than 1 with unit), and inner of 0 or more",
            )


VALUE = HeadSpec()
REWARD = HeadSpec(bias=False)


class Head(nn.Module):
    """One head. Weights start normal with a deviation of 1/√(D + 1), which makes outputs of size 1 (Huang et al. 2024,
    arXiv:2403.17031, on reward heads), biases at 0; equal in all members.

    Args:
        spec: of the head.
        hidden: D.
        seed: of the start.
    """

    def __init__(self, spec: HeadSpec, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        spec.check()
        self.spec = spec
        make = torch.Generator().manual_seed(seed)
        sizes = [hidden, spec.inner, spec.outputs] if spec.inner else [hidden, spec.outputs]
        self.layers = nn.ModuleList()
        for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            layer = nn.Linear(inputs, outputs, bias=spec.bias or number < len(sizes) - 1)
            nn.init.normal_(layer.weight, 0.0, (inputs + 1) ** -0.5, generator=make)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            self.layers.append(layer)

    def forward(self, states: Tensor) -> Tensor:
        """[…, D] to […] for one output, else to […, O]; float32 or float64."""
        x = states.to(next(self.parameters()).dtype)
        for number, layer in enumerate(self.layers):
            x = layer(nn.functional.silu(x) if number else x)
        if self.spec.unit:
            x = nn.functional.normalize(x, dim=-1)
        return x[..., 0] if self.spec.outputs == 1 else x


def last_slots(segments: Tensor, parents: Tensor) -> Tensor:
    """Where the last token of each sequence is: what a reward head reads.

    Args:
        segments: [R, C] int, -1 where there is none.
        parents: [S] int.

    Returns:
        [Q] int64, slots counted through all rows, of the segments that none continues, in order of their numbers.
    """
    flat = segments.flatten()
    slots = torch.arange(len(flat), device=flat.device)
    last = slots.new_full((len(parents),), -1)
    used = flat >= 0
    last.scatter_reduce_(0, flat[used].long(), slots[used], "amax")
    continued = torch.zeros(len(parents), dtype=torch.bool, device=flat.device)
    continued[parents[parents >= 0].long().to(flat.device)] = True
    return last[~continued & (last >= 0)]


def write_heads(folder: str | Path, heads: Mapping[str, Head]) -> None:
    """Write heads into an existing folder, beside the model; nothing if there are none."""
    if heads:
        specs = {name: msgspec.to_builtins(head.spec) | {"hidden": head.layers[0].in_features} for name, head in heads.items()}
        tensors = {f"{name}.{label}": tensor.detach().cpu() for name, head in heads.items() for label, tensor in head.state_dict().items()}
        save_file(tensors, Path(folder, HEADS), metadata={"heads": json.dumps(specs)})


def read_heads(
    folder: str | Path, *, hidden: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> dict[str, Head]:
    """The heads in a folder; none where it has no such file.

    Args:
        hidden: D of the model.
        dtype: of the model; heads are at least float32.

    Raises:
        ModelError: the file can't be read, lacks a tensor, holds numbers that are not finite, or is for another hidden size.
    """
    path = Path(folder).expanduser() / HEADS
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            specs = json.loads(file.metadata()["heads"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = {name: spec.pop("hidden") for name, spec in specs.items()}
        heads = {name: Head(msgspec.convert(spec, HeadSpec), sizes[name]) for name, spec in specs.items()}
        for name, head in heads.items():
            mine = {label.removeprefix(f"{name}."): tensor for label, tensor in tensors.items() if label.startswith(f"{name}.")}
            head.to(next(iter(mine.values())).dtype).load_state_dict(mine)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        raise ModelError(
            f"The heads in {path} can't be read: {' '.join(str(error).split())}", remedy="save them again, or move the file away"
        ) from error
    check_finite(str(path), sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()))
    wrong = sorted(name for name, size in sizes.items() if size != hidden)
    if wrong:
        raise ModelError(
            f"The head {wrong[0]!r} in {path} is for another model.",
            ask=f"a hidden size of {sizes[wrong[0]]}",
            have=str(hidden),
            remedy="move the file away, or give the model it was saved with",
        )
    return {name: head.to(torch.promote_types(dtype, torch.float32)).to(device) for name, head in heads.items()}
