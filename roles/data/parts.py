"""The tokens of parts of texts, remembered and looked up many at once.

A part of up to 15 bytes is a key of two 64-bit numbers, its bytes and their count, so that equal keys are equal parts. Keys stand in a
hash table with linear probing (Knuth, The Art of Computer Programming, volume 3, 6.4) in NumPy arrays; longer parts, which are
few, in a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]

PAD = b"\0" * 16  # after the bytes that parts are read from: keys are read eight bytes at a time
KEEP = 100  # bytes of a part that is remembered; longer ones hardly come again
_LONGEST = 15  # bytes of a part with a key
_SIZES = range(_LONGEST + 2)
_LOW = np.array([(1 << 8 * min(size, 8)) - 1 for size in _SIZES], np.uint64)  # masks of the first eight bytes of a part
_HIGH = np.array([(1 << 8 * min(max(size - 8, 0), 7)) - 1 for size in _SIZES], np.uint64)  # of the seven after them
_SIZE = np.array([size << 56 for size in _SIZES], np.uint64)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd numbers that spread keys


class Parts:
    """Part → tokens.

    Args:
        encode: the tokens of texts.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode = encode
        self.forget()

    def __len__(self) -> int:
        """Parts that were encoded since all was forgotten."""
        return self._count

    @property
    def held(self) -> int:
        """Tokens of all those; parts too long to be remembered count too."""
        return self._used

    def forget(self) -> None:
        """Start anew."""
        self._count = self._used = 0
        self._tokens: Int32 = np.zeros(1 << 16, np.int32)  # of all parts, end to end
        self._starts: Int64 = np.zeros(1 << 12, np.int64)
        self._counts: Int64 = np.zeros(1 << 12, np.int64)
        self._keys: Keys = np.zeros((2, 1 << 12), np.uint64)  # of each part; the last is of none: what an empty place refers to
        self._long: dict[bytes, int] = {}
        self._places: Int32 = np.full(1 << 13, -1, np.int32)  # of the table: numbers of parts; half of them are empty at least

    def tokens(self, data: bytes, bounds: Int64) -> tuple[Int32, Int64]:
        """The tokens of parts that lie side by side.

        Args:
            data: their bytes, UTF-8, and `PAD`.
            bounds: [P + 1] where each begins, and where the last one ends.

        Returns:
            tokens [T] of all, and how many there are before each part, and at the end, [P + 1].
        """
        numbers = self._numbers(data, bounds)
        counts = self._counts[numbers]
        after: Int64 = np.concatenate([[0], np.cumsum(counts)])
        shift = np.repeat(self._starts[numbers] - after[:-1], counts)
        return self._tokens[np.arange(len(shift)) + shift], after

    def _numbers(self, data: bytes, bounds: Int64) -> Int64:
        keys = _keys(data, bounds)
        numbers = self._find(keys)
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            fresh: dict[bytes, int] = {}
            found = []
            for begin, end in zip(bounds[unknown].tolist(), bounds[unknown + 1].tolist(), strict=True):
                part = data[begin:end]
                known = self._long.get(part, -1) if end - begin > _LONGEST else -1
                found.append(known if known >= 0 else fresh.setdefault(part, self._count + len(fresh)))
            numbers[unknown] = found
            self._learn(list(fresh))
        return numbers

    def _find(self, keys: Keys) -> Int64:
        """The number of the part of each key; -1 where there is none."""
        place = _hash(keys, len(self._places))
        found = self._places[place].astype(np.int64)
        wrong = np.flatnonzero((self._keys[0].take(found) != keys[0]) | (self._keys[1].take(found) != keys[1]))
        while len(wrong):
            wrong = wrong[found[wrong] >= 0]  # another part's place: look at the next one
            place[wrong] = (place[wrong] + 1) % len(self._places)
            found[wrong] = self._places[place[wrong]]
            wrong = wrong[(self._keys[:, found[wrong]] != keys[:, wrong]).any(0)]
        return found

    def _learn(self, parts: list[bytes]) -> None:
        """Encode new parts, and remember them by the next numbers."""
        if not parts:
            return
        ids = self._encode([part.decode("utf-8", "surrogatepass") for part in parts])
        counts = np.array([len(each) for each in ids], np.int64)
        flat = np.fromiter((token for each in ids for token in each), np.int32, int(counts.sum()))
        first, last, used = self._count, self._count + len(parts), self._used
        self._tokens = _room(self._tokens, used + len(flat))
        self._tokens[used : used + len(flat)] = flat
        self._starts, self._counts, self._keys = (_room(each, last + 1) for each in (self._starts, self._counts, self._keys))
        self._counts[first:last], self._starts[first:last] = counts, used + np.cumsum(counts) - counts
        self._keys[:, first:last] = _keys(b"".join(parts) + PAD, np.cumsum([0, *map(len, parts)]))
        self._count, self._used = last, used + len(flat)
        self._long.update((part, number) for number, part in enumerate(parts, start=first) if _LONGEST < len(part) <= KEEP)
        if 2 * last > len(self._places):
            self._places, first = np.full(4 * len(self._places), -1, np.int32), 0
        self._enter(first)

    def _enter(self, first: int) -> None:
        """Give places to the parts from this number on."""
        places, keys = self._places, self._keys[:, first : self._count]
        short = keys[1] >> np.uint64(56) <= _LONGEST
        hashes = _hash(keys, len(places))
        for number in np.flatnonzero(short).tolist():
            place = int(hashes[number])
            while places[place] >= 0:
                place = (place + 1) % len(places)
            places[place] = first + number


def _keys(data: bytes, bounds: Int64) -> Keys:
    """[2, P]: the first eight bytes of each part, and the next seven with the number of all. A key beyond 15 bytes is no part's."""
    starts, sizes = bounds[:-1], np.minimum(np.diff(bounds), _LONGEST + 1)
    eights: Any = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    keys = np.empty((2, len(starts)), np.uint64)
    np.bitwise_and(eights.take(starts), _LOW[sizes], out=keys[0])
    np.bitwise_and(eights.take(starts + 8), _HIGH[sizes], out=keys[1])
    keys[1] |= _SIZE[sizes]
    return keys


def _hash(keys: Keys, size: int) -> Int64:
    """A place in a table of so many, a power of two."""
    mixed = (keys[0] * _MIX[0]) ^ (keys[1] * _MIX[1])
    mixed ^= mixed >> np.uint64(29)
    place: Int64 = (mixed * _MIX[0] >> np.uint64(65 - size.bit_length())).astype(np.int64)
    return place


def _room(values: Any, size: int) -> Any:
    """The array itself, or a copy with room for twice as many at the end."""
    if size <= values.shape[-1]:
        return values
    grown = np.zeros((*values.shape[:-1], 2 * size), values.dtype)
    grown[..., : values.shape[-1]] = values
    return grown
