"""Low-rank adapters in a model: put in, switched off, merged, and in files as peft has them.

r rank, I inputs, O outputs of a linear. A [r, I], B [O, r].
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
import xxhash
from rolecall.kernels.lora import lora_linear
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.lora import ADAPTER_CONFIG, Lora, names_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files


class LoraLinear(nn.Linear):
    """A linear whose weight is frozen, and its adapter; the weight keeps its name and stays the parameter it was.

    Attributes:
        lora_A, lora_B: [r, I] and [O, r], of the weight's dtype.
        enabled: False leaves the adapter out.
        dropping: True while the adapter's input loses `dropout` of itself.
    """

    def __init__(self, base: nn.Linear, lora: Lora) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_zeros(lora.r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, lora.r))
        self.scale, self.dropout = lora.scale, lora.dropout
        self.enabled, self.dropping = True, False

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
        if not self.enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        dropped = nn.functional.dropout(x, self.dropout) if self.dropping else None
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, dropped=dropped)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one weight [O, I] that does the same: W + scale B A, added in float32 at least and rounded to W's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.addmm(self.weight.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale).to(self.weight.dtype)


class Adapters:
    """The adapters of a model. Making this puts them in, fresh, and freezes everything else.

    Args:
        net: our decoder or a Hugging Face model.
        lora: which linears, and how; `start` is read.

    Attributes:
        linears: Hugging Face name ("model.layers.0.self_attn.q_proj") → linear, in the model's order.

    Raises:
        ModelError: no linear is hit, or the adapter in `start` can't be used.
    """

    def __init__(self, net: nn.Module, lora: Lora) -> None:
        self.lora = lora
        self.net = net
        self.linears = attach(net, lora)
        if lora.start:
            self.load(lora.start)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name as in peft's files → parameter."""
        return {
            f"{PREFIX}{name}.lora_{part}.weight": getattr(linear, f"lora_{part}") for name, linear in self.linears.items() for part in "AB"
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was before: a reference that costs no memory."""
        was = [linear.enabled for linear in self.linears.values()]
        try:
            for linear in self.linears.values():
                linear.enabled = False
            yield
        finally:
            for linear, enabled in zip(self.linears.values(), was, strict=True):
                linear.enabled = enabled

    @contextmanager
    def dropping(self, *seeds: int) -> Iterator[None]:
        """Dropout is at work, the same whenever the seeds are; torch's own generators go on afterwards as if nothing had been."""
        if not self.lora.dropout:
            yield
            return
        devices = sorted({linear.weight.device.index or 0 for linear in self.linears.values() if linear.weight.is_cuda})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_seed("dropout", self.lora.seed, *seeds))
            try:
                for linear in self.linears.values():
                    linear.dropping = True
                yield
            finally:
                for linear in self.linears.values():
                    linear.dropping = False

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model by its Hugging Face name, with the adapter it may have merged into it."""
        linear = self.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return tensor if linear is None else linear.merged()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model without adapters in it, its merged weights in main memory: for writing it, not for running it."""
        ours = {id(module): name for name, module in self.net.named_modules()}
        places = {ours[id(linear)]: linear for linear in self.linears.values()}
        try:
            for place, linear in places.items():
                whole = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
                whole.weight, whole.bias = nn.Parameter(linear.merged().cpu(), requires_grad=False), linear.bias
                self.net.set_submodule(place, whole)
            yield
        finally:
            for place, linear in places.items():
                self.net.set_submodule(place, linear)

    def restart(self) -> None:
        """Start anew, as at first."""
        for name, linear in self.linears.items():
            _start(linear, _seed(name, self.lora.seed))

    def save(self, folder: str | Path, base: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors into an existing folder; peft loads them.

        Args:
            base: folder or hub name of the model that the adapters are for.
        """
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.lora.r,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": self.lora.dropout,
            "use_rslora": self.lora.rank_stabilised,
            "target_modules": sorted(self.linears),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        Path(folder, ADAPTER_CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in self.parameters().items()}, Path(folder, TENSORS), {"format": "pt"}
        )

    def load(self, folder: str | Path) -> None:
        """Take over the tensors of an adapter in peft's format.

        Raises:
            ModelError: the file can't be read, or holds other tensors than these adapters have; nothing has changed then.
        """
        tensors = read_tensors(folder)
        self.check(tensors, str(folder))
        self.take(tensors)

    def check(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Raise ModelError, naming `source`, if a tensor (by its name in peft's files) is missing, unknown, misshapen or not finite."""
        own = self.parameters()
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or unknown:
            near = difflib.get_close_matches(unknown[0], missing, 1) if missing and unknown else []
            raise ModelError(
                f"The adapter {source} is for other linears: {len(missing)} tensors are missing, {len(unknown)} are unknown"
                + (f" ({unknown[0]} may be {near[0]})" if near else f", such as {(unknown or missing)[0]}")
                + ".",
                remedy="give the adapter of this model, and the targets that it was trained with",
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ModelError(
                    f"The adapter {source} has another shape at {name}.",
                    ask=f"{tuple(tensor.shape)}",
                    have=f"{tuple(own[name].shape)}",
                    remedy="set r to the adapter's, and give the model it was trained for",
                )
            if not tensor.isfinite().all():
                raise ModelError(f"The adapter {source} holds NaN or infinity at {name}.", remedy="give an earlier checkpoint")

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors that were checked."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter in peft's format. Raises ModelError if the file can't be read."""
    path = Path(folder).expanduser() / TENSORS
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The adapter {path} can't be read: {error}", remedy="give a folder that peft or policy.save wrote") from error
    return found


def attach(net: nn.Module, lora: Lora) -> dict[str, LoraLinear]:
    """Replace the linears that `lora` hits by ones with fresh adapters, and freeze every other parameter.

    Returns:
        Hugging Face name → the new linear.

    Raises:
        ModelError: it hits none.
    """
    plain = {name: module for name, module in net.named_modules() if type(module) is nn.Linear and not _is_head(net, name, module)}
    known = {name: names_of(name) for name in plain}
    hit = {name: known[name][-1] for name in plain if lora.hits(*known[name])}
    if not hit:
        endings = sorted({names[-1].rsplit(".", 1)[-1] for names in known.values()})
        raise ModelError(
            "The adapters' targets hit no linear of this model.",
            ask=f"targets={lora.targets!r}",
            have=", ".join(endings) or "no linears",
            remedy='give "all-linear", endings of these names, or a regular expression for whole names',
        )
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    found = {}
    for name, theirs in hit.items():
        linear = LoraLinear(plain[name], lora)
        _start(linear, _seed(theirs, lora.seed))
        net.set_submodule(name, linear)
        found[theirs] = linear
    return found


def _is_head(net: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether it is the head, or a router: peft's "all-linear" leaves both out."""
    output = getattr(net, "get_output_embeddings", lambda: getattr(net, "head", None))()
    return module is output or name.rpartition(".")[2] == "router"


@torch.no_grad()
def _start(linear: LoraLinear, seed: int) -> None:
    """A uniform in ±1/√I (as Kaiming's with a = √5), drawn in float32 on the CPU so that all members get equal bits."""
    bound = 1 / math.sqrt(linear.in_features)
    drawn = torch.empty(linear.lora_A.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    linear.lora_A.copy_(drawn)
    linear.lora_B.zero_()


def _seed(*parts: object) -> int:
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1  # torch takes 63 bits
