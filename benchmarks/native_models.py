"""Our model definitions against Hugging Face's classes behind the same seam, on the same weights: a training step and a decode step.

Exactness first: the same logprobs. Then, in turn: forward and backward of one packed row (prompts with completions that share
them, as the demo trains on), and one decode forward of 32 sequences over their caches. On a CPU by the time of one thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as members of a demo run

import numpy as np
import torch
from harness import alternate, arguments, finish
from models import build, small
from rolecall.kernels.attention import Dense
from rolecall.protocols.messages import PackedBatch, Samples
from rolecall.roles.models import load
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.packed import packed_logprobs
from rolecall.roles.packing import pack_samples
from rolecall.roles.rollout.cache import SlotCache

CLOSE = 2e-3  # logprobs in float32 through 30 layers, sums in another order
ACTIVE, HELD = 32, 100  # sequences in a decode step, tokens that each has in the cache


def samples(prompts: int, per_prompt: int, prompt: int, completion: int, vocab: int) -> Samples:
    """Random samples of one length, like the demo's."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(prompts):
        start = rng.integers(4, vocab, prompt)
        rows += [np.concatenate([start, rng.integers(4, vocab, completion)]) for _ in range(per_prompt)]
    number = prompts * per_prompt
    return Samples(
        keys=np.arange(prompts, dtype=np.int64),
        ids=tuple(f"p{unit}" for unit in range(prompts)),
        texts=("",) * prompts,
        counts=np.full(prompts, per_prompt, dtype=np.int32),
        tokens=np.concatenate(rows).astype(np.int32),
        logprobs=np.tile(np.repeat([0.0, -1.0], [prompt, completion]), number).astype(np.float32),
        cu_seqlens=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        prompt_lengths=np.full(number, prompt, dtype=np.int32),
        siblings=np.tile(np.arange(per_prompt, dtype=np.int32), prompts),
        finish=np.zeros(number, dtype=np.uint8),
        completions=("",) * number,
        span_starts=np.zeros(1, dtype=np.int64),
        span_versions=np.zeros(1, dtype=np.int64),
        temperature=1.0,
    )


def training(model: CausalModel, batch: PackedBatch) -> Callable[[], None]:
    """Forward and backward; gradients are dropped afterwards."""

    def step() -> None:
        logprobs, _ = packed_logprobs(model, batch)
        logprobs.sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def decoding(model: CausalModel) -> Callable[[], object]:
    """One token of each active sequence; the cache stays at the same length."""
    spec, device = model.spec, model.device
    shape = {"layers": spec.layers, "slots": ACTIVE, "heads": spec.kv_heads, "size": spec.head_dim, "longest": HELD + 1}
    cache = SlotCache(**shape, dtype=model.dtype, device=device)
    tokens = torch.arange(4, 4 + ACTIVE, device=device)[:, None]
    places = torch.full((ACTIVE,), HELD, device=device)

    @torch.inference_mode()
    def step() -> object:
        where: Dense = cache.step(places, cache.reach(HELD + 1))
        return model.hidden(tokens, places[:, None], where, cache=cache)

    return step


def share(ours: CausalModel, theirs: CausalModel) -> None:
    """Let both models use the same memory for their weights."""
    tensors = ours.named_tensors()
    for name, parameter in theirs.net.named_parameters():
        parameter.data = tensors[name]


def main() -> None:
    """Time both and print the result."""
    folder = next((Path(value) for option, value in zip(sys.argv, sys.argv[1:], strict=False) if option == "--model"), None)
    if folder is not None:
        place = sys.argv.index("--model")
        del sys.argv[place : place + 2]
    options = arguments("Our model definitions against Hugging Face's classes.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        changes = small("SmolLM2-135M") if options.quick else {}
        path = str(folder or build("SmolLM2-135M", Path(made), dtype="float32", **changes))
        ours, theirs = load(path), load(path, native=False)
    share(ours, theirs)
    data = samples(4, 8, 45, 12, ours.spec.vocab)
    batch = pack_samples(data, np.ones(32), np.full(32, 0.01), capacity=640)
    with torch.no_grad():
        gap = float((packed_logprobs(ours, batch)[0] - packed_logprobs(theirs, batch)[0]).abs().max())
    if not gap < CLOSE:
        raise SystemExit(f"logprobs differ by {gap}: nothing is timed")
    clock = time.process_time if ours.device.type == "cpu" else time.perf_counter  # one thread, however busy the machine is
    train = alternate({"ours": training(ours, batch), "hugging face": training(theirs, batch)}, options.rounds, clock)
    decode = alternate({"ours": decoding(ours), "hugging face": decoding(theirs)}, options.rounds, clock)
    ratio = {name: found["hugging face"].median / found["ours"].median for name, found in (("training", train), ("decoding", decode))}
    finish(
        bench="native_models",
        workload=f"{ours.spec.layers} layers of {ours.spec.hidden}, one thread; {len(batch.tokens)} slots; decoding {ACTIVE} x {HELD}",
        timings=train,
        ours="ours",
        targets={f"{name}: Hugging Face's time over ours": (value, value >= 1.0) for name, value in ratio.items()},
        target="not slower than Hugging Face's classes",
        details={"decode_ms": {name: timing.median * 1e3 for name, timing in decode.items()}, "logprob_gap": gap},
        packages=("torch", "transformers"),
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
