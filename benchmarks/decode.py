"""`decode`: the native engine's generation, several completions a prompt, against transformers' `generate` on the same weights.

Exactness first: the logprobs that the engine reports are those that the packed forward pass of training computes. Then whole calls
are timed in turn, prefill included. On a GPU the engine's decoding steps are replayed as CUDA graphs; the same engine with its steps
launched kernel by kernel runs beside it, so that the table says what replaying gives. The weights are random, so a completion ends
at its limit, for everybody.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as members of a run

import numpy as np
import torch
from harness import Timing, alternate, arguments, finish
from models import build, small
from rolecall.protocols.messages import Prompts, Samples
from rolecall.roles.base import Member
from rolecall.roles.reference import Reference
from rolecall.roles.rollout import Rollout
from rolecall.roles.rollout.engine import Engine

NAME = "SmolLM2-135M"  # the demo's size
PROMPTS, PER_PROMPT, PROMPT, NEW = 64, 8, 96, 64
QUICK = (4, 4, 24, 12)
CLOSE = {"float32": 2e-3, "bfloat16": 0.05}  # mean |gap| of a logprob; bfloat16 rounds the states of 30 layers
TIMES = 3.0  # transformers' time over ours


def prompts_of(number: int, size: int, vocab: int) -> Prompts:
    """Random prompts of one length, which begin alike for a third, as under a chat template."""
    rng = np.random.default_rng(0)
    start = rng.integers(300, vocab, size // 3)
    tokens = np.concatenate([np.concatenate([start, rng.integers(300, vocab, size - len(start))]) for _ in range(number)])
    return Prompts(
        keys=np.arange(number, dtype=np.int64),
        ids=tuple(f"p{unit}" for unit in range(number)),
        texts=("",) * number,
        tokens=tokens.astype(np.int32),
        cu_seqlens=np.arange(0, len(tokens) + 1, size, dtype=np.int64),
        tokenizer="",
    )


def member(device: str) -> Member:
    return Member(seed=0, device=device)


def gap(samples: Samples, path: str, dtype: str, device: str) -> float:
    """Mean distance of the engine's logprobs from those of the packed forward pass."""
    reference = Reference(path, dtype=dtype, row_tokens=2048)
    reference.setup(member(device))
    trained = samples.logprobs != 0
    found = float(np.abs(reference.logprobs(samples).logprobs[trained] - samples.logprobs[trained]).mean())
    reference.close()
    return found


def transformers(path: str, dtype: str, device: str, prompts: Prompts, per_prompt: int, new: int) -> Callable[[], object]:
    """`generate` with sampling, all completions at once."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    rows = torch.from_numpy(prompts.tokens.reshape(len(prompts.keys), -1).astype(np.int64)).to(device)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

    def run() -> object:
        found = net.generate(rows, attention_mask=torch.ones_like(rows), num_return_sequences=per_prompt, **options)
        return found.cpu()

    return run


def contenders(rollout: Rollout, prompts: Prompts, per_prompt: int, device: str) -> dict[str, Callable[[], object]]:
    """Ours, and on a GPU ours without graphs."""
    found = {"rolecall": lambda: rollout.generate(prompts, per_prompt=per_prompt)}
    if device == "cpu":
        return found
    replayed = rollout._engine
    launched = Engine(replayed._model, slots=0, ends=replayed._ends, record=lambda work: work)

    def one_by_one() -> object:
        rollout._engine = launched
        try:
            return rollout.generate(prompts, per_prompt=per_prompt)
        finally:
            rollout._engine = replayed

    return {**found, "rolecall, kernel by kernel": one_by_one}


def main() -> None:
    """Check, time and print."""
    options = arguments(__doc__ or "")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device != "cpu" else "float32"
    number, per_prompt, size, new = QUICK if options.quick else (PROMPTS, PER_PROMPT, PROMPT, NEW)
    with tempfile.TemporaryDirectory() as made:
        path = build(NAME, Path(made), dtype=dtype, **(small(NAME) if options.quick else {}))
        rollout = Rollout(path, dtype=dtype, max_tokens=new)
        rollout.setup(member(device))
        rollout._engine._ends = frozenset()  # all go to the limit
        prompts = prompts_of(number, size, rollout._model.spec.vocab)
        samples = rollout.generate(prompts, per_prompt=per_prompt)
        off = gap(samples, path, dtype, device)
        if not off < CLOSE[dtype]:
            raise SystemExit(f"logprobs are {off} from those of training: nothing is timed")
        peer = transformers(path, dtype, device, prompts, per_prompt, new)
        timings: dict[str, Timing] = alternate({**contenders(rollout, prompts, per_prompt, device), "transformers": peer}, options.rounds)
    tokens = number * per_prompt * new
    ratio = timings["transformers"].median / timings["rolecall"].median
    finish(
        bench="decode",
        workload=f"{NAME} with random weights, {dtype}: {number} prompts of {size} tokens x {per_prompt} completions of {new}",
        timings=timings,
        ours="rolecall",
        targets={f"at least {TIMES:g}x transformers": (ratio, ratio >= TIMES)},
        target=f"at least {TIMES:g} times transformers' generate",
        details={
            "mean distance of logprobs from training": float(f"{off:.2g}"),
            "tokens/s": {name: round(tokens / timing.median) for name, timing in timings.items()},
            "slots": rollout._engine.slots_for(size + new),
        },
        packages=("torch", "transformers"),
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
