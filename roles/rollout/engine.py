"""The native engine: continuous batching over a slot cache, one prefill a prompt however many completions it gets.

Shape letters: A active sequences, C tokens of a packed row, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from rolecall.kernels.attention import Dense, packed_mask
from rolecall.protocols.messages import Samples
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.rollout.cache import PrefillCache, SlotCache
from rolecall.roles.rollout.replay import CudaGraphs, Steps, Work, replayable
from rolecall.roles.rollout.sampling import Sampling, choose, uniforms
from torch import Tensor

ROW_TOKENS = {"cpu": 512, "cuda": 4096}  # prompts prefilled in one row; attention within a row is quadratic in this
SLOTS = {"cpu": 64, "cuda": 512}  # a step of a GPU takes hardly longer for hundreds of sequences than for one
SHARE = 4  # one part in so many of a GPU's free memory is for the cache, where nobody says how many slots
STOP, LENGTH = Samples.FINISH.index("stop"), Samples.FINISH.index("length")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the completions wanted of it."""

    tokens: np.ndarray  # int32, at least one
    seeds: tuple[int, ...]  # one of 64 bits a completion
    limit: int  # most tokens of a completion, at least 1


@dataclass(slots=True)
class Completion:
    """What became of one sequence; `tokens` include the one that ended it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: int = LENGTH


@dataclass(slots=True)
class _Ready:
    """A prefilled prompt of which some completions have no slot yet."""

    request: Request
    waiting: deque[tuple[int, Completion]]  # seed and where the answer goes
    cache: Tensor  # [layers, 2, heads, tokens after the shared ones, size]
    hidden: Tensor  # [D] of the last token


@dataclass(slots=True)
class _Active:
    """A sequence in a slot."""

    request: Request
    seed: int
    answer: Completion

    @property
    def length(self) -> int:
        """Tokens so far, the newest (not yet in the cache) included."""
        return len(self.request.tokens) + len(self.answer.tokens)


class Engine:
    """Generates with `model`, at most `slots` sequences at once. Holds no keys or values between two runs.

    Args:
        slots: 0 for as many as the device is quick with and has memory for.
        ends: token ids that end a completion.
        record: how decoding steps are recorded to be replayed; None for CUDA graphs where they can be had.
    """

    def __init__(self, model: CausalModel, *, slots: int, ends: frozenset[int], record: Callable[[Work], Work] | None = None) -> None:
        self._model, self._slots, self._ends = model, slots, ends
        self._device = model.device
        self._record = record or (CudaGraphs(self._device) if replayable(model) else None)
        row = ROW_TOKENS[self._device.type]
        self.row_tokens = min(row, model.longest or row)
        self._done: set[tuple[int, int]] = set()  # shapes of decoding steps, all runs
        self.prefilled = 0  # prompt tokens computed, all runs
        self.steps = 0  # decode forwards, all runs

    def slots_for(self, longest: int) -> int:
        """Most sequences at once, if none comes to more than `longest` tokens."""
        spec, most = self._model.spec, SLOTS[self._device.type]
        if self._slots or self._device.type == "cpu":
            return self._slots or most
        each = 2 * spec.layers * spec.kv_heads * spec.head_dim * self._model.dtype.itemsize * longest
        # What PyTorch holds and nobody uses, as the cache of the run before, is free too: else the next run would have fewer slots.
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(1, min(most, (torch.cuda.mem_get_info(self._device)[0] + unused) // SHARE // each))

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], sampling: Sampling, stopped: Callable[[list[int]], bool] | None = None
    ) -> list[list[Completion]]:
        """Completions of each request, in order.

        Args:
            stopped: told the tokens of a completion after each new one; says whether that one ends it.
        """
        answers = [[Completion() for _ in request.seeds] for request in requests]
        queue = deque(
            (request, deque(zip(request.seeds, own, strict=True))) for request, own in zip(requests, answers, strict=True) if request.seeds
        )
        if queue:
            _Run(self, queue, sampling, stopped).finish()
        return answers


class _Run:
    """The state of one call: what waits, what is prefilled, what is active (its index is its slot)."""

    def __init__(
        self,
        engine: Engine,
        queue: deque[tuple[Request, deque[tuple[int, Completion]]]],
        sampling: Sampling,
        stopped: Callable[[list[int]], bool] | None,
    ) -> None:
        model, wanted = engine._model, sum(len(waiting) for _, waiting in queue)
        self._engine, self._model, self._device = engine, model, engine._device
        self._queue, self._sampling, self._stopped = queue, sampling, stopped
        longest = max(len(request.tokens) + request.limit for request, _ in queue)
        self._slots = min(engine.slots_for(longest), wanted)
        self._ready: deque[_Ready] = deque()
        self._active: list[_Active] = []
        spec = model.spec
        self._shared = self._beginning([request.tokens for request, _ in queue])  # how many tokens all prompts begin with
        self._before = model.head.new_zeros((spec.layers, 2, spec.kv_heads, 0, spec.head_dim))  # their keys and values
        self._cache = SlotCache(
            layers=spec.layers,
            slots=self._slots,
            heads=spec.kv_heads,
            size=spec.head_dim,
            longest=longest,
            dtype=model.dtype,
            device=self._device,
        )
        self._steps: Steps | None = None
        if engine._record is not None:
            self._steps = Steps(model, self._cache, slots=self._slots, spare=self._shared, record=engine._record, done=engine._done)

    def finish(self) -> None:
        """Run until every completion is made: admit, sample, let go of what ended, compute the next token of the rest."""
        hidden = self._model.head.new_empty((0, self._model.head.shape[1]))
        if self._shared:
            self._before, _ = self._forward([self._queue[0][0].tokens[: self._shared]])
            self._cache.fill(0, self._slots, 0, self._before)  # once: nothing ever writes over these columns
        while self._queue or self._ready or self._active:
            hidden = torch.cat([hidden, *self._admit()])
            tokens, logprobs = self._sample(hidden)
            known = torch.stack((tokens.double(), logprobs.double())).cpu().numpy()  # the step's one wait for the device
            kept = self._record(known[0].astype(np.int64).tolist(), known[1].tolist())
            if len(kept) < len(self._active):
                tokens = tokens[self._compact(kept)]
            hidden = self._decode(tokens) if self._active else hidden[:0]

    def _admit(self) -> list[Tensor]:
        """Fill free slots; returns the last hidden states [n, D] of the sequences that got one."""
        free = self._slots - len(self._active)
        if self._active and free < max(1, self._slots // 8):
            return []  # a prefill stops all others for its time: wait till it serves several
        fresh = []
        while free and (self._ready or self._queue):
            if not self._ready:
                self._prefill(free)
            ready = self._ready[0]
            count = min(free, len(ready.waiting))
            self._cache.fill(len(self._active), count, self._shared, ready.cache)
            for _ in range(count):
                seed, answer = ready.waiting.popleft()
                self._active.append(_Active(ready.request, seed, answer))
            fresh.append(ready.hidden.expand(count, -1))
            free -= count
            if not ready.waiting:
                self._ready.popleft()
        return fresh

    def _beginning(self, prompts: list[np.ndarray]) -> int:
        """How many first tokens to compute once for all prompts, as of a chat template: 0 where it saves too little."""
        alike = min(len(tokens) for tokens in prompts) - 1  # each keeps a token of its own, whose hidden state is wanted
        for tokens in prompts[1:]:
            differ = np.flatnonzero(tokens[:alike] != prompts[0][:alike])
            alike = int(differ[0]) if len(differ) else alike
        return alike if alike * (len(prompts) - 1) >= self._engine.row_tokens // 8 else 0

    def _prefill(self, free: int) -> None:
        """Compute waiting prompts in one packed row: as many as the free slots and the row take, one at least."""
        chosen: list[tuple[Request, deque[tuple[int, Completion]]]] = []
        size = self._shared
        while self._queue and (not chosen or free > 0):
            request, waiting = self._queue[0]
            size += len(request.tokens) - self._shared
            if chosen and size > self._engine.row_tokens:
                break
            chosen.append(self._queue.popleft())
            free -= len(waiting)
        rows = [request.tokens[self._shared :] for request, _ in chosen]
        whole, hidden = self._forward(rows)
        ends = np.cumsum([len(row) for row in rows]).tolist()
        for (request, waiting), row, end in zip(chosen, rows, ends, strict=True):
            self._ready.append(_Ready(request, waiting, whole[:, :, :, end - len(row) : end], hidden[end - 1]))

    def _forward(self, rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, 2, heads, C, size] and hidden states [C, D] of sequences that each follow `self._before`."""
        before = self._before.shape[3]
        lengths = np.array([len(row) for row in rows])
        starts = np.repeat(lengths.cumsum() - lengths, lengths)
        tokens = self._put(np.concatenate(rows).astype(np.int64))
        positions = self._put(np.arange(len(starts)) - starts + before)
        own = packed_mask(self._put(np.repeat(np.arange(len(rows)), lengths))[None], self._put(np.full(len(rows), -1)))
        mask = torch.cat((own.new_ones((1, 1, len(starts), before)), own), dim=3)
        keys = torch.cat((torch.arange(before, device=self._device), positions))
        caught = PrefillCache(self._before)
        hidden = self._model.hidden(tokens[None], positions[None], Dense(mask, positions[None], keys[None]), cache=caught)[0]
        self._engine.prefilled += len(starts)
        return caught.whole(), hidden

    def _sample(self, hidden_AD: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens [A] and their logprobs [A]; logits are float32 whatever the model's dtype, as in the trainer."""
        head = self._model.head
        if head.dtype == torch.float32:
            logits = hidden_AD @ head.T
        elif head.is_cuda:
            logits = torch.mm(hidden_AD, head.T, out_dtype=torch.float32)
        else:
            logits = hidden_AD.float() @ head.float().T
        seeds = np.array([one.seed for one in self._active], dtype=np.uint64)
        drawn = uniforms(seeds, np.array([len(one.answer.tokens) for one in self._active]))
        spec = self._model.spec
        if spec.logit_scale != 1.0:
            logits = logits.mul_(spec.logit_scale)
        if spec.logit_softcap:
            logits = logits.div_(spec.logit_softcap).tanh_().mul_(spec.logit_softcap)
        return choose(logits[:, : spec.vocab], self._sampling, self._put(drawn))

    def _record(self, tokens: list[int], logprobs: list[float]) -> list[int]:
        """Write the new tokens down; returns the slots that go on."""
        kept = []
        for slot, (one, token, logprob) in enumerate(zip(self._active, tokens, logprobs, strict=True)):
            one.answer.tokens.append(token)
            one.answer.logprobs.append(logprob)
            if token in self._engine._ends or (self._stopped is not None and self._stopped(one.answer.tokens)):
                one.answer.finish = STOP
            elif len(one.answer.tokens) < one.request.limit:
                kept.append(slot)
        return kept

    def _compact(self, kept: list[int]) -> Tensor:
        """Move the last sequences into the slots that fell free; returns the old slot of each new one, int64."""
        holes = sorted(set(range(len(kept))).difference(kept))
        tails = [slot for slot in kept if slot >= len(kept)]
        order = list(range(len(kept)))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        if holes:
            self._cache.move(tails, holes, max(self._active[slot].length for slot in tails) - 1)
        self._active = [self._active[slot] for slot in order]
        return self._put(np.array(order, dtype=np.int64))

    def _decode(self, tokens_A: Tensor) -> Tensor:
        """One forward of the newest token of each active sequence: hidden states [A, D]."""
        places = np.array([one.length - 1 for one in self._active])
        self._engine.steps += 1
        if self._steps is not None:
            return self._steps(tokens_A, places)
        positions = self._put(places)
        where = self._cache.step(positions, self._cache.reach(int(places.max()) + 1))
        return self._model.hidden(tokens_A[:, None], positions[:, None], where, cache=self._cache)[:, 0]

    def _put(self, array: np.ndarray) -> Tensor:
        # Not pinned: CUDA has read it when the call returns, so it may go. Only the device's part of the copy is not waited for.
        return torch.from_numpy(array).to(self._device, non_blocking=True)
