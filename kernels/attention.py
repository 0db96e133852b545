"""Who may attend to whom in packed rows.

R rows, C capacity, S segments. A segment is one sequence within a row; it may continue a parent segment, as the
completions of one prompt continue the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_mask(segments: Tensor, parents: Tensor) -> Tensor:
    """The attention mask of packed rows: each slot sees its own segment up to itself, and its parent segments.

    mask[r, 0, i, j] = j <= i and (segment_j is segment_i or one of its ancestors).
    A slot without a segment sees only itself: it is seen by none, and its softmax stays finite.

    Args:
        segments: [R, C] int, number of the segment of each slot, -1 where there is none. Ancestors come earlier in the row.
        parents: [S] int, segment that each one continues, -1 for none.

    Returns:
        [R, 1, C, C] bool, True where query i may attend to key j.

    Raises:
        ValueError: a segment has no entry in `parents`, or parents go in a circle.
    """
    if segments.numel() and int(segments.max()) >= len(parents):
        raise ValueError(
            f"A segment is unknown. Asked: segment {int(segments.max())}. There is: parents of {len(parents)}. "
            "Do: give the parents of all segments of these rows."
        )
    segments = segments.long()
    above = torch.cat([parents.long().to(segments.device), segments.new_full((1,), -1)])  # entry -1: above none is none
    keys = segments[:, None, :]
    ancestor = segments
    related = torch.zeros(*segments.shape, segments.shape[-1], dtype=torch.bool, device=segments.device)
    depth = 0
    while bool((ancestor >= 0).any()):
        related |= (ancestor[:, :, None] == keys) & (ancestor >= 0)[:, :, None]
        ancestor = above[ancestor]
        depth += 1
        if depth > len(parents):
            raise ValueError("Parents of segments go in a circle. Do: let each segment continue one that was made before it.")
    slots = torch.arange(segments.shape[-1], device=segments.device)
    causal = slots[:, None] >= slots[None, :]
    return ((related & causal) | (slots[:, None] == slots[None, :]))[:, None]
