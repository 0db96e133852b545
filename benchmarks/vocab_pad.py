"""`vocab_pad`: what a vocabulary of an odd size costs, forward and backward through the head, and what is left of it with ours.

Plain is whole logits by torch (hidden @ head.T, log-softmax, backward), with the head at the odd size and at the next multiple of 64;
ours is `linear_cross_entropy` with the head at the odd size, padded to that multiple (`vocab` says the true size), and with all rows real.
"""

from __future__ import annotations

from collections.abc import Callable

import gpu
import torch
from harness import arguments, finish
from rolecall.kernels.cross_entropy import linear_cross_entropy
from torch import Tensor

VOCABULARIES = (151939, 128003, 262147)
SHAPE, QUICK = (8192, 1024), (2048, 512)
MULTIPLE = 64
TIMES = 1.01
SAME = 1e-6  # loss with padding rows against the loss without: float32 sums in another order


def plain(hidden: Tensor, head: Tensor, targets: Tensor, vocab: int) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")


def ours(hidden: Tensor, head: Tensor, targets: Tensor, vocab: int) -> Tensor:
    return linear_cross_entropy(hidden, head, targets, vocab=vocab)


def step(loss: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor, vocab: int) -> Callable[[], None]:
    def run() -> None:
        hidden.grad = head.grad = None
        loss(hidden, head, targets, vocab).backward()

    return run


def main() -> None:
    options = arguments(__doc__ or "")
    gpu.require_gpu()
    torch.manual_seed(0)
    tokens, depth = QUICK if options.quick else SHAPE
    before = gpu.rates()
    hidden = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results, cliffs, padded = {}, {}, {}
    missing: dict[str, str] = {}
    for vocab in VOCABULARIES[:1] if options.quick else VOCABULARIES:
        aligned = -(-vocab // MULTIPLE) * MULTIPLE
        table = (torch.randn(aligned, depth, device="cuda") * (3 / depth**0.5)).to(torch.bfloat16)
        odd, full = table[:vocab].clone().requires_grad_(), table.requires_grad_()
        targets = torch.randint(0, vocab, (tokens,), device="cuda")
        with torch.no_grad():
            losses = [float(ours(hidden, head, targets, vocab)) for head in (odd, full)]
        if abs(losses[0] / losses[1] - 1) > SAME:
            raise SystemExit(f"padding rows change the loss: {losses}; nothing is timed")
        runs = {
            "rolecall, padded": step(ours, hidden, full, targets, vocab),
            "rolecall, aligned": step(ours, hidden, full, targets, aligned),
            "rolecall, odd": step(ours, hidden, odd, targets, vocab),
            "plain, aligned": step(plain, hidden, full, targets, aligned),
            "plain, odd": step(plain, hidden, odd, targets, vocab),
        }
        failed: dict[str, str] = {}
        results[vocab] = gpu.alternate(gpu.willing(runs, failed), options.rounds, warm=1)
        missing.update({f"{name} at {vocab}": why for name, why in failed.items()})
        found = {name: timing.median for name, timing in results[vocab].items()}
        if "plain, odd" in found and "plain, aligned" in found:
            cliffs[vocab] = round(found["plain, odd"] / found["plain, aligned"], 3)
        padded[vocab] = found["rolecall, padded"] / found["rolecall, aligned"]
    rates = gpu.both(before, gpu.rates())
    main_one = next(iter(results))
    finish(
        bench="vocab_pad",
        workload=f"{tokens} tokens x {depth} x {main_one}, bf16, head and cross entropy forward and backward",
        timings=results[main_one],
        ours="rolecall, padded",
        targets={f"{vocab}: padded at most {TIMES}x aligned": (ratio, ratio <= TIMES) for vocab, ratio in padded.items()},
        target="padded within 1 % of aligned; the cliff of an odd size reported",
        limit=rates.milliseconds(flops=6.0 * tokens * depth * main_one),
        missing=missing,
        details={
            **rates.details(),
            "plain, odd over aligned": {str(vocab): ratio for vocab, ratio in cliffs.items()},
            **{
                f"ms at {vocab}": {name: round(timing.median * 1e3, 3) for name, timing in timings.items()}
                for vocab, timings in results.items()
            },
        },
        packages=("torch", "triton"),
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
