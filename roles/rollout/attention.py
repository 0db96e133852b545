"""Attention of one new token a sequence, without copying keys and values for every query head.

transformers' own SDPA path repeats grouped keys and values whenever there is a mask: at 3 query heads a key head that
is three times the cache, copied in each layer of each step.
"""

from __future__ import annotations

from typing import Any

import torch
from rolecall.roles.models.causal import CausalModel
from torch import Tensor

NAME = "rolecall_grouped"


def use_grouped_attention(model: CausalModel) -> None:
    """Let the model's attention layers use `grouped_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.net.set_attn_implementation(NAME)


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' SDPA function; a single query goes the way without copies.

    The query heads of one key head become rows of that head: with one token there is no causal order among them.

    Args:
        query: [A, heads, C, D].
        key, value: [A, key heads, L, D].
        attention_mask: bool [A, 1, C, L] or None.

    Returns:
        [A, C, heads, D] and None (no attention weights).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    active, heads, tokens, size = query.shape
    if tokens > 1 or heads == key.shape[1]:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    rows = query.reshape(active, key.shape[1], heads // key.shape[1], size)
    mixed = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return mixed.reshape(active, 1, heads, size), None
