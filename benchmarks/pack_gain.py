"""`pack_gain`: the same documents padded to the longest of each batch, and packed on the fly into rows; the time of whole training steps.

Lengths are lognormal(6.0, 1.5), 32768 at most. A batch of 8 such documents, padded, has 4.31 times as many slots as tokens, one of 16 has
6.43 times: what packing can gain where time follows the slots. Padded documents run through the same policy, model and kernels as packed
ones, as rows of their own batch; attention is causal over the whole row, the head is applied to documents alone. transformers (with Liger,
without which the head's logits fill the memory) takes the padded batches with its collator's mask, attention on real tokens alone as its
FlashAttention 2 does it, 16 documents at a time, and the same documents through its flattening collator.

On a CPU a tiny model takes documents of a shorter law.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from contenders import Contender, HuggingFace, Ours
from documents import Law, Rows, rows_of
from gpu import both
from harness import finish
from models import KNOWN, TINY, build, small
from race import chosen, clean, figures, look, measured, nearly, options, race, timings, work
from rolecall.kernels.losses import nll

MODEL, CAPACITY, SIZES = "Qwen3-0.6B", 32768, (8, 16)
ROWS, SHORT_ROWS = 1, 4  # of a lot, on a GPU and on a CPU
LAW, SHORT_LAW, SHORT_CAPACITY = Law(6.0, 1.5, CAPACITY), Law(3.5, 1.5, 512), 512
SLOTS = 32768  # of ours in one pass, padded or packed
PEER_SLOTS = (32768, 16384, 8192)  # of the peers, the first that fits; a row may be longer
OWN = "rolecall"
SHARE, HEADLINE = 0.95, 4.7  # of the ideal; the gain published for such a system at 16 documents
LOTS = 200  # lots of documents from which the one is taken that is padded most like the law
PACKAGES = ("rolecall", "torch", "triton", "transformers", "liger-kernel")


class Padded(Ours):
    """The policy on padded batches: one document a row, every row as long as the longest of its batch."""

    def __init__(self, name: str, about: str, model: str, *, size: int, slots: int, **settings: Any) -> None:
        super().__init__(name, about, model, **settings)
        self.size, self.slots = size, slots

    def step(self, rows: Rows) -> None:
        for batch in self._batches(rows):
            self.policy.rows_per_pass = max(1, self.slots // batch.capacity)
            self.policy.accumulate(batch, loss=nll)
        self._update()

    def loss_and_norm(self, rows: Rows) -> tuple[float, float]:
        total = 0.0
        for batch in self._batches(rows):
            total += self.policy.accumulate(batch, loss=nll).sums["loss"][0]
        return total, self._norm()

    def _batches(self, rows: Rows) -> list[Any]:
        if id(rows) not in self._ready:
            flat = rows.shuffled
            parts = [flat[start : start + self.size] for start in range(0, len(flat), self.size)]
            self._ready[id(rows)] = (rows, [padded_rows(part, rows.trained) for part in parts])
        return self._ready[id(rows)][1]


def padded_rows(documents: list[np.ndarray], trained: int) -> Any:
    """A batch of ours in which each document has a row for itself, and its segment reaches to the end of the row."""
    width = max(map(len, documents))
    longer = Rows([[np.pad(each, (0, width - len(each)))] for each in documents], width)
    batch = longer.packed()
    kept = np.concatenate([np.arange(width - 1) < len(each) - 1 for each in documents])
    flat = {name: getattr(batch, name)[kept] for name in ("sources", "targets", "samples")}
    return msgspec.structs.replace(batch, weights=np.full(int(kept.sum()), 1 / trained, np.float32), **flat)


def padding(rows: Rows, size: int) -> float:
    """Slots over tokens when the documents are padded, so many at a time, as they come."""
    sizes = np.array([len(each) for each in rows.shuffled])
    return sum(len(part) * int(part.max()) for part in np.split(sizes, range(size, len(sizes), size))) / int(sizes.sum())


def ideal(law: Law, size: int, number: int = 1_000_000) -> float:
    """The same for the law itself: 8 documents of lognormal(6.0, 1.5) 4.31, 16 documents 6.43."""
    sizes = law.draw(np.random.default_rng(0), number // size * size).reshape(-1, size)
    return float(size * sizes.max(axis=1).sum() / sizes.sum())


def typical(law: Law, rows: int, capacity: int, vocab: int) -> Rows:
    """Rows packed on the fly: of a long stream the neighbours whose documents, padded, come nearest to the law's padding for all sizes."""
    wanted = {size: ideal(law, size) for size in SIZES}
    stream = rows_of(law, rows * LOTS, capacity, vocab, seed=0).documents
    found = [Rows(stream[start : start + rows], capacity) for start in range(0, len(stream), rows)]
    return min(found, key=lambda lot: max(abs(padding(lot, size) / want - 1) for size, want in wanted.items()))


def makers(model: str, device: str, attention: str, slots: int, dtype: str, speed: dict[str, Any]) -> dict[str, Callable[[], Contender]]:
    """Packed and padded, ours and the peers."""
    peer = partial(HuggingFace, model=model, attention=attention, device=device, dtype=dtype, liger=device != "cpu")
    mine = {"device": device, "dtype": dtype, **speed}
    passes = tuple(each for each in PEER_SLOTS if each <= slots) or (slots,)
    found: dict[str, Callable[[], Contender]] = {
        OWN: partial(Ours, OWN, f"packed on the fly into rows of {slots}", model, rows_per_pass=1, **mine)
    }
    for size in SIZES:
        name = f"{OWN}, padded by {size}"
        found[name] = partial(Padded, name, f"{size} documents padded to their longest", model, size=size, slots=slots, **mine)
    name = "transformers, flattened"
    found[name] = partial(peer, name, "flattening collator", form=partial(flattened, size=SIZES[-1]), micro=passes)
    name = f"transformers, padded by {SIZES[-1]}"
    found[name] = partial(peer, name, f"padding collator, {SIZES[-1]} documents", form=partial(padded, size=SIZES[-1]), micro=passes)
    return found


def flattened(rows: Rows, slots: int, size: int) -> list[dict[str, Any]]:
    """Batches of `size` documents through transformers' flattening collator, cut where they have more slots than fit."""
    parts: list[list[np.ndarray]] = []
    for number, each in enumerate(rows.shuffled):
        if number % size == 0 or sum(map(len, parts[-1])) + len(each) > slots:
            parts.append([])
        parts[-1].append(each)
    return [Rows([part], 0).flattened(1)[0] for part in parts]


def padded(rows: Rows, slots: int, size: int) -> list[dict[str, Any]]:
    """Batches of `size` documents padded together, cut between rows where they have more slots than fit."""
    found = []
    for batch in rows.padded(size):
        number, width = batch["input_ids"].shape
        each = max(1, slots // width)
        found += [{name: values[start : start + each] for name, values in batch.items()} for start in range(0, number, each)]
    return found


def measure(args: argparse.Namespace, model: str, device: str, attention: str) -> None:
    """The race, the table and the JSON line."""
    on_gpu = device != "cpu"
    law, rows, capacity = (LAW, ROWS, CAPACITY) if on_gpu and not args.tiny else (SHORT_LAW, SHORT_ROWS, SHORT_CAPACITY)
    lot = typical(law, rows, capacity, TINY["vocab_size"] if args.tiny or not on_gpu else KNOWN[MODEL]["vocab_size"])
    speed = {"compile": True} if on_gpu else {}
    entrants = chosen(makers(model, device, attention, min(capacity, SLOTS), "bfloat16" if on_gpu else "float32", speed), args.only)
    if args.look:
        look(next(iter(entrants.values())), [lot], work([lot], model))
        return
    before, missing, until = measured(), dict[str, str](), time.monotonic() + args.seconds
    results = race(entrants, [lot], rounds=args.rounds, steps=dict.fromkeys(entrants, 1), missing=missing, until=until)
    rate = both(before, measured())
    near, targets = nearly(results, OWN)
    tokens, flops = work([lot], model)
    columns, took = figures(results, tokens, flops, rate.matmul), {name: found.median for name, found in timings(results).items()}
    gains = {}
    for size in SIZES:
        own, theirs, bound = f"{OWN}, padded by {size}", f"transformers, padded by {size}", padding(lot, size)
        gains[f"slots a token, padded by {size}"], gains[f"the same for the law, {size}"] = round(bound, 2), round(ideal(law, size), 2)
        if theirs in took and "transformers, flattened" in took:
            gains[f"gain of transformers by flattening, {size}"] = round(took[theirs] / took["transformers, flattened"], 2)
        if own in took:
            gain = took[own] / took[OWN]
            targets[f"{size} documents: at least {SHARE:g} of the {bound:.2f} times fewer slots"] = (gain / bound, gain >= SHARE * bound)
            if size == SIZES[-1] and on_gpu:
                targets[f"{size} documents: more than {HEADLINE}x padded"] = (gain, gain > HEADLINE)
    stream = rows_of(LAW, LOTS, CAPACITY, TINY["vocab_size"], seed=1)
    for size in SIZES:  # of the law itself, whatever was timed
        bound, packed = ideal(LAW, size), len(stream.documents) * CAPACITY / stream.tokens
        gains[f"{LAW} packed on the fly, {size}: times fewer slots"] = round(bound / packed, 3)
    finish(
        bench="pack_gain",
        workload=f"{MODEL if on_gpu and not args.tiny else 'a tiny model'}, {len(lot.lengths)} documents of {law}, {lot.tokens} tokens: "
        "forward, backward, AdamW",
        timings=timings(results),
        ours=OWN,
        targets=targets,
        target="; ".join(targets),
        limit=rate.milliseconds(flops),
        missing=missing,
        details={**columns, **rate.details(), **gains, "rows are full to": round(lot.tokens / (len(lot.documents) * lot.capacity), 4),
                 **near, "about": {name: result.about for name, result in results.items()}},
        packages=PACKAGES,
        quick=args.tiny,
        out=args.out,
    )  # fmt: skip


def main() -> None:
    """Build the model, then look or measure."""
    args = options(__doc__ or "").parse_args()
    device, attention = ("cuda:0", "varlen") if torch.cuda.is_available() else ("cpu", "sdpa")
    tiny = args.tiny or device == "cpu"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as aside:
        model = build(
            MODEL, Path(aside), device=device, dtype="float32" if device == "cpu" else "bfloat16", **(small(MODEL) if tiny else {})
        )
        clean()
        measure(args, model, device, attention)


if __name__ == "__main__":
    main()
