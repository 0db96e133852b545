"""Attention on a GPU: the committed choice of kernels against the formula in float64, values and all gradients.

Each case says which kernels should have answered where they can; the numbers must be right whichever did.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import packed, packs
from rolecall.kernels import attention_cudnn
from rolecall.kernels.attention import Packed, attend, attend_plain, attend_slots

pytestmark = pytest.mark.gpu
NEAR = 1.2e-2  # of the norm: bfloat16 rounds inputs of products, weights and results, 2e-3 each; measured 2e-3 to 4e-3
NOTHING = 0.1  # a query of one key has no gradient, but the difference of two products (11 on average) that bfloat16 rounds, 4e-3 each
PLAIN = [[300, 1, 128, 511, 84], [1024]]
GAPS = [[300, -100, 1, 127, -7, 400], [130, -500, 3]]
FAMILIES = [[(200, [30, 1, 200]), 100, (300, [64, 90])], [(50, [500, 400]), -20]]
SEQUENCES = {
    "whole rows": (PLAIN, {}),
    "gaps": (GAPS, {}),
    "window": (PLAIN, {"window": 100}),
    "window of one": (GAPS, {"window": 1}),
    "sinks": (GAPS, {"sinks": True}),
    "sinks and window": (PLAIN, {"sinks": True, "window": 100}),
    "heads of 64": (GAPS, {"size": 64, "heads": (9, 3)}),
    "heads of 64, window, sinks": (GAPS, {"size": 64, "heads": (9, 3), "window": 70, "sinks": True}),
    "heads of 80": (GAPS, {"size": 80}),
    "heads of 256": (GAPS, {"size": 256, "window": 200}),
    "one key head": (GAPS, {"heads": (7, 1)}),
    "no groups": (GAPS, {"heads": (3, 3)}),
    "float16": (GAPS, {"dtype": torch.float16}),
    "many short ones": ([[5] * 200, [1] * 1024], {}),
    "head-major": (PLAIN, {"layout": "heads"}),
    "slices of one tensor": (GAPS, {"layout": "slices"}),
    "nothing at all": ([[-1024], [-1024]], {}),
}
OTHERS = {
    "families": (FAMILIES, {}),
    "families, window": (FAMILIES, {"window": 100}),
    "families, sinks": (FAMILIES, {"sinks": True}),
    "families, heads of 8": (FAMILIES, {"size": 8}),
    "families, heads of 64": (FAMILIES, {"size": 64, "heads": (9, 3)}),
    "families, heads of 80, head-major": (FAMILIES, {"size": 80, "layout": "heads"}),
    "families, heads of 256": (FAMILIES, {"size": 256, "window": 100}),
    "families in rows that blocks don't divide": ([[(200, [30, 1, 200]), 100], [(50, [500, 400])]], {"capacity": 1000}),
    "families in short rows": ([[(20, [30, 1]), 10], [(50, [5, 9])]], {"capacity": 70}),
    "soft cap": (GAPS, {"softcap": 5.0}),
    "soft cap, window, families": (FAMILIES, {"softcap": 5.0, "window": 100}),
}


@pytest.fixture(autouse=True)
def _device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def inputs(rows, heads, groups, slots, size, layout, dtype):
    """Queries, keys and values as models make them, heads of a slot side by side, or otherwise."""
    rng = torch.Generator("cuda").manual_seed(0)

    def one(number):
        if layout == "heads":
            return torch.randn(rows, number, slots, size, generator=rng, device="cuda", dtype=dtype)
        extra = 2 if layout == "slices" else 0
        whole = torch.randn(rows, slots, number + extra, size, generator=rng, device="cuda", dtype=dtype)
        return whole[:, :, extra // 2 : extra // 2 + number].transpose(1, 2)

    return [one(number).detach().requires_grad_() for number in (heads, groups, groups)]


def distance(found, expected):
    gap = float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-9))
    return gap if gap == gap else float("inf")


def split(slope, alone):
    """A gradient [R, H, C, d] without some slots [R, C], and the greatest number at these."""
    apart = alone[:, None, :, None]
    return slope * ~apart, float((slope * apart).abs().max())


def check(where, *, window=0, softcap=0.0, sinks=False, size=128, heads=(4, 2), layout="slots", dtype=torch.bfloat16):
    rows, slots = where.segments.shape
    parts = inputs(rows, *heads, slots, size, layout, dtype)
    sink = torch.randn(heads[0], device="cuda", requires_grad=True) if sinks else None
    used = (where.segments >= 0)[:, None, :, None].cuda()
    wanted = [*parts, sink] if sinks else parts
    exact = [part.detach().double().requires_grad_() for part in wanted]
    on_device = Packed(where.segments.cuda(), where.parents.cuda(), where.positions.cuda())
    options = {"window": window, "scale": 0.088, "softcap": softcap}
    expected = attend_plain(*exact[:3], on_device, sinks=exact[3] if sinks else None, **options)
    weights = torch.randn(rows, slots, heads[0], size, device="cuda", dtype=dtype).transpose(1, 2) * used
    # What a kernel leaves unwritten must not pass for right: memory it may get is full of NaN.
    poison = [torch.full((rows, heads[0], slots, size), float("nan"), device="cuda", dtype=dtype) for _ in range(5)]
    del poison
    found = attend(*parts, where, sinks=sink, **options)
    slopes = torch.autograd.grad(found, wanted, weights)
    assert found.dtype == dtype
    for one in (found, *slopes):
        assert bool(torch.isfinite(one).all())
    if bool(used.any()):
        distances = [distance(found * used, expected * used)]
        seen = on_device.dense(window)[:, 0]
        one_key = (seen.sum(2) == 1) & (not sinks)  # a sink is one more to choose from
        unchanged = one_key, ~(seen & ~one_key[:, :, None]).any(1)  # queries, and keys that only such queries see
        pairs = list(zip(slopes, torch.autograd.grad(expected, exact, weights.double()), strict=True))
        for (slope, wide), alone in zip(pairs[:2], unchanged, strict=True):
            kept, rest = split(slope, alone)
            assert rest < NOTHING, rest
            distances.append(distance(kept, split(wide, alone)[0]))
        distances += [distance(*pair) for pair in pairs[2:]]
        assert max(distances) < NEAR, distances


@pytest.mark.parametrize("forced", [False, True], ids=["chosen", "PyTorch's"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name, forced, monkeypatch):
    rows, options = SEQUENCES[name]
    if forced:
        monkeypatch.setattr(attention_cudnn, "SIZES", ())
        monkeypatch.setattr(attention_cudnn, "WINDOWED", ())
    check(packed(rows, 1024), **options)


@pytest.mark.parametrize("name", OTHERS)
def test_families_and_caps(name):
    rows, options = OTHERS[name]
    options = dict(options)
    check(packed(rows, options.pop("capacity", 1024)), **options)


@settings(deadline=None, max_examples=25)
@given(packs(384, families=False), st.sampled_from([0, 1, 64, 200]), st.sampled_from([64, 128, 256]))
def test_any_sequences(where, window, size):
    check(where, window=window, size=size)


@settings(deadline=None, max_examples=15)
@given(packs(384), st.sampled_from([0, 64]))
def test_any_families(where, window):
    check(where, window=window)


def test_another_stream_and_a_second_backward():
    """Kernels run on the current stream, and what is kept between calls is not used up."""
    where = packed(GAPS, 1024)
    parts = inputs(2, 4, 2, 1024, 128, "slots", torch.bfloat16)
    first = attend(*parts, where, scale=0.088)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = attend(*parts, where, scale=0.088)
        twice = [torch.autograd.grad(second.sum(), parts, retain_graph=True) for _ in range(2)]
    torch.cuda.synchronize()
    assert torch.equal(first, second)
    for one, other in zip(*twice, strict=True):
        assert distance(one, other.double()) < NEAR


def test_compiled_models_meet_no_copies():
    """Slots first: what goes in and comes back lies in memory as it is indexed."""
    where = packed(PLAIN, 1024)
    parts = [part.transpose(1, 2) for part in inputs(2, 4, 2, 1024, 128, "slots", torch.bfloat16)]
    out = attend_slots(*parts, where, scale=0.088)
    assert out.is_contiguous()
    assert all(slope.is_contiguous() for slope in torch.autograd.grad(out.sum(), parts))
