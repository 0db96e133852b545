"""What a model computes on given sequences, layer by layer: alone, packed and cached, and by transformers itself.

n tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from rolecall.kernels.attention import Dense, Packed
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.rollout.cache import PrefillCache, SlotCache
from torch import Tensor, nn

Slots = Iterable[tuple[int, int, int, int]]  # row and column of a pass, number of the sequence and place in it
STEPS = 8  # tokens of a sequence that are decoded one by one
PARTS = {"attention": ("attention", "self_attn", "attn"), "mlp": ("mlp", "feed_forward")}  # our name → what classes call it


@dataclass
class Trace:
    """What was computed for one sequence, float32 on the CPU."""

    logits: Tensor  # [n, V]
    states: dict[str, Tensor] = field(default_factory=dict)  # "embed", "blocks.0.attention", … in order → [n, D]


class Recorder:
    """Keeps the outputs of embedding, blocks and their parts of the last pass; a context manager."""

    def __init__(self, net: Any) -> None:
        self._stack, self.last = ExitStack(), dict[str, Tensor]()
        base = getattr(net, "base_model", net)
        blocks: Any = next((part for part in base.children() if isinstance(part, nn.ModuleList)), [])
        named = {"embed": getattr(net, "embed", None) or net.get_input_embeddings()}
        for number, block in enumerate(blocks):
            for ours, names in PARTS.items():
                named[f"blocks.{number}.{ours}"] = next(
                    (found for name in names if (found := getattr(block, name, None)) is not None), None
                )
            named[f"blocks.{number}"] = block
        for name, module in named.items():
            if module is not None:
                self._stack.enter_context(_hooked(module, self.last, name))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, traces: Sequence[Trace], logits: Tensor, slots: Slots) -> None:
        """Sort the last pass into traces; `logits` are [R, C, V]."""
        for row, column, sequence, place in slots:
            trace = traces[sequence]
            trace.logits[place] = logits[row, column].float().cpu()
            for name, states in self.last.items():
                if states.shape[:2] != logits.shape[:2]:  # a class that computes segments one by one
                    continue
                if name not in trace.states:
                    trace.states[name] = torch.zeros(len(trace.logits), states.shape[-1])
                trace.states[name][place] = states[row, column].float().cpu()
        self.last.clear()


def _hooked(module: nn.Module, last: dict[str, Tensor], name: str) -> Any:
    """A context in which a module's output is kept."""

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        last[name] = out[0] if isinstance(out, tuple) else out

    handle = module.register_forward_hook(keep)
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack


def empty_traces(sequences: Sequence[Tensor], vocab: int) -> list[Trace]:
    """Traces to be filled."""
    return [Trace(torch.zeros(len(tokens), vocab)) for tokens in sequences]


@torch.no_grad()
def by_transformers(net: Any, sequences: Sequence[Tensor]) -> list[Trace]:
    """Each sequence alone through a transformers model, without mask or cache."""
    device = net.get_input_embeddings().weight.device
    traces: list[Trace] = []
    with Recorder(net) as recorder:
        for number, tokens in enumerate(sequences):
            logits = net(input_ids=tokens[None].to(device), use_cache=False).logits
            traces += empty_traces([tokens], logits.shape[-1])
            recorder.keep(traces, logits, ((0, place, number, place) for place in range(len(tokens))))
    return traces


@torch.no_grad()
def single(model: CausalModel, sequences: Sequence[Tensor]) -> list[Trace]:
    """Each sequence in a row of its own."""
    traces = empty_traces(sequences, model.spec.vocab)
    with Recorder(model.net) as recorder:
        for number, tokens in enumerate(sequences):
            places = torch.arange(len(tokens))[None]
            where = Packed(places * 0, torch.tensor([-1]), places)
            _run(model, recorder, traces, tokens[None], where, [(0, place, number, place) for place in range(len(tokens))])
    return traces


@torch.no_grad()
def packed(model: CausalModel, sequences: Sequence[Tensor]) -> list[Trace]:
    """All sequences in one row, with a gap at its end; of two that begin alike, the beginning is computed once.

    The last sequence must begin as the one before it does.
    """
    alike = _alike(sequences[-2], sequences[-1])
    parts = [(number, 0, len(tokens), -1) for number, tokens in enumerate(sequences[:-2])]  # sequence, from, to, parent
    parts += [(len(sequences) - 2, 0, alike, -1)]
    parts += [(number, alike, len(sequences[number]), len(sequences) - 2) for number in (len(sequences) - 2, len(sequences) - 1)]
    slots = [(number, place, segment) for segment, (number, start, end, _) in enumerate(parts) for place in range(start, end)]
    pad = 3
    tokens = torch.tensor([int(sequences[number][place]) for number, place, _ in slots] + [0] * pad)[None]
    places = torch.tensor([place for _, place, _ in slots] + [0] * pad)[None]
    segments = torch.tensor([segment for _, _, segment in slots] + [-1] * pad)[None]
    where = Packed(segments, torch.tensor([parent for *_, parent in parts]), places)
    traces = empty_traces(sequences, model.spec.vocab)
    with Recorder(model.net) as recorder:
        taken = [(0, column, number, place) for column, (number, place, _) in enumerate(slots)]
        taken += [
            (0, column, len(sequences) - 1, place) for column, (number, place, segment) in enumerate(slots) if segment == len(sequences) - 2
        ]
        _run(model, recorder, traces, tokens, where, taken)
    return traces


@torch.no_grad()
def cached(model: CausalModel, sequences: Sequence[Tensor]) -> list[Trace]:
    """Each sequence but its last tokens prefilled, these then decoded one by one, all sequences together in slots."""
    traces, spec, device = empty_traces(sequences, model.spec.vocab), model.spec, model.device
    starts = [max(1, len(tokens) - STEPS) for tokens in sequences]
    sizes = {"layers": spec.layers, "heads": spec.kv_heads, "size": spec.head_dim}
    cache = SlotCache(**sizes, slots=len(sequences), longest=max(map(len, sequences)), dtype=model.dtype, device=device)
    nothing = model.head.new_zeros((spec.layers, 2, spec.kv_heads, 0, spec.head_dim))
    with Recorder(model.net) as recorder:
        for number, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
            places, caught = torch.arange(start)[None], PrefillCache(nothing)
            where = Dense((places[0, :, None] >= places[0])[None, None].to(device), places.to(device), places.to(device))
            _run(model, recorder, traces, tokens[None, :start], where, [(0, place, number, place) for place in range(start)], caught)
            cache.fill(number, 1, 0, caught.whole())
        for step in range(max(len(tokens) - start for tokens, start in zip(sequences, starts, strict=True))):
            places = torch.tensor([min(start + step, len(tokens) - 1) for tokens, start in zip(sequences, starts, strict=True)])
            newest = torch.stack([tokens[place] for tokens, place in zip(sequences, places.tolist(), strict=True)])[:, None]
            going = [number for number, start in enumerate(starts) if start + step < len(sequences[number])]
            where = cache.step(places.to(device), cache.reach(int(places.max()) + 1))
            _run(model, recorder, traces, newest, where, [(number, 0, number, int(places[number])) for number in going], cache)
    return traces


def _run(model: CausalModel, recorder: Recorder, traces: list[Trace], tokens: Tensor, where: Any, slots: Slots, cache: Any = None) -> None:
    """One pass, sorted into traces."""
    states = model.hidden(tokens.to(model.device), where.positions.to(model.device), where, cache)
    recorder.keep(traces, model.logits(states), slots)


def _alike(first: Tensor, second: Tensor) -> int:
    """How many tokens two sequences begin with that are the same; each keeps one of its own."""
    size = min(len(first), len(second)) - 1
    differ = (first[:size] != second[:size]).nonzero()
    return int(differ[0]) if len(differ) else size
