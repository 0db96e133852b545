"""Attention over packed rows by cuDNN's kernels for sequences of any lengths, on Hopper: faster than flash kernels of the generation
before, above all backwards, and grouped heads need no sum afterwards.

Needs the package nvidia-cudnn-frontend. What cuDNN compiles (a graph) is for a number of sequences and a longest one; both are rounded
up, so that few graphs serve all rows, and sequences of no length fill up. Shape letters as in attention.py; T = R x C slots in one line.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from rolecall.kernels.segments import Segments
from torch import Tensor

SIZES = (64, 128, 256)  # of a head, for which this was measured to be exact and quicker than flash kernels
WINDOWED = (128, 256)  # and with a window
LIMIT = 2**31  # elements of a tensor: offsets are 32 bits wide
NEEDED = 91900  # cuDNN 9.19, the oldest for which exactness was measured
_here = threading.local()  # a cuDNN handle is for one thread


class Sequences(NamedTuple):
    """The segments of some rows as cuDNN wants them, [n] each on the device, the longest first, filled up with empty ones."""

    starts: Tensor  # [n + 1] int64, slot
    lengths: Tensor  # [n, 1, 1, 1] int32
    longest: int  # rounded up
    gaps: Tensor | None  # int64, slots without a segment
    offsets: dict[int, Tensor]  # elements of a slot → [n + 1, 1, 1, 1] int32: in elements, where each sequence begins; filled by use


class _Shape(NamedTuple):
    """What a graph is compiled for."""

    device: torch.device
    dtype: torch.dtype
    number: int
    longest: int
    slots: int
    heads: int
    groups: int
    size: int
    window: int
    scale: float
    back: bool


class _Graph(NamedTuple):
    """A compiled graph and the bytes of workspace that it needs."""

    run: Any
    workspace: int


# Numbers that tensors go by in a graph.
_LENGTHS_Q, _LENGTHS_K, _AT_Q, _AT_K, _AT_V, _AT_OUT, _AT_SUM = range(1, 8)
_Q, _K, _V, _OUT, _SUM, _TO_OUT, _TO_Q, _TO_K, _TO_V = range(8, 17)


def usable(device: torch.device) -> bool:
    """Whether this device and this installation were measured to be exact."""
    return _frontend() and _is_hopper(device)


@lru_cache(maxsize=1)
def _frontend() -> bool:
    if find_spec("cudnn") is None:
        return False
    import cudnn

    return int(cudnn.backend_version()) >= NEEDED


@lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def find_sequences(found: Segments, device: torch.device) -> Sequences:
    """The segments of some rows; parents are not looked at."""
    order = np.argsort(-found.length, kind="stable")  # the longest first: the device is busy with them from the start
    number = max(1, len(order))
    table = np.zeros((2, _rounded(number, 8) + 1), dtype=np.int64)
    table[0, : len(order)], table[1, : len(order)] = found.start[order], found.length[order]
    covered = np.zeros(found.rows * found.capacity + 1, dtype=np.int64)
    np.add.at(covered, found.start, 1)
    np.add.at(covered, found.start + found.length, -1)
    gaps = np.flatnonzero(np.cumsum(covered[:-1]) == 0)
    starts, lengths = torch.from_numpy(table).to(device, non_blocking=True)
    return Sequences(
        starts,
        lengths[:-1].to(torch.int32).view(-1, 1, 1, 1),
        _rounded(int(found.length.max(initial=1)), 128),
        torch.from_numpy(gaps).to(device, non_blocking=True) if len(gaps) else None,
        {},
    )


def _rounded(value: int, least: int) -> int:
    """Up to a multiple of `least` with three significant bits: by a quarter at most."""
    steps = -(-value // least)
    unit = 1 << max(0, steps.bit_length() - 3)
    return -(-steps // unit) * unit * least


class CudnnJob:
    """What `attention_spans.by_job` runs, for rows without parents."""

    def __init__(self, sequences: Sequences, window: int, scale: float) -> None:
        self._sequences, self._window, self._scale = sequences, window, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Means [R, H, C, d] and the logs of the sums [R, H, C]; both 0 at slots without a segment."""
        q, k, v = by_slot(q), by_slot(k), by_slot(v)
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        self._run(False, {_Q: q, _K: k, _V: v, _OUT: out, _SUM: log_sum})
        self._clear(out, log_sum)
        return out.transpose(1, 2), log_sum.transpose(1, 2)

    def backward(self, to_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        q, k, v, out, to_out = by_slot(q), by_slot(k), by_slot(v), by_slot(out), by_slot(to_out)
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        log_sum = log_sum.transpose(1, 2).contiguous()
        tensors = {_Q: q, _K: k, _V: v, _OUT: out, _SUM: log_sum, _TO_OUT: to_out, _TO_Q: to_q, _TO_K: to_k, _TO_V: to_v}
        self._run(True, tensors)
        self._clear(to_q, to_k, to_v)
        return to_q.transpose(1, 2), to_k.transpose(1, 2), to_v.transpose(1, 2)

    def _run(self, back: bool, tensors: dict[int, Tensor]) -> None:
        q, sequences = tensors[_Q], self._sequences
        rows, slots, heads, size = q.shape
        groups, device = tensors[_K].shape[2], q.device
        number, at_slot = sequences.lengths.shape[0], (heads * size, groups * size, groups * size, heads * size, heads)
        graph = _graph(
            _Shape(device, q.dtype, number, sequences.longest, rows * slots, heads, groups, size, self._window, self._scale, back)
        )
        pack = {name: part.data_ptr() for name, part in tensors.items()}
        pack[_LENGTHS_Q] = pack[_LENGTHS_K] = sequences.lengths.data_ptr()
        for name, step in zip((_AT_Q, _AT_K, _AT_V, _AT_OUT, _AT_SUM), at_slot, strict=True):
            pack[name] = self._offsets(step).data_ptr()
        workspace = torch.empty(max(1, graph.workspace), dtype=torch.uint8, device=device)
        graph.run.execute(pack, workspace.data_ptr(), handle=_handle(device))

    def _offsets(self, step: int) -> Tensor:
        kept = self._sequences.offsets
        if step not in kept:
            kept[step] = (self._sequences.starts * step).to(torch.int32).view(-1, 1, 1, 1)
        return kept[step]

    def _clear(self, *parts: Tensor) -> None:
        """The kernels write at segments only."""
        if self._sequences.gaps is not None:
            for part in parts:
                part.view(-1, *part.shape[2:]).index_fill_(0, self._sequences.gaps, 0)


def by_slot(part: Tensor) -> Tensor:
    """[R, H, C, d] as [R, C, H, d] without gaps, copied only where heads of a slot don't lie side by side: other strides came out wrong."""
    return part.transpose(1, 2).contiguous()


def _handle(device: torch.device) -> Any:
    """This thread's handle for a device, set to its current stream."""
    import cudnn

    stream = torch.cuda.current_stream(device).cuda_stream
    kept: dict[torch.device, tuple[Any, int]] = _here.__dict__.setdefault("handles", {})
    if device not in kept:
        with torch.cuda.device(device):
            kept[device] = cudnn.create_handle(), -1
    handle, set_to = kept[device]
    if set_to != stream:
        cudnn.set_stream(handle=handle, stream=stream)
        kept[device] = handle, stream
    return handle


@lru_cache(maxsize=512)
def _graph(shape: _Shape) -> _Graph:
    import cudnn

    kind = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[shape.dtype]
    whole, real = cudnn.data_type.INT32, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=real, compute_data_type=real, handle=_handle(shape.device))
    ones = [1, 1, 1, 1]
    many, one_more = [shape.number, 1, 1, 1], [shape.number + 1, 1, 1, 1]
    lengths = [graph.tensor(dim=many, stride=ones, data_type=whole, uid=name) for name in (_LENGTHS_Q, _LENGTHS_K)]
    at = {name: graph.tensor(dim=one_more, stride=ones, data_type=whole, uid=name) for name in (_AT_Q, _AT_K, _AT_V, _AT_OUT, _AT_SUM)}

    def laid(heads: int, size: int, offsets: int) -> tuple[dict[str, list[int]], Any]:
        dim, stride = [shape.number, heads, shape.longest, size], [shape.longest * heads * size, size, heads * size, 1]
        return {"dim": dim, "stride": stride}, at[offsets]

    of_q, of_out = (laid(shape.heads, shape.size, offsets) for offsets in (_AT_Q, _AT_OUT))
    of_k, of_v = (laid(shape.groups, shape.size, offsets) for offsets in (_AT_K, _AT_V))
    inputs = {_Q: of_q, _K: of_k, _V: of_v}
    outputs = {_OUT: of_out, _SUM: laid(shape.heads, 1, _AT_SUM)}
    if shape.back:
        inputs |= outputs | {_TO_OUT: of_out}
        outputs = {_TO_Q: of_q, _TO_K: of_k, _TO_V: of_v}
    made = {
        name: graph.tensor(**how, data_type=real if name == _SUM else kind, ragged_offset=begins, uid=name)
        for name, (how, begins) in inputs.items()
    }
    for result, (name, (how, begins)) in zip(_attention(graph, made, lengths, shape), outputs.items(), strict=True):
        result.set_output(True).set_uid(name).set_dim(how["dim"]).set_stride(how["stride"]).set_ragged_offset(begins)
        result.set_data_type(real if name == _SUM else kind)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Graph(graph, int(graph.get_workspace_size()))


def _attention(graph: Any, made: dict[int, Any], lengths: list[Any], shape: _Shape) -> Any:
    """The attention node and its results: mean and log of the sum, or the gradients of queries, keys and values."""
    import cudnn

    options: dict[str, Any] = {"use_padding_mask": True, "seq_len_q": lengths[0], "seq_len_kv": lengths[1], "attn_scale": shape.scale}
    options |= {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
    if shape.window:
        options["diagonal_band_left_bound"] = shape.window
    if not shape.back:
        return graph.sdpa(q=made[_Q], k=made[_K], v=made[_V], generate_stats=True, **options)
    options |= {"max_total_seq_len_q": shape.slots, "max_total_seq_len_kv": shape.slots}
    return graph.sdpa_backward(q=made[_Q], k=made[_K], v=made[_V], o=made[_OUT], dO=made[_TO_OUT], stats=made[_SUM], **options)
