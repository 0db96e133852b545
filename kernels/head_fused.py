"""The head for bfloat16 tensors on a Hopper GPU: the kernels of `kernels/head_triton.py` and cuBLAS products around them.

Cross entropy, for a chunk of C tokens at a time: one product writes e = exp(z - r) in bfloat16, where the row's reference r, the
logit of its target plus 40, needs no pass over the logits. bfloat16 has the exponents of float32, so e is as precise, relative to
itself, as gradients of logits in bfloat16 are; the logits were never rounded. The row's sum S comes along; with a = weight / S the
gradients are a (e @ head) and e.T @ (a hidden), once e at the target is e - S. So logits are made once (6 N D V operations in
all) and nothing but products reads or writes all of e. Where a target's logit is more than some 115 below the row's largest, sums
overflow: that is seen at the end, and the loss is computed again by chunks of float32 logits.

Logprobs and entropy: the first product reduces its tiles to three numbers a row; the backward pass makes logits again.

The gradient of the head is summed over chunks in bfloat16, each product in float32 (docs/kernels.md has its error against float64).

A Hopper tensor core rounds towards zero whenever it adds 16 more terms to a float32 sum, so large sums come out too small by a share
that grows with their number of terms; logits are multiplied by what is lost on average (TRUNCATED).
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from rolecall.kernels.head import Law
from rolecall.kernels.head_plan import ROWS, Chunk, Shape, plan
from torch import Tensor

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
LIFT = 40 * LOG2E  # added to references: exponentials then reach from e^-127 of the target's to e^87, sums of 2^17 of them too
TILE = (ROWS, 256, 64)  # rows, columns and depth of a tile
GROUP = 16  # row tiles that share columns of the head while these are in L2
LOSS_BYTES, SLOPE_BYTES, SUM_BYTES = 508_000_000, 252_000_000, 2**27  # above the gradients: of cross entropy; logprobs backward, forward
TOKEN_BYTES = 64  # of indices, weights, references and results of each token of a call
TRUNCATED = 0.94e-9  # of a sum, lost with each of its terms on average; measured for 256 to 4096 terms


@dataclass(frozen=True)
class Settings:
    """How `project` is built; measured on an H100."""

    tile: tuple[int, int, int] = TILE
    group: int = GROUP
    warps: int = 8
    stages: int = 3
    flatten: bool = True  # one loop over tiles and depth: the next tile's first loads overlap with this one's epilogue
    resident: int = 1  # programs a multiprocessor


SETTINGS = Settings()


def fused(hidden: Tensor, head: Tensor) -> Any | None:
    """This module, if it can take these tensors; otherwise None.

    It takes contiguous bfloat16 on a GPU of compute capability 9 with Triton installed, at least one token, D a multiple of 8.
    """
    able = (
        hidden.is_cuda
        and hidden.dtype == head.dtype == torch.bfloat16
        and hidden.shape[0] > 0
        and hidden.shape[1] % 8 == 0
        and hidden.is_contiguous()
        and head.is_contiguous()
        and torch.cuda.get_device_capability(hidden.device)[0] == 9
        and importlib.util.find_spec("triton") is not None
    )
    return importlib.import_module(__name__) if able else None


def measure(hidden: Tensor, head: Tensor, targets: Tensor, rule: Law, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs and entropy [K] in nats, logsumexp [K] in units of log 2; float32."""
    kernels, count = _loaded(), len(targets)
    results = torch.empty(3, count, device=hidden.device)
    tiles = _tiles(rule.vocab)
    size = chunk or max(TILE[0], int(SUM_BYTES / (12 * tiles)) // (TILE[0] * GROUP) * TILE[0] * GROUP)
    sums = torch.empty(3, tiles * min(size, count), device=hidden.device)
    at = torch.full((count,), math.nan, device=hidden.device)
    for start in range(0, count, size):
        part = slice(start, min(count, start + size))
        rows = part.stop - start
        _project("MEASURE", hidden[part], head, rule, targets[part], sums=sums, at=at[part])
        kernels.combine[(-(-rows // 32),)](*sums, at[part], *(each[part] for each in results), rows, tiles, BR=32, BT=32)
    logprobs, entropy, normaliser = results.unbind()
    return logprobs, entropy, normaliser


def spread(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor | None],
    rule: Law,
    chunk: int,
    *,
    to_hidden: bool,
    to_head: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and head from those of logprobs and entropy; `found` are the results of `measure`."""
    kernels, (logprobs, normaliser, entropy), (of_logprobs, of_entropy) = _loaded(), found, slopes
    count, width = len(targets), _width(rule.vocab)
    bend = rule.scale / rule.temperature
    of_target = of_logprobs.float().contiguous() * bend
    second = torch.zeros_like(of_target) if of_entropy is None else of_entropy.float() * bend
    first, second = of_target + second * entropy, second * LN2
    sums = _Sums(hidden, head, rule, to_hidden=to_hidden, to_head=to_head)
    shape = Shape(count, hidden.shape[1], rule.vocab, token_bytes=2 * width)
    cut = _parts(plan(shape, SLOPE_BYTES - TOKEN_BYTES * count, chunk))
    out = torch.empty(max(part.stop - part.start for part, _ in cut), width, device=hidden.device, dtype=torch.bfloat16)
    every = torch.arange(count, device=hidden.device)
    for part, splits in cut:
        rows, states = part.stop - part.start, hidden[part]
        factors = {"reference": normaliser[part], "first": first[part], "second": second[part]}
        _project("SLOPES", states, head, rule, targets[part], out=out[:rows], entropy=of_entropy is not None, **factors)
        kernels.pin[(-(-rows // 128),)](
            out, targets[part], logprobs[part], normaliser[part], of_target[part], first[part], second[part],
            rows, rule.vocab, width, _outer(rule), CAP=bool(rule.softcap), BR=128,
        )  # fmt: skip
        sums.add(out[:rows], states, None, every[part], splits)
    return sums.hidden, sums.head


def losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    rows: Tensor,
    share: Tensor,
    rule: Law,
    chunk: int,
    *,
    to_hidden: bool,
    to_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The loss and its gradients, as `_losses` of `kernels/cross_entropy.py`; None where exponentials overflowed.

    Waits for the device once, while it multiplies for the last time.
    """
    if not (to_hidden or to_head):
        logprobs, _, _ = measure(hidden[rows], head, targets, rule, 0) if len(rows) else (share, share, share)
        return -(logprobs * share).sum(), None, None
    sums = _Sums(hidden, head, rule, to_hidden=to_hidden, to_head=to_head)
    count = len(rows)
    tiles, width = _tiles(rule.vocab), _width(rule.vocab)
    shape = Shape(count, hidden.shape[1], rule.vocab, token_bytes=2 * width + 2 * hidden.shape[1] + 4 * tiles)
    cut = _parts(plan(shape, LOSS_BYTES - TOKEN_BYTES * len(hidden), chunk))
    size = max((part.stop - part.start for part, _ in cut), default=0)
    out = torch.empty(size, width, device=hidden.device, dtype=torch.bfloat16)
    mass = torch.empty(tiles * size, device=hidden.device)
    each = torch.empty(count, device=hidden.device)
    trouble = torch.zeros(1, device=hidden.device, dtype=torch.int32)
    for part, splits in cut:
        states = hidden[rows[part]]
        factors = _exponentials(states, head, rule, targets[part], share[part], out, mass, each[part], trouble)
        if part.stop == count:
            told = _Told(trouble)
        sums.add(out[: len(states)], states, factors, rows[part], splits)
        del states, factors  # or the next chunk's would be beside them
    if count and told.read():
        return None
    return each.sum(), sums.hidden, sums.head


def _exponentials(
    states: Tensor, head: Tensor, rule: Law, targets: Tensor, share: Tensor, out: Tensor, mass: Tensor, each: Tensor, trouble: Tensor
) -> Tensor:
    """Fills `out` and `each`, multiplies `states` by the rows' factors, which it returns."""
    kernels, (count, depth), inner, outer = _loaded(), states.shape, rule.scale / (rule.softcap or 1.0), _outer(rule)
    reference, at, factors = torch.full((3, count), math.nan, device=states.device).unbind()
    kernels.target_logits[(count,)](
        states, head, targets, reference, rule.vocab, depth, inner, outer, LIFT, CAP=bool(rule.softcap), BD=1024
    )
    _project("EXPONENTIALS", states, head, rule, targets, out=out[:count], sums=(mass, mass, mass), at=at, reference=reference)
    kernels.finish[(-(-count // 8),)](
        states, out, targets, reference, at, mass, share, each, factors, trouble,
        count, rule.vocab, depth, out.shape[1], _tiles(rule.vocab), outer, rule.scale,
        CAP=bool(rule.softcap), BR=8, BT=64, BD=512,
    )  # fmt: skip
    return factors


def multiply(values: Tensor, number: Tensor) -> None:
    """values *= number, in place; on the device alone, and for nothing if it is 1."""
    _loaded().multiply[(-(-values.numel() // 4096),)](values, number, values.numel(), BLOCK=4096)


class _Told:
    """A number on its way from the device; reading it does not wait for what was queued after it."""

    def __init__(self, number: Tensor) -> None:
        self._number = torch.empty(1, dtype=number.dtype, pin_memory=True)
        self._number.copy_(number, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def read(self) -> int:
        self._there.synchronize()
        return int(self._number)


class _Sums:
    """Gradients of hidden and head, added up chunk by chunk with cuBLAS."""

    def __init__(self, hidden: Tensor, head: Tensor, rule: Law, *, to_hidden: bool, to_head: bool) -> None:
        # Slopes are 0 in padding columns, so that products may go over them where the head has the rows: odd sizes are slow.
        width = _width(rule.vocab)
        self._weight, self._columns, self._first = head, width if len(head) >= width else rule.vocab, True
        self.hidden = torch.zeros_like(hidden) if to_hidden else None
        self._head = torch.empty_like(head) if to_head else None
        if self._head is not None:
            self._head[self._columns :].zero_()

    @property
    def head(self) -> Tensor | None:
        """The gradient of the head; 0 where no chunk came."""
        if self._head is not None and self._first:
            self._head.zero_()
        return self._head

    def add(self, slope: Tensor, states: Tensor, factors: Tensor | None, rows: Tensor, splits: int) -> None:
        """One chunk: `slope` [C, width], `states` [C, D] already multiplied by `factors` [C], if there are any."""
        part = slope[:, : self._columns]
        if self._head is not None:
            target = self._head[: self._columns]
            if self._first:
                torch.mm(part.T, states, out=target)
            else:
                target.addmm_(part.T, states)
            self._first = False
        if self.hidden is not None:
            pieces = self._pieces(part, splits)
            (count, depth), scaled = states.shape, factors is not None
            by = factors if scaled else pieces
            _loaded().gather_sum[(count,)](pieces, by, rows, self.hidden, count, depth, len(pieces), SCALED=scaled, BD=1024)

    def _pieces(self, slope: Tensor, splits: int) -> Tensor:
        """[splits or one more, C, D] float32, whose sum is slope @ head."""
        step = self._columns // splits // 8 * 8  # sums over a multiple of 16 bytes: an odd vocabulary slows only the rest down
        weight, whole = self._weight[: self._columns], splits * step
        pieces = torch.empty((splits if step else 0) + (whole < self._columns), len(slope), weight.shape[1], device=slope.device)
        if splits == 1 and step:
            torch.mm(slope[:, :step], weight[:step], out_dtype=torch.float32, out=pieces[0])
        elif step:
            left = slope[:, :whole].unflatten(1, (splits, step)).transpose(0, 1)
            torch.bmm(left, weight[:whole].unflatten(0, (splits, step)), out_dtype=torch.float32, out=pieces[:splits])
        if whole < self._columns:
            torch.mm(slope[:, whole:], weight[whole:], out_dtype=torch.float32, out=pieces[-1])
        return pieces


def _project(
    kind: str,
    states: Tensor,
    head: Tensor,
    rule: Law,
    targets: Tensor,
    *,
    out: Tensor | None = None,
    sums: Any = None,
    at: Tensor | None = None,
    reference: Tensor | None = None,
    first: Tensor | None = None,
    second: Tensor | None = None,
    entropy: bool = True,
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernels, how = _loaded(), SETTINGS
    rows, columns, depth = how.tile
    x = TensorDescriptor.from_tensor(states, [rows, depth])
    w = TensorDescriptor.from_tensor(head, [columns, depth])
    to = TensorDescriptor.from_tensor(states if out is None else out, [rows, depth if out is None else columns])
    tiles = -(-len(states) // rows) * -(-rule.vocab // columns)
    programs = min(tiles, how.resident * torch.cuda.get_device_properties(states.device).multi_processor_count)
    top, mass, turn = (at, at, at) if sums is None else sums
    inner, outer, whole = rule.scale / (rule.softcap or 1.0), _outer(rule), 1 + TRUNCATED * states.shape[1]
    inner, outer = (inner * whole, outer) if rule.softcap else (inner, outer * whole)
    kernels.project[(programs,)](
        x, w, to, targets, reference, first, second, top, mass, turn, at,
        len(states), rule.vocab, states.shape[1], inner, outer,
        KIND=getattr(kernels, kind).value, CAP=bool(rule.softcap), ENTROPY=entropy, BM=rows, BN=columns, BK=depth,
        GROUP=how.group, PROGRAMS=programs, FLATTEN=how.flatten, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip


def _loaded() -> Any:
    return importlib.import_module("rolecall.kernels.head_triton")


def _outer(rule: Law) -> float:
    return (rule.softcap or rule.scale) / rule.temperature * LOG2E


def _tiles(vocab: int) -> int:
    return -(-vocab // SETTINGS.tile[1])


def _width(vocab: int) -> int:
    return -(-vocab // 64) * 64


def _parts(cut: tuple[Chunk, ...]) -> list[tuple[slice, int]]:
    """Which tokens each chunk has, and its splits."""
    ends = list(itertools.accumulate(chunk.rows for chunk in cut))
    return [(slice(end - chunk.rows, end), chunk.splits) for end, chunk in zip(ends, cut, strict=True)]
