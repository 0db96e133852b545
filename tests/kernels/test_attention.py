"""Attention over packed rows: the mask against words, every way to compute it against the formula in float64, gradients included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import packed, packs
from rolecall.kernels import attention as attention_module
from rolecall.kernels.attention import Dense, Packed, attend, attend_plain, attend_slots, packed_mask
from rolecall.kernels.attention_cpu import CpuJob, find_blocks
from rolecall.kernels.attention_cudnn import _rounded, find_sequences
from rolecall.kernels.attention_flash import find_line
from rolecall.kernels.attention_flex import BLOCK, find_grid, make_block_mask
from rolecall.kernels.attention_spans import by_job
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close

EXACT = 1e-12  # float64: sums of a few dozen products of order 1
HALF = 2e-2  # bfloat16, values of order 1
CPU = torch.device("cpu")


def by_words(where):
    """A slot sees what is not after it and is of its own segment or of one that this continues; an empty one, itself."""
    segments, parents = where.segments, where.parents
    rows, capacity = segments.shape
    mask = torch.zeros(rows, 1, capacity, capacity, dtype=torch.bool)
    for row in range(rows):
        for query in range(capacity):
            family, segment = set(), int(segments[row, query])
            while segment >= 0:
                family.add(segment)
                segment = int(parents[segment])
            for key in range(query + 1):
                mask[row, 0, query, key] = key == query or int(segments[row, key]) in family
    return mask


def inputs(rows, heads, groups, slots, size, seed=0, dtype=torch.float64, sinks=False):
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, number, slots, size, generator=rng, dtype=dtype).requires_grad_() for number in (heads, groups, groups)]
    return [*parts, torch.randn(heads, generator=rng, dtype=dtype).requires_grad_() if sinks else None]


def compare(found, expected, parts, used, tolerance=EXACT):
    """Values at slots that have a segment, and the gradients of a loss over those."""
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype) * used
    assert bool(torch.isfinite(found).all())
    assert_close(found * used, expected * used, atol=tolerance, rtol=tolerance)
    slopes = [torch.autograd.grad((out * weights).sum(), parts) for out in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        assert_close(one, other, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=80)
@given(packs(10, 3))
def test_mask_is_what_the_words_say(where):
    """Random forests of segments, chains of parents included, in rows with gaps."""
    assert torch.equal(packed_mask(where.segments, where.parents), by_words(where))
    assert torch.equal(where.dense(), by_words(where))


def test_every_slot_sees_something():
    """A row of a softmax without a single True would be NaN, and NaN spreads through the values of later layers."""
    mask = packed_mask(torch.full((2, 5), -1), torch.zeros(0, dtype=torch.int32))
    assert torch.equal(mask[0, 0], torch.eye(5, dtype=torch.bool))


@settings(deadline=None, max_examples=60)
@given(packs(24), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.sampled_from([0, 1, 3, 7]), st.booleans(), st.sampled_from([0.0, 0.8]))
def test_attend_is_the_formula(where, heads, window, sinks, softcap):
    """What is chosen on a CPU, values and gradients."""
    *parts, sink = inputs(2, *heads, 24, 4, sinks=sinks)
    options = {"window": window, "scale": 0.6, "softcap": softcap, "sinks": sink}
    used = (where.segments >= 0)[:, None, :, None]
    wanted = [*parts, sink] if sinks else parts
    compare(attend(*parts, where, **options), attend_plain(*parts, where, **options), wanted, used)


@settings(deadline=None, max_examples=60)
@given(packs(24), st.sampled_from([0, 1, 3, 7]), st.booleans())
def test_rectangles_are_the_formula(where, window, sinks):
    """Flash kernels on rectangles, also where a dense mask would be quicker."""
    *parts, sink = inputs(2, 4, 2, 24, 4, sinks=sinks)
    found = by_job(*parts, CpuJob(find_blocks(where.found, window), 0.6), sink)
    used = (where.segments >= 0)[:, None, :, None]
    wanted = [*parts, sink] if sinks else parts
    compare(found, attend_plain(*parts, where, window=window, scale=0.6, sinks=sink), wanted, used)


def test_gradients_by_finite_differences():
    """Neither the formula nor autograd is trusted here."""
    where = packed([[(3, [2, 1]), -1, 1]], 8)
    *parts, sink = inputs(1, 2, 1, 8, 2, sinks=True)
    for window in (0, 2):
        job = CpuJob(find_blocks(where.found, window), 0.6)
        assert torch.autograd.gradcheck(lambda q, k, v, sink, job=job: by_job(q, k, v, job, sink), (*parts, sink))
    assert torch.autograd.gradcheck(lambda *given: attend(*given[:3], where, scale=0.6, softcap=0.7, sinks=given[3]), (*parts, sink))


@pytest.mark.parametrize("rows", [[[1]], [[1, 1, 1]], [[64]], [[-64]], [[-3, 1, -60]], [[63, 1], [1, 63], [-64]]], ids=str)
def test_segments_of_one_token_and_of_a_whole_row(rows):
    capacity = max(sum(abs(item) for item in row) for row in rows)
    where = packed(rows, capacity)
    *parts, _ = inputs(len(rows), 4, 2, capacity, 8)
    used = (where.segments >= 0)[:, None, :, None]
    compare(attend(*parts, where, scale=0.3), attend_plain(*parts, where, scale=0.3), parts, used)


def test_extreme_logits():
    """Weights of exactly 0 and 1, no overflow."""
    where = packed([[40, 24]], 64)
    *parts, _ = inputs(1, 2, 2, 64, 8)
    compare(attend(*parts, where, scale=500.0), attend_plain(*parts, where, scale=500.0), parts, 1.0, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    where = packed([[(20, [10, 30]), 4], [50, 14]], 64)
    q, k, v, _ = inputs(2, 4, 2, 64, 8, dtype=dtype)
    found = attend(q, k, v, where, scale=0.3)
    assert found.dtype == dtype
    expected = attend_plain(*(part.double() for part in (q, k, v)), where, scale=0.3)
    assert_close(found.double(), expected, atol=HALF if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_slots_first_is_the_same():
    where = packed([[20, 12]], 32)
    *parts, _ = inputs(1, 4, 2, 32, 8)
    turned = [part.transpose(1, 2) for part in parts]
    compare(attend_slots(*turned, where, window=5, scale=0.3).transpose(1, 2), attend(*parts, where, window=5, scale=0.3), parts, 1.0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 6), st.sampled_from([0, 2, 4]), st.booleans(), st.sampled_from([0.0, 0.7]))
def test_cached_keys(rows, queries, before, window, sinks, softcap):
    """Decoding and prefill after a shared beginning: as the last queries of whole rows."""
    keys = before + queries
    positions = torch.arange(keys).expand(rows, -1)
    mask = (positions[:, None, -queries:, None] >= positions[:, None, None, :]).clone()
    mask[0, :, :, : before // 2] = False  # padding on the left
    q, k, v, sink = inputs(rows, 4, 2, keys, 4, sinks=sinks)
    q = q[:, :, -queries:]
    where = Dense(mask, positions[:, -queries:], positions)
    options = {"window": window, "scale": 0.5, "softcap": softcap, "sinks": sink}
    assert_close(attend(q, k, v, where, **options), attend_plain(q, k, v, where, **options), atol=EXACT, rtol=EXACT)


@settings(deadline=None, max_examples=30)
@given(packs(5 * BLOCK - 17), st.sampled_from([0, 1, 100, 300]))
def test_block_mask_is_what_pytorch_would_make(where, window):
    """All lists of blocks, both ways round, and without gaps in memory: the backward kernels take that for granted."""
    mask = make_block_mask(where.found, where.positions, window, CPU)
    rows, slots = where.segments.shape
    expected = create_block_mask(mask.mask_mod, rows, None, slots, slots, device="cpu", BLOCK_SIZE=BLOCK)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, numbers = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        assert counts.is_contiguous()
        assert numbers.is_contiguous()
        assert (counts.dtype, numbers.dtype) == (torch.int32, torch.int32)
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), name
        listed = torch.arange(numbers.shape[-1]) < counts[..., None]
        assert torch.equal(numbers * listed, getattr(expected, f"{name}_indices") * listed), name
    index = torch.arange(slots)
    seen = mask.mask_mod(torch.arange(rows)[:, None, None], 0, index[None, :, None], index[None, None, :])
    used = where.segments >= 0
    assert torch.equal(seen & used[:, :, None], where.dense(window)[:, 0] & used[:, :, None])
    assert bool(seen.diagonal(dim1=1, dim2=2).all()), "a slot without a segment sees itself"
    some, full = find_grid(where.found, window)
    assert bool((torch.from_numpy(some) | ~torch.from_numpy(full)).all())


@settings(deadline=None, max_examples=60)
@given(packs(40, 3, families=False))
def test_sequences_and_lines_cover_every_slot_once(where):
    """What kernels for sequences are given: every segment, and nothing unwritten between them."""
    found, total = where.found, where.segments.numel()
    line = find_line(found, CPU)
    edges = line.edges.tolist()
    assert (edges[0], edges[-1]) == (0, total)
    assert max(right - left for left, right in pairwise(edges)) == line.longest
    assert set(found.start.tolist()) <= set(edges)
    assert set((found.start + found.length).tolist()) <= set(edges)
    sequences = find_sequences(found, CPU)
    lengths = sequences.lengths.flatten().tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) <= sequences.longest
    assert len(sequences.starts) == len(lengths) + 1
    covered = [slot for start, length in zip(sequences.starts.tolist(), lengths, strict=False) for slot in range(start, start + length)]
    gaps = [] if sequences.gaps is None else sequences.gaps.tolist()
    assert sorted(covered + gaps) == list(range(total))


@given(st.integers(1, 10**6), st.sampled_from([8, 128]))
def test_rounded_shapes_are_few_and_near(value, least):
    found = _rounded(value, least)
    assert value <= found <= max(least, value + least, value * 1.25 + least)
    assert found % least == 0
    assert bin(found // least).count("1") <= 3


def test_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"segments \(1, 4\).*give segments \[R, C\]"):
        Packed(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([-1]), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask \(1, 1, 2, 4\).*give mask \[R, 1, C, K\]"):
        Dense(torch.ones(1, 1, 2, 4, dtype=torch.bool), torch.zeros(1, 3), torch.zeros(1, 4))
    where = packed([[4]], 4)
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match="H a multiple of G"):
        attend(q, q[:, :3], q[:, :3], where, scale=1.0)
    with pytest.raises(ValueError, match=r"\(rows, queries, keys\) \(1, 4, 4\)"):
        attend(q[:, :, :3], q, q, where, scale=1.0)
    with pytest.raises(ValueError, match=r"window=-1.*0 for no window"):
        attend(q, q, q, where, scale=1.0, window=-1)
    with pytest.raises(ValueError, match=r"softcap=-1\.0"):
        attend(q, q, q, where, scale=1.0, softcap=-1.0)
    with pytest.raises(ValueError, match=r"sinks \(3,\)\. There is: 4 heads"):
        attend(q, q, q, where, scale=1.0, sinks=torch.zeros(3))


BAD = {
    "parents of all segments": ([[0, 1]], [-1], [[0, 0]]),
    "number the segments from 0": ([[0, 0]], [3], [[0, 1]]),
    r"tile the rows.*segment 0 in 2 pieces.*neighbouring slots": ([[0, 1, 0]], [-1, -1], [[0, 0, 1]]),
    r"segment 0 in 2 pieces": ([[0, 0], [0, 0]], [-1], [[0, 1], [2, 3]]),
    "circle": ([[0, 1]], [1, 0], [[0, 1]]),
    r"segment 1 in row 1 continues segment 0 in row 0": ([[0, 0], [1, 1]], [-1, 0], [[0, 1], [2, 3]]),
    r"segment 0 in row 0 continues segment 1 in row 0.*before what": ([[0, 1]], [1, -1], [[1, 0]]),
    r"position 5 after 0 in row 0, column 1.*count up by one": ([[0, 0]], [-1], [[0, 5]]),
}


@pytest.mark.parametrize("words", BAD, ids=str)
def test_segments_that_make_no_sense(words):
    segments, parents, positions = (torch.tensor(values) for values in BAD[words])
    where = Packed(segments, parents, positions)
    q = torch.zeros(*segments.shape[:1], 1, segments.shape[1], 8)
    with pytest.raises(ValueError, match=words):
        attend(q, q, q, where, scale=1.0)
    with pytest.raises(ValueError, match=words):
        attend_plain(q, q, q, where, scale=1.0)


def test_mask_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="parents of all segments"):
        packed_mask(torch.tensor([[0, 1]]), torch.tensor([-1]))
    with pytest.raises(ValueError, match="circle"):
        packed_mask(torch.tensor([[0, 1]]), torch.tensor([1, 0]))


def test_a_parent_without_slots_is_passed_over():
    """A prompt of no tokens: what continues it begins at its own parent."""
    where = Packed(torch.tensor([[0, 0, 2, 2]]), torch.tensor([-1, 0, 1]), torch.tensor([[0, 1, 2, 3]]))
    *parts, _ = inputs(1, 2, 2, 4, 4)
    compare(attend(*parts, where, scale=1.0), attend_plain(*parts, where, scale=1.0), parts, 1.0)
    assert bool(where.dense()[0, 0].tril().eq(torch.ones(4, 4).tril().bool()).all())


def test_heads_too_narrow_for_flex_attention_go_another_way(monkeypatch):
    """Its kernels refuse heads below 16, which a GPU tells only when it compiles."""
    monkeypatch.setattr(attention_module, "_knows_flash", lambda device: True)
    where = packed([[(100, [30, 20])]], 256)
    q, k = torch.zeros(1, 4, 256, 8), torch.zeros(1, 2, 256, 8)
    assert attention_module._on_gpu(q, k, k, where, 0, 1.0, 0.0, None) is None
