"""`sft_mfu`: full fine-tuning on one GPU, whole optimiser steps, against transformers padding-free.

The policy role trains packed rows: forward, backward, gradients summed in float32, clipped, AdamW with float32 masters. Model FLOPs are
counted from the real lengths of the documents, so that neither packing nor recomputation adds to them; MFU stands on two bases, the
vendor's 989 TFLOP/s and the rate of an 8192-cubed matrix product in the same run. Peers train in pure bfloat16 (less memory traffic than
ours), batches already on the device, in micro-batches as large as fit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contenders import Contender, HuggingFace, Ours
from documents import Law, Rows, rows_of, whole
from gpu import both, require_gpu
from harness import finish
from models import KNOWN, TINY, build, small
from race import (
    chosen,
    clean,
    exactly,
    figures,
    look,
    measured,
    nearly,
    options,
    race,
    start,
    timings,
    work,
)

ROWS, CAPACITY, LOTS = 8, 8192, 3
LAWS = {"lognormal": Law(6.5, 0.8, CAPACITY), "whole": whole(CAPACITY)}
OWN, PEER = "rolecall", "transformers + Liger"
STEPS, PEER_STEPS = 6, 1  # timed, each round: 30 of ours in five rounds
PER_PASS = {"Qwen3-0.6B": (4, 4), "Gemma3-1B": (2, 4), "SmolLM2-135M": (8, 8)}  # rows of ours at a time: on 80 GB, and on more than 120
SPEED = {("Qwen3-0.6B", "lognormal"): 113e3, ("Qwen3-0.6B", "whole"): 74e3}  # tokens/s that were set as targets
MFU, TIMES = 60.0, 1.5  # per cent of the measured matrix product; times the best peer with Liger
PACKAGES = ("rolecall", "torch", "triton", "transformers", "liger-kernel")


def makers(name: str, folder: Path, micro: int, device: str, attention: str) -> dict[str, Callable[[], Contender]]:
    """Ours and the peers, ready to be made."""
    model = str(folder)
    peer = partial(HuggingFace, model=model, form=Rows.flattened, device=device, attention=attention)
    plain, fused, liger = "transformers", "transformers + compile", PEER
    packed = "padding-free (flattening collator), FlashAttention 2 of torch, bfloat16, fused AdamW"
    return {
        OWN: partial(ours, model, micro, device),
        liger: partial(peer, liger, f"{packed}; Liger's norms, rotary, SwiGLU, fused head and loss", micro=(8, 4, 2, 1), liger=True),
        plain: partial(peer, plain, packed, micro=(4, 2, 1)),
        fused: partial(peer, fused, f"{packed}; layers and loss compiled", micro=(4, 2, 1), compiled=True),
    }


def ours(model: str, rows: int, device: str, **settings: object) -> Ours:
    """The policy as a user would set it up for this."""
    about = f"the policy role: packed rows, {rows} a pass, compiled blocks, bfloat16 with float32 gradients and masters, fused AdamW"
    return Ours(OWN, about, model, device=device, dtype="bfloat16", rows_per_pass=rows, compile=device != "cpu", **settings)


def per_pass(name: str) -> int:
    """Rows of ours at a time, as this device has memory for."""
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 120e9
    return PER_PASS[name][large]


def lots_of(args: argparse.Namespace) -> list[Rows]:
    """The batches of a run."""
    law, vocab = LAWS[args.law], KNOWN[args.model]["vocab_size"]
    if args.tiny:
        law = Law(3.5, 0.8, 128) if law.sigma else whole(128)
        return [rows_of(law, 4, 128, TINY["vocab_size"], seed) for seed in range(2)]
    return [rows_of(law, ROWS, CAPACITY, vocab, seed) for seed in range(LOTS)]


def exact(name: str, folder: Path, device: str, attention: str) -> dict[str, float]:
    """Ours against transformers in float32 on a small model of the same kind: loss and gradient norm of packed rows.

    Not compiled: what the real run compiles would be made for the shapes of both.
    """
    model = build(name, folder / "small", dtype="float32", **small(name))
    lots = [rows_of(Law(4.0, 0.8, 256), 4, 256, 512, seed=9)]
    pair = {
        OWN: partial(Ours, OWN, "", model, device=device, dtype="float32", rows_per_pass=2),
        "transformers": partial(HuggingFace, "transformers", "", model, form=Rows.flattened, device=device, attention="sdpa",
                                dtype="float32"),
    }  # fmt: skip
    results = {}
    for who, make in pair.items():
        contender, results[who] = start(make, lots, 0)
        contender.close()
    del contender
    clean()
    return exactly(results, OWN)


def measure(args: argparse.Namespace, folder: Path, device: str, attention: str) -> None:
    """The race, the table and the JSON line."""
    lots, until = lots_of(args), time.monotonic() + args.seconds
    apart = exact(args.model, folder, device, attention)
    before = measured()
    missing: dict[str, str] = {}
    entrants = chosen(makers(args.model, folder, args.rows_per_pass or per_pass(args.model), device, attention), args.only)
    steps = {name: STEPS if name == OWN else PEER_STEPS for name in entrants}
    results = race(entrants, lots, rounds=args.rounds, steps=steps, missing=missing, until=until)
    rate = both(before, measured())
    near, targets = nearly(results, OWN)
    tokens, flops = work(lots, str(folder))
    columns = figures(results, tokens, flops, rate.matmul)
    speed, share = columns["tokens/s"][OWN], columns["MFU % of measured"][OWN]
    targets[f"at least {MFU:g} % of the measured matrix product"] = (share, share >= MFU)
    if (wanted := SPEED.get((args.model, args.law))) and not args.tiny:
        targets[f"at least {wanted:g} tokens/s"] = (speed, speed >= wanted)
    if PEER in results:
        times = speed / columns["tokens/s"][PEER]
        targets[f"at least {TIMES:g}x {PEER}"] = (times, times >= TIMES)
    finish(
        bench="sft_mfu" if (args.model, args.law) == ("Qwen3-0.6B", "lognormal") else f"sft_mfu-{args.model}-{args.law}",
        workload=f"{args.model}, rows {ROWS} x {CAPACITY}, documents {LAWS[args.law]}: forward, backward, AdamW",
        timings=timings(results),
        ours=OWN,
        targets=targets,
        target="; ".join(targets),
        limit=rate.milliseconds(flops),
        missing=missing,
        details={**columns, **rate.details(), "model TFLOP a step": round(flops / 1e12, 1), "tokens a step": round(tokens),
                 **apart, **near, "steps of ours": len(results[OWN].seconds) * STEPS,
                 "about": {name: result.about for name, result in results.items()}},
        packages=PACKAGES,
        quick=args.tiny,
        out=args.out,
    )  # fmt: skip


def main() -> None:
    """Build the model, then look or measure."""
    parser = options(__doc__ or "")
    parser.add_argument("--model", default="Qwen3-0.6B", choices=[name for name in KNOWN if name in PER_PASS])
    parser.add_argument("--law", default="lognormal", choices=list(LAWS), help="of the documents' lengths; whole: one document a row")
    args = parser.parse_args()
    device, attention = ("cuda:0", "varlen") if torch.cuda.is_available() else ("cpu", "sdpa")
    if not args.tiny:
        require_gpu()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as aside:
        folder = Path(aside)
        build(args.model, folder, device=device, **(small(args.model) if args.tiny else {}))
        clean()
        if args.look:
            look(
                partial(ours, str(folder), args.rows_per_pass or per_pass(args.model), device),
                lots_of(args),
                work(lots_of(args), str(folder)),
            )
        else:
            measure(args, folder, device, attention)


if __name__ == "__main__":
    main()
