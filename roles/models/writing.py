"""Checkpoints on disk, as transformers and vLLM load them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD = 5 << 30  # bytes of a file at most: so much is copied to the host at once, and hubs take files of this size


def write_config(folder: Path, config: Any, generation: Any, architecture: str, dtype: torch.dtype) -> None:
    """Write config.json and, if there is one, generation_config.json."""
    own = copy.deepcopy(config)
    own.architectures, own.dtype = [architecture], dtype
    own.save_pretrained(str(folder))
    if generation is not None:
        generation.save_pretrained(str(folder))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], limit: int = SHARD) -> None:
    """Write model.safetensors, or several such files with an index where it is more than `limit` bytes."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name].contiguous().cpu() for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
