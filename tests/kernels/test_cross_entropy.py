"""Head and cross entropy in one: against the formula in float64, finite differences, ignored tokens, extreme logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels import head as module
from rolecall.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain

EXACT = 1e-12  # float64, the same sums in another order
SINGLE = 2e-5  # float32 against float64: logits of order 30 carry an absolute rounding of some 1e-6
STEP, DIFFERENCES = 1e-5, 1e-8  # of finite differences: an error of about STEP squared
HALF = 2e-2  # bfloat16 inputs; gradients are rounded to 3 digits


def case(N=13, D=8, V=37, padding=0, dtype=torch.float64, scale=1.0, ignored=0.3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(N, D, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_()
    head = torch.randn(V + padding, D, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=rng)
    targets[torch.rand(N, generator=rng) < ignored] = -100
    weights = torch.rand(N, generator=rng, dtype=torch.float64).to(torch.float32)
    return hidden, head, targets, weights


def loss_and_gradients(function, hidden, head, targets, **options):
    loss = function(hidden, head, targets, **options)
    return [loss, *torch.autograd.grad(1.7 * loss, (hidden, head))]


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance * size)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 20),
    D=st.integers(1, 9),
    V=st.integers(1, 40),
    padding=st.integers(0, 9),
    chunk=st.integers(0, 25),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([0.0, 3.0]),
    scale=st.sampled_from([1.0, -0.3]),
    weighted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_chunked_equals_plain(N, D, V, padding, chunk, ignored, softcap, scale, weighted, seed):
    hidden, head, targets, weights = case(N, D, V, padding, ignored=ignored, seed=seed)
    options = {"vocab": V, "softcap": softcap, "scale": scale, "weights": weights if weighted else None}
    found = loss_and_gradients(linear_cross_entropy, hidden, head, targets, chunk=chunk, **options)
    expected = loss_and_gradients(linear_cross_entropy_plain, hidden, head, targets, **options)
    assert_same(found, expected, EXACT)
    assert not found[2][V:].any(), "padding rows of the head have no gradient"
    assert not found[1][targets == -100].any(), "ignored tokens have no gradient"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_are_those_of_finite_differences(softcap):
    hidden, head, targets, weights = case(N=5, D=3, V=7, padding=2)
    options = {"weights": weights, "vocab": 7, "softcap": softcap, "chunk": 2}
    slopes = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, **options), (hidden, head))
    with torch.no_grad():
        for values, slope in zip((hidden, head), slopes, strict=True):
            for place in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
                ends = []
                for step in (STEP, -2 * STEP):
                    values[tuple(place)] += step
                    ends.append(linear_cross_entropy(hidden, head, targets, **options))
                values[tuple(place)] += STEP
                assert float((ends[0] - ends[1]) / (2 * STEP)) == pytest.approx(
                    float(slope[tuple(place)]), rel=DIFFERENCES, abs=DIFFERENCES
                )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, HALF), (torch.float16, HALF)])
def test_narrow_inputs(dtype, tolerance):
    hidden, head, targets, weights = case(N=64, D=32, V=500, dtype=dtype)
    found = loss_and_gradients(linear_cross_entropy, hidden, head, targets, weights=weights, chunk=10)
    wide = [values.detach().double().requires_grad_() for values in (hidden, head)]
    expected = loss_and_gradients(linear_cross_entropy_plain, *wide, targets, weights=weights)
    assert found[0].dtype == torch.float32
    assert [each.dtype for each in found[1:]] == [dtype, dtype]
    assert_same(found[:1], expected[:1], SINGLE)  # accumulated in float32 whatever the input
    assert_same(found[1:], expected[1:], tolerance)


@pytest.mark.parametrize("scale", [1e4, 1e10, 1e30])
def test_extreme_logits(scale):
    """Logits of up to 1e31: the loss is the distance of two logits, and its gradients are finite."""
    hidden, head, targets, _ = case(dtype=torch.float32, scale=scale)
    found = loss_and_gradients(linear_cross_entropy, hidden, head, targets, chunk=4)
    expected = loss_and_gradients(
        linear_cross_entropy_plain, *(each.detach().double().requires_grad_() for each in (hidden, head)), targets
    )
    assert all(values.isfinite().all() for values in found)
    assert_same(found, expected, SINGLE)


def test_nothing_counts():
    """All tokens ignored, all of weight 0, no tokens at all: the loss is 0 and so are the gradients, whatever the states are."""
    hidden, head, targets, weights = case()
    for kind in ("ignored", "weightless", "none"):
        rows = slice(0, 0) if kind == "none" else slice(None)
        at = torch.full_like(targets, -100) if kind == "ignored" else targets
        nothing = torch.zeros_like(weights) if kind == "weightless" else weights
        found = loss_and_gradients(linear_cross_entropy, hidden[rows], head, at[rows], weights=nothing[rows])[0]
        assert found == 0
        states = torch.full_like(hidden, float("nan")).requires_grad_()
        loss = linear_cross_entropy(states[rows], head, at[rows], weights=nothing[rows])
        (slope,) = torch.autograd.grad(loss, head)
        assert loss == 0
        assert not slope.any()


def test_another_mark_of_ignored_tokens():
    hidden, head, targets, _ = case(ignored=0.0)
    targets[::2] = 0
    found = loss_and_gradients(linear_cross_entropy, hidden, head, targets, ignore=0)
    assert_same(found, loss_and_gradients(linear_cross_entropy_plain, hidden, head, targets, ignore=0), EXACT)


def test_ignored_tokens_are_not_projected_and_logits_are_never_whole(monkeypatch):
    rows = []
    plain = module.product
    monkeypatch.setattr(module, "product", lambda left, right: rows.append((left.shape, right.shape)) or plain(left, right))
    hidden, head, targets, _ = case(N=64, V=500, ignored=0.5)
    linear_cross_entropy(hidden, head, targets, chunk=10)
    projected = [left[0] for left, right in rows if right == (8, 500)]
    assert sum(projected) == int((targets != -100).sum()), "each token that counts is projected once, and no other"
    assert max(projected) == 10


def test_frozen_inputs_get_no_gradient():
    hidden, head, targets, _ = case()
    (slope,) = torch.autograd.grad(linear_cross_entropy(hidden, head.detach(), targets), hidden)
    assert slope.shape == hidden.shape
    (slope,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), head, targets), head)
    assert slope.shape == head.shape
    assert not linear_cross_entropy(hidden.detach(), head.detach(), targets).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, targets).requires_grad


def test_the_gradients_are_given_away_once():
    hidden, head, targets, _ = case()
    loss = linear_cross_entropy(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        loss.backward()


def test_refusals_say_what_to_do():
    hidden, head, targets, weights = case()
    for function in (linear_cross_entropy, linear_cross_entropy_plain):
        with pytest.raises(ValueError, match=r"targets \(12,\).*targets \[K\]"):
            function(hidden, head, targets[1:])
        with pytest.raises(ValueError, match=r"weights \(12,\)"):
            function(hidden, head, targets, weights=weights[1:])
        with pytest.raises(ValueError, match=r"vocab=38.*37 rows"):
            function(hidden, head, targets, vocab=38)
        with pytest.raises(ValueError, match="chunk=-1"):
            function(hidden, head, targets, chunk=-1)
        with pytest.raises(ValueError, match="softcap=-1"):
            function(hidden, head, targets, softcap=-1)
        with pytest.raises(ValueError, match="no gradient"):
            function(hidden, head, targets, weights=weights.requires_grad_())
        weights = weights.detach()
