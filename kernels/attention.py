"""Attention over packed rows and over cached keys: who may attend to whom, and the weighted mean itself.

Shape letters: R rows, C slots of a row (queries), K keys, H query heads, G key heads (H is a multiple of G), d size of a
head, S segments. A segment is one sequence within a row; it may continue a parent segment, as the completions of one
prompt continue the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from rolecall.kernels.attention_cpu import CpuJob, find_blocks, worth_it
from rolecall.kernels.attention_spans import by_job
from rolecall.kernels.segments import Segments, find_segments
from torch import Tensor

Made = TypeVar("Made")


class Packed:
    """Packed rows: each slot sees its own segment up to itself, and the segments that this one continues.

    Segments are looked at on the host, once: give tensors of the CPU, even for a model on a GPU, where they are at hand.

    Args:
        segments: [R, C] int, number of the segment of each slot, -1 where there is none. Ancestors come earlier in the row.
        parents: [S] int, segment that each one continues, -1 for none.
        positions: [R, C] int, of each slot within its sequence, parents included.

    Raises:
        ValueError: shapes disagree.
    """

    def __init__(self, segments: Tensor, parents: Tensor, positions: Tensor) -> None:
        if segments.ndim != 2 or positions.shape != segments.shape or parents.ndim != 1:
            raise ValueError(
                f"Shapes disagree. Asked: segments {tuple(segments.shape)}, parents {tuple(parents.shape)}, positions "
                f"{tuple(positions.shape)}. Do: give segments [R, C], parents [S], positions [R, C]."
            )
        self.segments, self.parents, self.positions = segments, parents, positions
        self._kept: dict[tuple[Any, ...], Any] = {}

    @property
    def found(self) -> Segments:
        """Where the segments lie, on the host; found once.

        Raises:
            ValueError: they don't tile the rows, or parents make no sense (`segments.find_segments`).
        """
        parts = self.segments, self.parents, self.positions
        return self.keep(("found",), lambda: find_segments(*(part.cpu().numpy() for part in parts)))

    def keep(self, name: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What was made under this name before, or is made now: masks and the like, shared by all layers of a model."""
        if name not in self._kept:
            self._kept[name] = make()
        made: Made = self._kept[name]
        return made

    def dense(self, window: int = 0) -> Tensor:
        """[R, 1, C, C] bool, True where query i may attend to key j, on the device of `segments`; kept.

        Args:
            window: a slot sees only keys whose position is greater than its own less this; 0 for no such limit.

        Raises:
            ValueError: what `found` raises.
        """

        def make() -> Tensor:
            assert self.found  # noqa: S101 - checks the segments
            return _near(packed_mask(self.segments, self.parents), self.positions, self.positions, window)

        return self.keep(("dense", window), make)


class Dense:
    """Rows whose keys are not their queries: cached decoding, and prefill after a shared beginning.

    Args:
        mask: [R, 1, C, K] bool, True where query i may attend to key j, windows left aside. Every query has a True.
        positions: [R, C] int, of each query within its sequence.
        key_positions: [R, K] int, of each key; anything where no query may look.

    Raises:
        ValueError: shapes disagree.
    """

    def __init__(self, mask: Tensor, positions: Tensor, key_positions: Tensor) -> None:
        if mask.ndim != 4 or mask.shape[1] != 1 or positions.shape != mask.shape[::2] or key_positions.shape != mask.shape[::3]:
            raise ValueError(
                f"Shapes disagree. Asked: mask {tuple(mask.shape)}, positions {tuple(positions.shape)}, key_positions "
                f"{tuple(key_positions.shape)}. Do: give mask [R, 1, C, K], positions [R, C], key_positions [R, K]."
            )
        self.mask, self.positions, self.key_positions = mask, positions, key_positions
        self._dense: dict[int, Tensor] = {}
        self._added: dict[tuple[int, torch.dtype], Tensor] = {}

    def dense(self, window: int = 0) -> Tensor:
        """As `Packed.dense`, [R, 1, C, K]."""
        if window not in self._dense:
            self._dense[window] = _near(self.mask, self.positions, self.key_positions, window)
        return self._dense[window]

    def added(self, window: int, dtype: torch.dtype) -> Tensor:
        """The same as what is added to logits, 0 or -inf: PyTorch makes that of a bool mask anew in each layer."""
        key = window, dtype
        if key not in self._added:
            mask = self.dense(window)
            self._added[key] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self._added[key]


Where = Packed | Dense
HALF = (torch.float16, torch.bfloat16)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph of a compiled model breaks here: what is done depends on where segments lie
def attend(
    q_RHCd: Tensor,
    k_RGKd: Tensor,
    v_RGKd: Tensor,
    where: Where,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax of scaled products over the keys that each query may see, times the values; differentiable.

    Args:
        q_RHCd: queries [R, H, C, d].
        k_RGKd: keys [R, G, K, d]; K is C under `Packed`. Query head h reads key head h * G // H.
        v_RGKd: values [R, G, K, d].
        where: who may attend to whom.
        window: of a sliding window in positions, the query's own included; 0 for none.
        scale: what products of queries and keys are multiplied by.
        softcap: c replaces a scaled product x by c tanh(x / c) (Gemma 2); 0 for none.
        sinks: [H] a logit a head that takes part in the softmax and has no value (GPT-OSS).

    Returns:
        [R, H, C, d] in the queries' dtype. At slots without a segment it is finite and means nothing.

    Raises:
        ValueError: shapes disagree, softcap or window is negative, or what `Packed.found` raises.
    """
    _check(q_RHCd, k_RGKd, v_RGKd, where, window, softcap, sinks)
    if isinstance(where, Packed):
        if q_RHCd.is_cuda and q_RHCd.dtype in HALF and q_RHCd.shape[3] % 8 == 0 and q_RHCd.shape[3] <= 256:
            quick = _on_gpu(q_RHCd, k_RGKd, v_RGKd, where, window, scale, softcap, sinks)
            if quick is not None:
                return quick
        if q_RHCd.device.type == "cpu" and not softcap:
            blocks = where.keep(("blocks", window), lambda: find_blocks(where.found, window))
            if sinks is not None or where.keep(("worth", window), lambda: worth_it(blocks, *where.segments.shape)):
                return by_job(q_RHCd, k_RGKd, v_RGKd, CpuJob(blocks, scale), sinks)
    if softcap or sinks is not None:
        return _grouped(q_RHCd, k_RGKd, v_RGKd, where.dense(window).to(q_RHCd.device), scale, softcap, sinks)
    mask = where.added(window, q_RHCd.dtype) if isinstance(where, Dense) else where.dense(window)
    return _masked(q_RHCd, k_RGKd, v_RGKd, mask.to(q_RHCd.device), scale)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as `attend`
def attend_slots(q_RCHd: Tensor, k_RCGd: Tensor, v_RCGd: Tensor, where: Where, **options: Any) -> Tensor:
    """As `attend`, heads of a slot side by side on the way in and out: [R, C, H, d].

    For compiled models: tensors that cross the border of a graph, and their gradients, are copied unless they
    lie in memory as they are indexed.
    """
    mixed: Tensor = attend(q_RCHd.transpose(1, 2), k_RCGd.transpose(1, 2), v_RCGd.transpose(1, 2), where, **options)
    return mixed.transpose(1, 2)


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, where: Packed, window: int, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor | None:
    """Kernels for sequences where segments stand alone, FlexAttention for the rest; None where neither applies.

    Each is reached only by what it was measured to be exact for (tests/kernels/test_attention_gpu.py).
    """
    found, device = where.found, q.device
    if not len(found.start) or not _knows_flash(device):
        return None
    if softcap or where.keep(("families",), lambda: bool((found.parent >= 0).any())):
        from rolecall.kernels.attention_flex import BLOCK, NARROWEST, flex, make_block_mask

        if found.capacity < BLOCK or q.shape[3] < NARROWEST or not _has_triton():
            return None
        mask = where.keep(("flex", window, device), lambda: make_block_mask(found, where.positions, window, device))
        return flex(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    from rolecall.kernels.attention_cudnn import LIMIT, SIZES, WINDOWED, CudnnJob, find_sequences, usable

    if q.shape[3] in (WINDOWED if window else SIZES) and q.numel() < LIMIT and usable(device):
        sequences = where.keep(("sequences", device), lambda: find_sequences(found, device))
        return by_job(q, k, v, CudnnJob(sequences, window, scale), sinks)
    from rolecall.kernels.attention_flash import FlashJob, find_line

    line = where.keep(("line", device), lambda: find_line(found, device))
    return by_job(q, k, v, FlashJob(line, window, scale), sinks)


@lru_cache(maxsize=16)
def _knows_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's attention under a dense mask."""
    attention = torch.nn.functional.scaled_dot_product_attention
    rows, heads, queries, size = q.shape
    times = heads // k.shape[1]
    if queries == 1:
        # Decoding. With one query a head the heads of one key head become its queries: there is no causal order among them.
        return attention(q.reshape(rows, k.shape[1], times, size), k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    if q.is_cuda and times > 1:
        k, v = (part.repeat_interleave(times, dim=1) for part in (k, v))  # CUDA kernels that take a mask don't group heads
        return attention(q, k, v, attn_mask=mask, scale=scale)
    return attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=times > 1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """By the formula, keys and values not copied for every query head; softmax in float32 or wider."""
    rows, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    times = heads // groups
    logits = (q.reshape(rows, groups, times * queries, size) @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(rows, groups, times, queries, keys).masked_fill(~mask[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, groups, times, 1, 1).expand(rows, -1, -1, queries, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :keys].to(q.dtype)
    return (weights.reshape(rows, groups, times * queries, keys) @ v).view(q.shape)


def attend_plain(
    q_RHCd: Tensor,
    k_RGKd: Tensor,
    v_RGKd: Tensor,
    where: Where,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same by the formula, in float32 or wider, with all products at once."""
    _check(q_RHCd, k_RGKd, v_RGKd, where, window, softcap, sinks)
    wide = torch.promote_types(q_RHCd.dtype, torch.float32)
    times = q_RHCd.shape[1] // k_RGKd.shape[1]
    keys, values = (part.to(wide).repeat_interleave(times, dim=1) for part in (k_RGKd, v_RGKd))
    logits = q_RHCd.to(wide) @ keys.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~where.dense(window).to(logits.device), float("-inf"))
    if sinks is not None:
        rows, _, queries, _ = logits.shape
        logits = torch.cat([logits, sinks.to(wide)[None, :, None, None].expand(rows, -1, queries, 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    return (weights[..., : keys.shape[2]] @ values).to(q_RHCd.dtype)


def packed_mask(segments: Tensor, parents: Tensor) -> Tensor:
    """The attention mask of packed rows: each slot sees its own segment up to itself, and its parent segments.

    mask[r, 0, i, j] = j <= i and (segment_j is segment_i or one of its ancestors).
    A slot without a segment sees only itself: it is seen by none, and its softmax stays finite.

    Args:
        segments: [R, C] int, number of the segment of each slot, -1 where there is none. Ancestors come earlier in the row.
        parents: [S] int, segment that each one continues, -1 for none.

    Returns:
        [R, 1, C, C] bool, True where query i may attend to key j.

    Raises:
        ValueError: a segment has no entry in `parents`, or parents go in a circle.
    """
    if segments.numel() and int(segments.max()) >= len(parents):
        raise ValueError(
            f"A segment is unknown. Asked: segment {int(segments.max())}. There is: parents of {len(parents)}. "
            "Do: give the parents of all segments of these rows."
        )
    segments = segments.long()
    above = torch.cat([parents.long().to(segments.device), segments.new_full((1,), -1)])  # entry -1: above none is none
    keys = segments[:, None, :]
    ancestor = segments
    related = torch.zeros(*segments.shape, segments.shape[-1], dtype=torch.bool, device=segments.device)
    depth = 0
    while bool((ancestor >= 0).any()):
        related |= (ancestor[:, :, None] == keys) & (ancestor >= 0)[:, :, None]
        ancestor = above[ancestor]
        depth += 1
        if depth > len(parents):
            raise ValueError("Parents of segments go in a circle. Do: let each segment continue one that was made before it.")
    slots = torch.arange(segments.shape[-1], device=segments.device)
    causal = slots[:, None] >= slots[None, :]
    return ((related & causal) | (slots[:, None] == slots[None, :]))[:, None]


def _near(mask: Tensor, positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """The mask, keys out of the window left out."""
    if not window:
        return mask
    return mask & (key_positions[:, None, None, :] > positions[:, None, :, None] - window)


def _check(q_RHCd: Tensor, k_RGKd: Tensor, v_RGKd: Tensor, where: Where, window: int, softcap: float, sinks: Tensor | None) -> None:
    if window < 0:
        raise ValueError(f"A window is a number of positions. Asked: window={window}. Do: give 1 or more, or 0 for no window.")
    rows, heads, queries, size = q_RHCd.shape
    shape = (*where.segments.shape, where.segments.shape[1]) if isinstance(where, Packed) else where.mask.shape[::2] + where.mask.shape[3:]
    keys = k_RGKd.shape
    if keys != v_RGKd.shape or keys[0] != rows or keys[3] != size or shape != (rows, queries, keys[2]) or heads % keys[1]:
        raise ValueError(
            f"Shapes disagree. Asked: queries {tuple(q_RHCd.shape)}, keys {tuple(keys)}, values {tuple(v_RGKd.shape)} for "
            f"(rows, queries, keys) {tuple(shape)}. Do: give [R, H, C, d] and twice [R, G, K, d], H a multiple of G."
        )
    if softcap < 0 or (sinks is not None and sinks.shape != (heads,)):
        raise ValueError(
            f"A soft cap is not negative, sinks are one number a head. Asked: softcap={softcap}, sinks "
            f"{None if sinks is None else tuple(sinks.shape)}. There is: {heads} heads. Do: give 0 and None where a model has none."
        )
