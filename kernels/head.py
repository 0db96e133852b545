"""The output head, a few tokens at a time: how logits follow from hidden states, and how gradients go back through them.

K tokens, D hidden size, V vocabulary, Vp rows of the head (at least V; the rest pads it to a fast size). A token's logits are
z = cap(scale * hidden @ head[:V].T) / temperature, where cap(u) = softcap * tanh(u / softcap), or u without a soft cap
(Gemma 2, arXiv:2408.00118, section 2). All losses over the vocabulary are made from these few functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS = {"cpu": 2**24, "cuda": 2**26}  # logits held at once by default: 64 and 256 MiB in float32


@dataclass(frozen=True)
class Law:
    """How logits are made: z = cap(scale * hidden @ head[:vocab].T) / temperature."""

    vocab: int
    temperature: float = 1.0
    softcap: float = 0.0
    scale: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from raw products, in place."""
        if self.softcap:
            raw.mul_(self.scale / self.softcap).tanh_()
        factor = (self.softcap or self.scale) / self.temperature
        return raw if factor == 1 else raw.mul_(factor)

    def bend(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw products: a number, or with a soft cap a new tensor of the logits' shape."""
        if not self.softcap:
            return self.scale / self.temperature
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1).mul_(self.scale / self.temperature)


def law(
    hidden: Tensor, head: Tensor, targets: Tensor, *, vocab: int = 0, temperature: float = 1.0, softcap: float = 0.0, scale: float = 1.0
) -> Law:
    """The checked law of a call.

    Args:
        hidden: [K, D].
        head: [Vp, D].
        targets: [K] or [K, k], token ids; their values are not looked at (that would wait for the device).
        vocab: V; 0 means all rows of the head.

    Raises:
        ValueError: shapes disagree, or a number is out of its range.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape[:1] != hidden.shape[:1]:
        raise ValueError(
            f"Shapes disagree. Asked: hidden {tuple(hidden.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}. "
            "Do: give hidden [K, D], head [V, D], targets [K]."
        )
    if not 0 <= vocab <= len(head):
        raise ValueError(f"More tokens than the head has rows. Asked: vocab={vocab}. Have: {len(head)} rows. Do: give the true vocabulary.")
    if not temperature > 0:
        raise ValueError(
            f"A temperature is positive. Asked: temperature={temperature}. "
            "Do: give the temperature that the tokens were sampled at (greedy samples have none: use 1)."
        )
    if not softcap >= 0 or scale == 0 or not abs(scale) < float("inf"):
        raise ValueError(f"Asked: softcap={softcap}, scale={scale}. Do: give a soft cap of at least 0 (0 is none), a scale other than 0.")
    return Law(vocab or len(head), float(temperature), float(softcap), float(scale))


def chunks(count: int, size: int, like: Tensor, columns: int) -> Iterator[slice]:
    """Cut `count` tokens into parts of `size`, or if that is 0 of as many as `LOGITS` allows.

    Raises:
        ValueError: `size` is negative.
    """
    if size < 0:
        raise ValueError(f"A chunk is not negative. Asked: chunk={size}. Do: give tokens whose logits are held at once, or 0.")
    size = size or max(1, LOGITS.get(like.device.type, LOGITS["cpu"]) // columns)
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


def factor(head: Tensor) -> Tensor:
    """The head as the products below take it: 16 bits wide only where they can be accumulated and kept in float32.

    That is bfloat16 on a GPU; gradients of logits underflow in float16, and a CPU rounds its 16-bit products.
    """
    return head if head.dtype == torch.bfloat16 and head.is_cuda else head.to(wide(head))


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of results: float32, or float64 if any input is."""
    found = torch.float32
    for each in tensors:
        found = torch.promote_types(found, each.dtype)
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (or float64), for both of the dtype of `factor`."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype == torch.bfloat16 else left @ right


def logits(hidden: Tensor, weight: Tensor, rule: Law) -> Tensor:
    """[k, V] logits in float32 (or float64), a tensor that the caller may change; `weight` as `factor` made it, V rows."""
    return rule.apply(product(hidden.to(weight.dtype), weight.T))


class Gradients:
    """What a chunked pass adds up: gradients of hidden [K, D] and of the head [Vp, D], each or none.

    That of the head is summed over the chunks in float32 (or float64).
    """

    def __init__(self, hidden: Tensor, head: Tensor, *, to_hidden: bool, to_head: bool) -> None:
        self.hidden = torch.zeros_like(hidden) if to_hidden else None
        self.head = torch.zeros_like(head, dtype=wide(hidden, head)) if to_head else None
        self._dtype = head.dtype

    def add(self, slope: Tensor, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        """One chunk.

        Args:
            slope: [k, V], gradient of the raw products.
            hidden: [k, D] of these tokens.
            weight: [V, D] as `factor` made it.
            rows: which rows of the whole `hidden` these tokens are.
        """
        slope = slope.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = product(slope, weight).to(self.hidden.dtype)
        if self.head is not None:
            hidden, part = hidden.to(slope.dtype), self.head[: len(weight)]
            if slope.dtype == part.dtype:
                part.addmm_(slope.T, hidden)  # in place: a product apart would be a second [V, D]
            else:
                part.add_(product(slope.T, hidden))

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden and of the head, in the dtypes of these."""
        return self.hidden, None if self.head is None else self.head.to(self._dtype)
