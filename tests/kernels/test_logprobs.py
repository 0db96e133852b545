"""The chunked logprobs: against the plain ones in float64, finite differences, and extreme logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels import head as module
from rolecall.kernels.logprobs import token_logprobs, token_logprobs_plain

EXACT = 1e-12  # float64, the same sums in another order
SINGLE = 2e-5  # float32 against float64: logits of order 30 carry an absolute rounding of some 1e-6
HALF = 2e-2  # bfloat16 inputs are rounded to 3 digits before either version sees them; the gradient once more after


def case(K=13, D=8, V=37, dtype=torch.float64, scale=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(K, D, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, V, (K,), generator=rng)


def both_and_gradients(function, hidden, head, targets, **options):
    """Results of a function, and the gradients of a sum that weighs each token's two results differently."""
    results = function(hidden, head, targets, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(targets), generator=rng, dtype=torch.float64).to(result.dtype) for result in results]
    total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, (hidden, head))]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("chunk", [0, 1, 5, 13, 100])
def test_chunked_equals_plain(chunk, temperature):
    found = both_and_gradients(token_logprobs, *case(), temperature=temperature, chunk=chunk)
    expected = both_and_gradients(token_logprobs_plain, *case(), temperature=temperature)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(0, 20),
    D=st.integers(1, 9),
    V=st.integers(1, 40),
    padding=st.integers(0, 9),
    chunk=st.integers(0, 25),
    softcap=st.sampled_from([0.0, 3.0]),
    scale=st.sampled_from([1.0, -0.3]),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 9),
)
def test_padding_soft_cap_and_scale(K, D, V, padding, chunk, softcap, scale, temperature, seed):
    hidden, head, targets = case(K, D, V + padding, seed=seed)
    options = {"vocab": V, "softcap": softcap, "scale": scale, "temperature": temperature}
    found = both_and_gradients(token_logprobs, hidden, head, targets % V, chunk=chunk, **options)
    expected = both_and_gradients(token_logprobs_plain, hidden, head, targets % V, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    assert not found[3][V:].any(), "padding rows of the head have no gradient"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_with_a_soft_cap_are_those_of_finite_differences(softcap):
    hidden, head, targets = case(K=5, D=3, V=9)
    options = {"vocab": 7, "softcap": softcap, "scale": 0.6, "temperature": 0.7, "chunk": 2}
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets % 7, **options), (hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_finite_differences(temperature):
    hidden, head, targets = case(K=5, D=3, V=7)
    for which in (0, 1):  # logprobs alone, entropy alone: each may get no gradient
        assert torch.autograd.gradcheck(
            lambda h, w, which=which: token_logprobs(h, w, targets, temperature=temperature, chunk=2)[which], (hidden, head)
        )
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, temperature=temperature, chunk=2), (hidden, head))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
def test_narrow_inputs(dtype, tolerance):
    """Results are float32; against float64 from the same, already rounded inputs."""
    hidden, head, targets = case(K=64, D=32, V=500, dtype=dtype)
    found = both_and_gradients(token_logprobs, hidden, head, targets, temperature=0.9, chunk=10)
    wide = [values.detach().double().requires_grad_() for values in (hidden, head)]
    expected = both_and_gradients(token_logprobs_plain, *wide, targets, temperature=0.9)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=SINGLE, atol=SINGLE)  # accumulated in float32 whatever the input
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("scale", [1e4, 1e10, 1e30])
def test_extreme_logits_stay_finite(scale):
    """Logits of up to 1e31 in float32: the softmax is one-hot, the entropy 0, nothing overflows."""
    hidden, head, targets = case(dtype=torch.float32, scale=scale)
    with torch.no_grad():
        likely = (hidden @ head.T).argmax(-1)
    found = both_and_gradients(token_logprobs, hidden, head, torch.where(torch.arange(len(likely)) % 2 == 0, likely, targets), chunk=4)
    assert all(values.isfinite().all() for values in found)
    assert (found[0] <= 0).all()
    assert (found[0][::2] == 0).all(), "the most likely token has all the mass"
    assert (found[1].abs() < 1e-3).all()


def test_equal_logits_have_the_entropy_of_the_uniform_distribution():
    logprobs, entropy = token_logprobs(torch.zeros(3, 4), torch.randn(50, 4), torch.tensor([0, 1, 49]))
    torch.testing.assert_close(entropy, torch.full((3,), 50.0).log())
    torch.testing.assert_close(logprobs, -entropy)


def test_frozen_inputs_get_no_gradient():
    hidden, head, targets = case()
    head = head.detach()
    (slope,) = torch.autograd.grad(token_logprobs(hidden, head, targets)[0].sum(), hidden)
    assert slope.shape == hidden.shape
    assert not token_logprobs(hidden.detach(), head, targets)[0].requires_grad
    logprobs, entropy = token_logprobs(hidden[:0], head, targets[:0])
    assert logprobs.shape == entropy.shape == (0,)


def test_logits_are_never_whole(monkeypatch):
    """Of K = 64 tokens, the largest product with the head has as many rows as a chunk."""
    rows = []
    plain = module.product
    monkeypatch.setattr(module, "product", lambda left, right: rows.append(left.shape[0]) or plain(left, right))
    hidden, head, targets = case(K=64, V=500)
    token_logprobs(hidden, head, targets, chunk=10)[0].sum().backward()
    assert rows
    assert max(rows) == 10
    monkeypatch.setitem(module.LOGITS, "cpu", 500 * 7)
    rows.clear()
    token_logprobs(hidden, head, targets)
    assert max(rows) == 7


def test_refusals_say_what_to_do():
    hidden, head, targets = case()
    for function in (token_logprobs, token_logprobs_plain):
        with pytest.raises(ValueError, match=r"targets \(12,\).*targets \[K\]"):
            function(hidden, head, targets[1:])
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature"):
                function(hidden, head, targets, temperature=temperature)
        with pytest.raises(ValueError, match=r"vocab=38.*37 rows"):
            function(hidden, head, targets, vocab=38)
        with pytest.raises(ValueError, match="chunk=-1"):
            function(hidden, head, targets, chunk=-1)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, HALF)])
def test_on_a_gpu(dtype, tolerance):
    """The products of bfloat16 tensors are kept in float32; gradients as far off as bfloat16 allows."""
    hidden, head, targets = (values.detach().cuda() for values in case(K=300, D=64, V=5000, dtype=dtype))
    hidden.requires_grad_(), head.requires_grad_()
    found = both_and_gradients_on(token_logprobs, hidden, head, targets, chunk=64)
    wide = [values.detach().double().requires_grad_() for values in (hidden, head)]
    expected = both_and_gradients_on(token_logprobs_plain, *wide, targets)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        limit = 1e-4 if number < 2 else tolerance
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit * float(other.abs().max()))


def both_and_gradients_on(function, hidden, head, targets, **options):
    results = function(hidden, head, targets, **options)
    weights = torch.linspace(-1, 1, len(targets), dtype=torch.float64, device=targets.device)
    total = sum((result * weights.to(result.dtype)).sum() for result in results)
    return [*results, *torch.autograd.grad(total, (hidden, head))]
