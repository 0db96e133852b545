"""`rl_logprob`: logprob and entropy of each token at a temperature, from hidden states, without and with gradients.

16,384 tokens at the size of Qwen3-0.6B (1024 x 151,936), bfloat16, random. The floor of the forward pass is 2 N D V operations at the
matmul rate of the same run; with gradients it is 8 N D V, as logits are made again once the gradients of logprobs are known.
TRL computes both results from whole logits; Liger and CCE have no entropy, which their figures don't include.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import torch
from harness import arguments, finish
from rolecall.kernels.logprobs import token_logprobs, token_logprobs_plain
from torch import Tensor

TOKENS, DEPTH, VOCAB = 16384, 1024, 151936
QUICK = (4096, 1024, 32768)
TEMPERATURE = 0.8
CHECKED = 512  # tokens compared with float64
ERROR, BROKEN, GRADIENT = 1e-5, 1e-4, 6e-3  # nats that are asked for, and past which nothing is timed; share of a gradient's norm
TIMES, MEMORY, OVER_TRL = 1.3, 256.0, 3.0
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
Contender = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def contenders(missing: dict[str, str]) -> dict[str, Contender]:
    """Logprobs, and entropy where there is one, of each."""
    found: dict[str, Contender] = {"rolecall": lambda hidden, head, targets: token_logprobs(hidden, head, targets, temperature=TEMPERATURE)}
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        def trl(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = (hidden @ head.T / TEMPERATURE)[None]
            with torch.no_grad():
                entropy = entropy_from_logits(logits)
            return selective_log_softmax(logits, targets[None])[0], entropy[0]

        found["TRL"] = trl
    except Exception as error:
        missing["TRL"] = repr(error)[:200]
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger, no entropy"] = lambda hidden, head, targets: (
            -liger_fused_linear_cross_entropy(hidden / TEMPERATURE, head, targets, reduction="none"),
            None,
        )
    except Exception as error:
        missing["Liger"] = repr(error)[:200]
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE, no entropy"] = lambda hidden, head, targets: (
            -cce(hidden / TEMPERATURE, head, targets, reduction="none", filter_eps=None),
            None,
        )
    except Exception as error:
        missing["CCE"] = repr(error)[:200]
    return found


def inputs(tokens: int, depth: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(vocab, depth, device="cuda") * (3 / depth**0.5)).to(torch.bfloat16).requires_grad_()
    return hidden, head, torch.randint(0, vocab, (tokens,), device="cuda"), torch.randn(tokens, device="cuda")


def forward(contender: Contender, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return contender(*batch[:3])

    return run


def both(contender: Contender, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    """The gradient of a policy's loss is a number for each logprob."""

    def run() -> None:
        batch[0].grad = batch[1].grad = None
        (contender(*batch[:3])[0] * batch[3]).sum().backward()

    return run


def errors(found: dict[str, Contender], depth: int, vocab: int, missing: dict[str, str]) -> dict[str, dict[str, float]]:
    """Largest error of logprobs and entropy in nats, distances of the gradients, against float64 from the same inputs."""
    batch = inputs(CHECKED, depth, vocab)
    wide = [values.detach().double().requires_grad_() for values in batch[:2]]
    logprobs, entropy = token_logprobs_plain(*wide, batch[2], temperature=TEMPERATURE)
    slopes = torch.autograd.grad((logprobs * batch[3]).sum(), wide)
    logprobs, entropy = logprobs.detach(), entropy.detach()
    results: dict[str, dict[str, float]] = {}
    for name, run in gpu.willing({name: both(each, batch) for name, each in found.items()}, missing).items():
        run()
        with torch.no_grad():
            ours, its_entropy = found[name](*batch[:3])
        results[name] = {
            "logprob": float((ours.double() - logprobs).abs().max()),
            "mean": float((ours.double() - logprobs).mean()),
            "hidden": gpu.distance(batch[0].grad, slopes[0]),
            "head": gpu.distance(batch[1].grad, slopes[1]),
        }
        if its_entropy is not None:
            results[name]["entropy"] = float((its_entropy.double() - entropy).abs().max())
    return results


def main() -> None:
    options = arguments(__doc__ or "")
    gpu.require_gpu()
    torch.manual_seed(0)
    shape = QUICK if options.quick else (TOKENS, DEPTH, VOCAB)
    missing: dict[str, str] = {}
    found = contenders(missing)
    exact = errors(found, *shape[1:], missing)
    for name, each in exact.items():
        print(f"{name:18} against float64: " + ", ".join(f"{what} {value:.1e}" for what, value in each.items()))
    if "rolecall" not in exact:
        raise SystemExit(f"ours does not run: {missing['rolecall']}")
    own = exact["rolecall"]
    if gpu.largest([own["logprob"], own["entropy"]]) > BROKEN or gpu.largest([own["hidden"], own["head"]]) > GRADIENT:
        raise SystemExit("ours is not exact: nothing is timed")
    found = {name: each for name, each in found.items() if name in exact}
    before = gpu.rates()
    batch = inputs(*shape)
    timings = gpu.alternate(gpu.willing({name: forward(each, batch) for name, each in found.items()}, missing), options.rounds, warm=1)
    above = {name: round(gpu.memory(forward(found[name], batch)) / 1e6, 1) for name in timings}
    failed: dict[str, str] = {}
    learning = gpu.alternate(gpu.willing({name: both(each, batch) for name, each in found.items()}, failed), options.rounds, warm=1)
    missing.update({f"{name}, with gradients": why for name, why in failed.items()})
    above_learning = {}
    for name in learning:
        batch[0].grad = batch[1].grad = None
        above_learning[name] = round((gpu.memory(both(found[name], batch)) - batch[0].nbytes - batch[1].nbytes) / 1e6, 1)
    rates = gpu.both(before, gpu.rates())
    report(options, shape, rates, timings, learning, (above, above_learning), exact, missing)


def report(
    options: Any, shape: Any, rates: gpu.Rates, timings: Any, learning: Any, above: Any, exact: Any, missing: dict[str, str]
) -> None:
    floor = rates.milliseconds(flops=2.0 * shape[0] * shape[1] * shape[2])
    own, slow = timings["rolecall"].median * 1e3, learning["rolecall"].median * 1e3
    targets = {
        f"forward: at most {TIMES}x the floor": (own / floor, own <= TIMES * floor),
        f"with gradients: at most {TIMES}x the floor of 8 N D V": (slow / (4 * floor), slow <= TIMES * 4 * floor),
        f"forward: at most {MEMORY:.0f} MB": (above[0]["rolecall"], above[0]["rolecall"] <= MEMORY),
        f"with gradients: at most {MEMORY:.0f} MB above them": (above[1]["rolecall"], above[1]["rolecall"] <= MEMORY),
        f"error of logprobs at most {ERROR}": (exact["rolecall"]["logprob"], exact["rolecall"]["logprob"] <= ERROR),
        f"error of entropies at most {ERROR}": (exact["rolecall"]["entropy"], exact["rolecall"]["entropy"] <= ERROR),
    }
    for label, found in (("forward", timings), ("with gradients", learning)):
        if "TRL" in found:
            ratio = found["TRL"].median / found["rolecall"].median
            targets[f"{label}: at least {OVER_TRL:.0f}x TRL"] = (ratio, ratio >= OVER_TRL)
    finish(
        bench="rl_logprob",
        workload=f"{shape[0]} tokens x {shape[1]} x {shape[2]}, bf16, temperature {TEMPERATURE}: logprob and entropy, forward",
        timings=timings,
        ours="rolecall",
        targets=targets,
        target="at most 1.3x the floor, 256 MB, error 1e-5; at least 3x TRL",
        limit=floor,
        missing=missing,
        details={
            **rates.details(),
            "MB above the inputs": above[0],
            "with gradients, ms": {name: round(each.median * 1e3, 3) for name, each in learning.items()},
            "with gradients, MB above them": above[1],
            "largest error of a logprob": {name: float(f"{each['logprob']:.2g}") for name, each in exact.items()},
            "mean error of logprobs": {name: float(f"{each['mean']:.2g}") for name, each in exact.items()},
            "largest error of an entropy": {name: float(f"{each['entropy']:.2g}") for name, each in exact.items() if "entropy" in each},
            "gradient of head, distance from float64": {name: float(f"{each['head']:.2g}") for name, each in exact.items()},
        },
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
