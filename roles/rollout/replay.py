"""Decoding steps that are recorded once and replayed: on a GPU the hundreds of kernels of a step take longer to launch than to run.

A record is for a number of sequences and of columns. Both are rounded up, so that few records serve a run; what a step has too
many of are sequences that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel
from rolecall.roles.rollout.cache import BLOCK, SlotCache
from torch import Tensor

Work = Callable[[], Tensor]


def replayable(model: CausalModel) -> bool:
    """Whether its steps can be recorded: on a GPU, and nowhere does the host wait for a number."""
    spec = model.spec
    waits = spec.experts is not None or any(rope.by_length for rope in spec.ropes)
    return model.device.type == "cuda" and isinstance(model, NativeModel) and not waits


class CudaGraphs:
    """Records work as CUDA graphs that share their memory: what one replay returned is gone at the next.

    That memory is a pool which PyTorch takes no graph into any more once the last one has left it, and which it gives to nobody else
    either. So a small graph stays in the pool, and what others leave there serves those recorded later, in later runs too.

    Args:
        device: where the work is done, whichever device is the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stays: Work | None = None

    def __call__(self, work: Work) -> Work:
        """The same work on the same tensors, in one launch."""
        with torch.cuda.device(self._device):
            if self._stays is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._beside = torch.cuda.Stream()  # one for all records: memory of a pool serves the stream that it was made for
                self._stays = self._captured(lambda: torch.zeros(1, device=self._device))
            return self._captured(work)

    def _captured(self, work: Work) -> Work:
        graph, beside = torch.cuda.CUDAGraph(), self._beside
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may use the device meanwhile
            try:
                out = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(beside)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Steps:
    """The decoding steps of one run.

    Args:
        slots: most sequences of a step.
        spare: a column that is written anew whenever a slot is filled; sequences that nobody asks for write there.
        record: makes of work what does it again on the same tensors; what it returns may be gone at the next step.
        done: sequences and columns of steps that were done before, in earlier runs too: what kernels need at their first call is there.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: SlotCache,
        *,
        slots: int,
        spare: int,
        record: Callable[[Work], Work],
        done: set[tuple[int, int]],
    ) -> None:
        self._model, self._cache, self._spare, self._record, self._done = model, cache, spare, record, done
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._places = torch.full((slots,), spare, dtype=torch.int64, device=model.device)
        self._room = 0  # of the cache, when the records were made
        self._known: dict[tuple[int, int], Work] = {}  # by sequences and columns

    def __call__(self, tokens_A: Tensor, places: np.ndarray) -> Tensor:
        """Hidden states [A, D] of the newest tokens, valid until the next call.

        Args:
            tokens_A: int64.
            places: int64 [A], how many tokens each sequence holds already.
        """
        active, columns = len(places), self._cache.reach(int(places.max()) + 1, BLOCK)
        if self._cache.room != self._room:  # the cache lies elsewhere in memory now
            self._known.clear()
            self._room = self._cache.room
        size = len(self._tokens)
        while size // 2 >= active:
            size //= 2
        filled = np.full(size, self._spare)
        filled[:active] = places
        self._tokens[:active] = tokens_A
        self._places[:size] = torch.from_numpy(filled).to(self._places.device, non_blocking=True)
        return self._step(size, columns)[:active]

    def _step(self, size: int, columns: int) -> Tensor:
        def work() -> Tensor:
            places = self._places[:size]
            where = self._cache.step(places, columns)
            return self._model.hidden(self._tokens[:size, None], places[:, None], where, cache=self._cache)[:, 0]

        if (size, columns) not in self._done:
            self._done.add((size, columns))
            return work()
        if (size, columns) not in self._known:
            self._known[size, columns] = self._record(work)
        return self._known[size, columns]()
