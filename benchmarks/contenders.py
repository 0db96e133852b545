"""Ours and the peers of the training benchmarks: each takes the same documents and makes one whole optimiser step of them.

Ours is the policy role itself: `accumulate` and `update` as a controller calls them, the batch on the host when the clock starts.
The peers are transformers as a plain loop of their trainer's steps: batches already on the device, gradients summed over micro-batches
as large as fit, clipped, fused AdamW, all in pure bfloat16, which is their fastest setting. Their padding-free attention needs a
package that few hosts have; its kernel (FlashAttention 2, variable length) is in torch, and that is what they are given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from documents import Rows
from rolecall.kernels.losses import nll
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.policy import Policy

RATE, CLIP = 1e-6, 1.0
Form = Callable[[Rows, int], list[dict[str, Any]]]  # rows or documents at a time → batches of transformers


flash: Callable[..., Any] = torch.ops.aten._flash_attention_forward


class Contender:
    """One whole training step at a time."""

    name: str
    about: str

    def step(self, rows: Rows) -> None:
        """Forward and backward of all rows, and one update."""
        raise NotImplementedError

    def loss_and_norm(self, rows: Rows) -> tuple[float, float]:
        """Mean loss of the trained tokens and the gradient's norm; nothing moves."""
        raise NotImplementedError

    def close(self) -> None:
        """Give memory back."""


class Ours(Contender):
    """The policy role."""

    def __init__(
        self,
        name: str,
        about: str,
        model: str,
        *,
        device: str = "cuda:0",
        form: Callable[[Rows], PackedBatch] = Rows.packed,
        **settings: Any,
    ) -> None:
        self.name, self.about = name, about
        self.policy = Policy(model, clip=CLIP, **settings)
        self.policy.setup(Member(role="policy", device=device, threads=torch.get_num_threads()))
        self._form, self._ready = form, {}

    def _batch(self, rows: Rows) -> PackedBatch:
        """Packed once: the data role does that while the policy trains."""
        if id(rows) not in self._ready:
            self._ready[id(rows)] = (rows, self._form(rows))
        return self._ready[id(rows)][1]

    def step(self, rows: Rows) -> None:
        self.policy.accumulate(self._batch(rows), loss=nll)
        self._update()

    def loss_and_norm(self, rows: Rows) -> tuple[float, float]:
        total, weight = self.policy.accumulate(self._batch(rows), loss=nll).sums["loss"]
        return total / weight, self._norm()

    def _update(self) -> None:
        self.policy.update(RATE)
        self.policy.meter.drain()

    def _norm(self) -> float:
        """The gradient's norm; at rate 0 nothing moves."""
        self.policy.meter.drain()
        self.policy.update(0.0)
        return self.policy.meter.drain()["grad_norm"][0]

    def close(self) -> None:
        self.policy.close()


class HuggingFace(Contender):
    """transformers.

    Args:
        model: folder.
        form: how documents become batches.
        micro: rows (or documents) of a micro-batch to try, the first that fits is kept.
        attention: name of an attention of transformers, or "varlen".
        compiled: torch.compile of every layer and of the loss.
        liger: Liger's kernels, fused head and loss included.
        adapter: folder of peft's adapters to go on from; "" for none.
        checkpointing: recompute each layer in the backward pass, as their trainers do where memory is short.
    """

    def __init__(
        self,
        name: str,
        about: str,
        model: str,
        *,
        form: Form,
        micro: tuple[int, ...] = (1,),
        attention: str = "varlen",
        compiled: bool = False,
        liger: bool = False,
        adapter: str = "",
        checkpointing: bool = False,
        device: str = "cuda:0",
        dtype: str = "bfloat16",
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.name, self.about, self.device = name, about, device
        self._form, self._micro, self._ready = form, list(micro), {}
        if attention == "varlen":
            _register_varlen()
        net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=attention).to(device).train()
        self._modeling = sys.modules[type(net).__module__]
        self._patches: dict[str, Any] = {}
        if liger:
            self._patches = _apply_liger(net, self._modeling)
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter:
            net = _adapted(net, adapter)
        if compiled:
            for layer in net.get_decoder().layers:
                layer.compile(dynamic=True)  # micro-batches differ in their tokens
            net.loss_function = torch.compile(net.loss_function, dynamic=True)
        self.net = net
        self.trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.95), fused=True)

    @property
    def micro(self) -> int:
        """Rows or documents of a micro-batch, as last tried."""
        return self._micro[0]

    def _batches(self, rows: Rows) -> list[dict[str, Any]]:
        key = id(rows), self.micro
        if key not in self._ready:
            made = [{name: _put(value, self.device) for name, value in part.items()} for part in self._form(rows, self.micro)]
            self._ready[key] = (rows, made)
        return self._ready[key][1]

    def _backward(self, rows: Rows) -> torch.Tensor:
        """Gradients of the mean loss; the loss, on the device."""
        total = torch.zeros((), device=self.device)
        number = torch.tensor(rows.trained, device=self.device)
        with _patched(self._modeling, self._patches):
            for batch in self._batches(rows):
                loss = self.net(**batch, use_cache=False, num_items_in_batch=number).loss
                loss.backward()
                total += loss.detach()
        return total

    def step(self, rows: Rows) -> None:
        while True:
            try:
                self._backward(rows)
                break
            except torch.OutOfMemoryError:
                if len(self._micro) == 1:
                    raise
                del self._micro[0]  # the next smaller one
            self.optimiser.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP, foreach=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def loss_and_norm(self, rows: Rows) -> tuple[float, float]:
        loss = float(self._backward(rows))
        norm = float(torch.nn.utils.get_total_norm([each.grad for each in self.trained if each.grad is not None]))
        self.optimiser.zero_grad(set_to_none=True)
        return loss, norm


def _put(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _adapted(net: Any, folder: str) -> Any:
    """The adapters in the folder, in the model's dtype."""
    from peft import PeftModel

    net.enable_input_require_grads()
    return PeftModel.from_pretrained(net, folder, is_trainable=True, autocast_adapter_dtype=False)


def _register_varlen() -> None:
    """Make "varlen" an attention of transformers: torch's FlashAttention 2 with the collator's offsets, or with the mask of padded rows."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def varlen(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        cu_seq_lens_q: Any = None,
        max_length_q: int = 0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, _, slots, _ = query.shape
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
        chosen = None
        if attention_mask is not None:  # padded rows: attention on the real tokens alone, as transformers does it in every layer
            chosen, cu_seq_lens_q, max_length_q = _unpadded(attention_mask)
            q, k, v = q[chosen], k[chosen], v[chosen]
        elif cu_seq_lens_q is None:  # rows of one length each, none padded
            cu_seq_lens_q, max_length_q = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * slots, slots
        near = {"window_size_left": sliding_window - 1, "window_size_right": 0} if sliding_window else {}
        ends, longest = cu_seq_lens_q, max_length_q
        out = flash(q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scaling, **near)[0]
        if chosen is not None:
            out = out.new_zeros(rows * slots, *out.shape[1:]).index_copy(0, chosen, out)
        return out.view(rows, slots, *out.shape[1:]), None

    AttentionInterface.register("varlen", varlen)
    AttentionMaskInterface.register("varlen", flash_attention_mask)  # without one, transformers hands no mask on


def _unpadded(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Slots of real tokens, their offsets by row, and the longest row."""
    sizes = mask.sum(-1, dtype=torch.int32)
    ends = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero()[:, 0], ends, int(sizes.max())


def _apply_liger(net: Any, modeling: Any) -> dict[str, Any]:
    """Liger's kernels for this model alone: what it replaces in transformers' module is put back, and returned for its steps."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    before = dict(vars(modeling))
    _apply_liger_kernel_to_instance(model=net)
    changed = {name: value for name, value in vars(modeling).items() if before.get(name) is not value}
    for name in changed:
        setattr(modeling, name, before[name])
    return changed


@contextmanager
def _patched(modeling: Any, patches: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(modeling, name) for name in patches}
    try:
        for name, value in patches.items():
            setattr(modeling, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(modeling, name, value)
