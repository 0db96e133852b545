"""Keys and values of the sequences in work, in slots; both classes are caches as attention layers call them.

Shape letters: A active sequences, S slots, H key/value heads, L columns (positions), D size of a head, C packed row.
"""

from __future__ import annotations

from typing import Any

import torch
from rolecall.kernels.attention import Dense
from torch import Tensor

BLOCK = 64  # columns that a slot grows by
ALIGN = 8  # columns read are rounded up to a multiple of this, as attention kernels with a mask want it


class PrefillCache:
    """Catches the keys and values of one packed row, [1, H, C, D] a layer, while attention uses them.

    Args:
        shared: keys and values [layers, 2, H, tokens, D] of what comes before every sequence of the row; attention sees
            them as the first columns.
    """

    def __init__(self, shared: Tensor) -> None:
        self._shared = shared
        self._pairs: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer once."""
        self._pairs[layer] = torch.cat((keys, values))
        if self._shared.shape[3] == 0:
            return keys, values
        before = self._shared[layer]
        return torch.cat((before[:1], keys), dim=2), torch.cat((before[1:], values), dim=2)

    def whole(self) -> Tensor:
        """All that was caught, without what is shared: [layers, 2, H, C, D]."""
        return torch.stack([self._pairs[layer] for layer in range(len(self._pairs))])


class SlotCache:
    """Preallocated keys and values; active sequences fill slots 0 .. A-1 without a gap.

    Args:
        slots: most sequences at once.
        longest: most tokens a sequence may come to; columns are added in blocks up to that.
    """

    def __init__(self, *, layers: int, slots: int, heads: int, size: int, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self._longest = longest
        # Zeros and not empty: a masked column has weight 0, but 0 x NaN is NaN.
        shape = (layers, 2, slots, heads, min(BLOCK, longest), size)  # [layers, 2, S, H, L, D]
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(slots, device=device)
        self._places = self._rows
        self._read = 0

    def reserve(self, columns: int) -> None:
        """Make room for sequences of this many tokens: a half more at least, in whole blocks, so that few copies are made."""
        have = self._data.shape[4]
        if columns <= have:
            return
        want = min(self._longest, -(-max(columns, have * 3 // 2) // BLOCK) * BLOCK)
        grown = self._data.new_zeros((*self._data.shape[:4], want, self._data.shape[5]))
        grown[..., :have, :] = self._data
        self._data = grown

    def fill(self, first: int, count: int, start: int, part: Tensor) -> None:
        """Copy keys and values [layers, 2, H, tokens, D] to `count` slots from `first` on, to columns from `start` on."""
        end = start + part.shape[3]
        self.reserve(end)
        self._data[:, :, first : first + count, :, start:end] = part[:, :, None]

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        """Copy the first `columns` columns of the source slots over the target slots."""
        found = self._data[:, :, sources, :, :columns]
        self._data[:, :, targets, :, :columns] = found

    @property
    def room(self) -> int:
        """Columns there are. Where they lie in memory changes with it alone."""
        return self._data.shape[4]

    def reach(self, columns: int, multiple: int = ALIGN) -> int:
        """Make room for sequences of this many tokens; how many columns to read for them, a multiple where there are as many."""
        self.reserve(columns)
        return min(-(-columns // multiple) * multiple, self.room)

    def step(self, places_A: Tensor, columns: int) -> Dense:
        """Get ready for a forward of one token a sequence; returns what each may attend to.

        Args:
            places_A: int64, how many tokens each sequence holds already: the column its token is written to.
            columns: L, how many are read: more than the greatest of these, as `reach` says.
        """
        if not places_A.is_cuda and not int(places_A.max()) < columns <= self.room:
            raise AssertionError(f"{columns} columns are read of {self.room}, and a sequence holds {int(places_A.max())}: ask `reach`")
        self._places, self._read = places_A, columns
        at = torch.arange(columns, device=places_A.device)  # a column is a position
        seen = (at <= places_A[:, None])[:, None, None]
        return Dense(seen, places_A[:, None], at.expand(len(places_A), -1))

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: write the new token's [A, H, 1, D], return all [A, H, L, D] as views."""
        active = keys.shape[0]
        held_keys, held_values = self._data[layer, 0], self._data[layer, 1]
        held_keys[self._rows[:active], :, self._places] = keys[:, :, 0]
        held_values[self._rows[:active], :, self._places] = values[:, :, 0]
        return held_keys[:active, :, : self._read], held_values[:active, :, : self._read]
