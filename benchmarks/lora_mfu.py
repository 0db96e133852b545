"""`lora_mfu`: low-rank adapters of rank 16 on all linear layers of a 4B model, whole optimiser steps, against peft.

Frozen weights cost no gradient of their own, so 4 N FLOPs a token and what the adapters need are counted, not 6 N. All contenders start
from one adapter file. peft's runs recompute each layer in the backward pass where they would not fit otherwise; that is not counted
as work, for nobody.
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
from documents import Law, Rows, rows_of
from gpu import both, require_gpu
from harness import finish
from models import KNOWN, TINY, build, config, small
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
from rolecall.roles.models.lora import Lora
from safetensors.torch import save_file

MODEL, ROWS, CAPACITY, LOTS, RANK = "Qwen3-4B", 2, 8192, 2, 16
LAW = Law(6.5, 0.8, CAPACITY)
OWN, LESS, PEFT, LIGER = "rolecall", "rolecall with MLPs recomputed", "peft", "peft + Liger"
STEPS, PEER_STEPS = 3, 1  # timed, each round
PER_PASS = 1  # rows of ours at a time: nothing is recomputed, and 8192 tokens fill the matrix units
MFU, TIMES, MEMORY = 55.0, 1.6, 0.7
PACKAGES = ("rolecall", "torch", "triton", "transformers", "peft", "liger-kernel")


def ours(name: str, model: str, adapter: str, rows: int, device: str, dtype: str = "bfloat16", **settings: object) -> Ours:
    """The policy as a user would set it up for this."""
    about = f"the policy role: packed rows, {rows} a pass, compiled blocks, fused adapters, float32 gradients and masters of the adapters"
    lora = Lora(start=adapter)
    settings = {"compile": device != "cpu", **settings}
    return Ours(name, about, model, device=device, dtype=dtype, rows_per_pass=rows, lora=lora, **settings)


def makers(model: str, adapter: str, rows: int, device: str, attention: str) -> dict[str, Callable[[], Contender]]:
    """Ours and the peers, ready to be made."""
    peer = partial(HuggingFace, model=model, form=Rows.flattened, adapter=adapter, attention=attention, device=device)
    packed = "padding-free, FlashAttention 2 of torch, bfloat16, fused AdamW"
    again, single = f"{packed}, layers recomputed", f"{packed}, one row at a time, nothing recomputed; Liger's kernels"
    return {
        OWN: partial(ours, OWN, model, adapter, rows, device),
        LESS: partial(ours, LESS, model, adapter, rows, device, recompute="selective"),
        PEFT: partial(peer, PEFT, again, micro=(2, 1), checkpointing=True),
        LIGER: partial(peer, LIGER, f"{again}; Liger's kernels, fused head and loss", micro=(2, 1), checkpointing=True, liger=True),
        f"{LIGER} keeping all": partial(peer, f"{LIGER} keeping all", single, liger=True),
    }


def adapter_of(name: str, folder: Path, dtype: str, **changes: object) -> str:
    """Write an adapter with random numbers in both of its matrices, as peft writes it; returns its folder. No weights are made."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config(name, **changes), dtype=getattr(torch, dtype))
        made = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for place, parameter in made.named_parameters():
        if "lora_" in place:
            std = 0.01 if "lora_B" in place else parameter.shape[1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=random) * std
            tensors[place.replace(".default.", ".")] = drawn.to(getattr(torch, dtype))
    folder.mkdir()
    made.peft_config["default"].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return str(folder)


def lots_of(args: argparse.Namespace) -> list[Rows]:
    """The batches of a run."""
    if args.tiny:
        return [rows_of(Law(3.5, 0.8, 128), 4, 128, TINY["vocab_size"], seed) for seed in range(2)]
    return [rows_of(LAW, ROWS, CAPACITY, KNOWN[MODEL]["vocab_size"], seed) for seed in range(LOTS)]


def exact(folder: Path, device: str, attention: str) -> dict[str, float]:
    """Ours against peft in float32 on a small model of the same kind: loss and gradient norm."""
    model = build(MODEL, folder / "small", dtype="float32", **small(MODEL))
    adapter = adapter_of(MODEL, folder / "small-adapter", "float32", **small(MODEL))
    lots = [rows_of(Law(4.0, 0.8, 256), 4, 256, TINY["vocab_size"], seed=9)]
    pair: dict[str, Callable[[], Contender]] = {
        OWN: partial(ours, OWN, model, adapter, 2, device, dtype="float32", compile=False),
        PEFT: partial(HuggingFace, PEFT, "", model, form=Rows.flattened, adapter=adapter, attention="sdpa", device=device, dtype="float32"),
    }
    results = {}
    for name, make in pair.items():
        contender, results[name] = start(make, lots, 0)
        contender.close()
    del contender
    clean()
    return exactly(results, OWN)


def measure(args: argparse.Namespace, model: str, adapter: str, device: str, attention: str, folder: Path) -> None:
    """The race, the table and the JSON line."""
    lots, until = lots_of(args), time.monotonic() + args.seconds
    apart = exact(folder, device, attention)
    before = measured()
    missing: dict[str, str] = {}
    entrants = chosen(makers(model, adapter, args.rows_per_pass or PER_PASS, device, attention), args.only)
    steps = {name: STEPS if name in (OWN, LESS) else PEER_STEPS for name in entrants}
    results = race(entrants, lots, rounds=args.rounds, steps=steps, missing=missing, until=until)
    rate = both(before, measured())
    near, targets = nearly(results, OWN)
    tokens, flops = work(lots, model, Lora(r=RANK))
    columns = figures(results, tokens, flops, rate.matmul)
    share, speed, memory = (columns[name] for name in ("MFU % of measured", "tokens/s", "peak GiB"))
    targets[f"at least {MFU:g} % of the measured matrix product"] = (share[OWN], share[OWN] >= MFU)
    for peer in (PEFT, LIGER):
        if peer in results:
            times = speed[OWN] / speed[peer]
            targets[f"at least {TIMES:g}x {peer}"] = (times, times >= TIMES)
    for own in (OWN, LESS):
        if own in results and memory.get(PEFT):
            part = memory[own] / memory[PEFT]
            targets[f"{own}: peak memory at most {MEMORY:g}x {PEFT}"] = (part, part <= MEMORY)
    if LESS in results and PEFT in results:
        times = speed[LESS] / speed[PEFT]
        targets[f"{LESS}: at least {TIMES:g}x {PEFT}"] = (times, times >= TIMES)
    finish(
        bench="lora_mfu",
        workload=f"{MODEL}, rank {RANK} on all linear layers, rows {ROWS} x {CAPACITY}, documents {LAW}: forward, backward, AdamW",
        timings=timings(results),
        ours=OWN,
        targets=targets,
        target="; ".join(targets),
        limit=rate.milliseconds(flops),
        missing=missing,
        details={
            **columns,
            **rate.details(),
            "model TFLOP a step": round(flops / 1e12, 1),
            "tokens a step": round(tokens),
            **apart,
            **near,
            "about": {name: result.about for name, result in results.items()},
        },
        packages=PACKAGES,
        quick=args.tiny,
        out=args.out,
    )


def main() -> None:
    """Build the model and the adapter, then look or measure."""
    args = options(__doc__ or "").parse_args()
    device, attention = ("cuda:0", "varlen") if torch.cuda.is_available() else ("cpu", "sdpa")
    if not args.tiny:
        require_gpu()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as aside:
        folder = Path(aside)
        changes = small(MODEL) if args.tiny else {}
        model = build(MODEL, folder / "model", device=device, **changes)
        clean()
        adapter = adapter_of(MODEL, folder / "adapter", "bfloat16", **changes)
        if args.look:
            lots = lots_of(args)
            look(partial(ours, OWN, model, adapter, args.rows_per_pass or PER_PASS, device), lots, work(lots, model, Lora(r=RANK)))
        else:
            measure(args, model, adapter, device, attention, folder)


if __name__ == "__main__":
    main()
