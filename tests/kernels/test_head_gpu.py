"""The fused head on a Hopper GPU: against float64, at awkward sizes, with chunks that don't divide, and where exponentials overflow."""

from __future__ import annotations

import pytest
import torch
from rolecall.kernels import head_fused
from rolecall.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from rolecall.kernels.distillation import distill, distill_plain, distill_top, distill_top_plain
from rolecall.kernels.head_fused import fused
from rolecall.kernels.logprobs import token_logprobs, token_logprobs_plain

pytestmark = pytest.mark.gpu
LOGPROB = 2e-5  # nats: tensor cores truncate float32 sums of 1024 terms of order 10; the mean of that is made good, 3e-6 of spread stays
BIAS = 3e-6  # nats, the mean of 512 such errors; it is 1e-5 and more where nothing is made good
LOSS = 1e-5  # of itself
GRADIENT = 6e-3  # of the norm: bfloat16 (2e-3 each time) for gradients of logits, states times factors, sums of chunks, the result
CASES = [  # tokens, hidden size, vocabulary, rows of the head, soft cap, scale, chunk
    (1000, 256, 5003, 5056, 0.0, 1.0, 0),
    (777, 512, 5003, 5003, 5.0, 0.7, 300),
    (300, 1024, 151936, 151936, 0.0, 1.0, 0),
    (129, 72, 65, 65, 0.0, -0.5, 128),
    (1, 8, 3, 64, 0.0, 1.0, 0),
    (4000, 64, 1000, 1024, 30.0, 1.0, 1000),
]


def case(K, D, V, rows, seed=0):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(K, D, generator=rng, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(rows, D, generator=rng, device="cuda") * (3 / D**0.5)).to(torch.bfloat16).requires_grad_()
    if fused(hidden, head) is None:
        pytest.skip("no Hopper GPU with Triton")
    return hidden, head, torch.randint(0, V, (K,), generator=rng, device="cuda"), torch.rand(K, generator=rng, device="cuda")


def wide(*tensors):
    return [values.detach().double().requires_grad_() for values in tensors]


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("K", "D", "V", "rows", "softcap", "scale", "chunk"), CASES)
@pytest.mark.parametrize("entropies", [True, False])
def test_logprobs(K, D, V, rows, softcap, scale, chunk, entropies):
    hidden, head, targets, weights = case(K, D, V, rows)
    options = {"temperature": 0.8, "vocab": V, "softcap": softcap, "scale": scale}
    found = token_logprobs(hidden, head, targets, chunk=chunk, **options)
    exact = wide(hidden, head)
    expected = token_logprobs_plain(*exact, targets, **options)
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).abs().max()) < LOGPROB
    total, other_total = ((pair[0] * weights).sum() + (pair[1].square().sum() if entropies else 0) for pair in (found, expected))
    slopes = torch.autograd.grad(total, (hidden, head))
    for one, other in zip(slopes, torch.autograd.grad(other_total, exact), strict=True):
        assert distance(one, other) < GRADIENT
    assert not slopes[1][V:].any()


def test_what_tensor_cores_truncate_is_made_good(monkeypatch):
    hidden, head, targets, _ = case(512, 1024, 151936, 151936)
    with torch.no_grad():
        expected = token_logprobs_plain(*wide(hidden, head), targets, temperature=0.8)[0]
        made_good = token_logprobs(hidden, head, targets, temperature=0.8)[0]
        monkeypatch.setattr(head_fused, "TRUNCATED", 0.0)
        truncated = token_logprobs(hidden, head, targets, temperature=0.8)[0]
    assert abs(float((made_good - expected).mean())) < BIAS < float((truncated - expected).mean())


@pytest.mark.parametrize(("K", "D", "V", "rows", "softcap", "scale", "chunk"), CASES)
def test_cross_entropy(K, D, V, rows, softcap, scale, chunk):
    hidden, head, targets, weights = case(K, D, V, rows)
    targets = torch.where(weights < 0.3, -100, targets) if K > 1 else targets
    options = {"weights": weights, "vocab": V, "softcap": softcap, "scale": scale}
    loss = linear_cross_entropy(hidden, head, targets, chunk=chunk, **options)
    exact = wide(hidden, head)
    expected = linear_cross_entropy_plain(*exact, targets, **options)
    assert abs(float(loss.detach() / expected.detach()) - 1) < LOSS
    slopes = torch.autograd.grad(1.5 * loss, (hidden, head))
    for one, other in zip(slopes, torch.autograd.grad(1.5 * expected, exact), strict=True):
        assert distance(one, other) < GRADIENT
    assert not slopes[1][V:].any()
    assert not slopes[0][targets == -100].any()
    with torch.no_grad():
        assert abs(float(linear_cross_entropy(hidden, head, targets, chunk=chunk, **options) / expected) - 1) < LOSS


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation(beta):
    """Not fused: chunks of float32 logits from bfloat16 products."""
    hidden, head, _, weights = case(300, 64, 5003, 5056)
    teacher_hidden, teacher_head, *_ = case(300, 128, 5003, 5003, seed=1)
    teacher = teacher_hidden.detach(), teacher_head.detach()
    logprobs, tokens = torch.log_softmax((teacher[0] @ teacher[1].T).float(), -1).topk(20)
    for function, plain, given in (
        (distill, distill_plain, teacher),
        (distill_top, distill_top_plain, (tokens, logprobs)),
    ):
        found = function(hidden, head, *given, beta=beta, vocab=5003, chunk=128)
        exact = wide(hidden, head)
        expected = plain(*exact, *(each.double() if each.is_floating_point() else each for each in given), beta=beta, vocab=5003)
        assert float((found.double() - expected).abs().max()) < 5 * LOGPROB  # of two models' logits
        slopes = torch.autograd.grad((found * weights).sum(), (hidden, head))
        for one, other in zip(slopes, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
            assert distance(one, other) < GRADIENT


def test_overflowing_exponentials_are_computed_again():
    """Logits of thousands: the fused way sees that its sums overflow, and the answer is that of the other."""
    hidden, head, targets, _ = case(300, 64, 1000, 1000)
    far = (1000 * hidden).detach().requires_grad_()
    loss = linear_cross_entropy(far, head, targets)
    exact = wide(far, head)
    expected = linear_cross_entropy_plain(*exact, targets)
    assert abs(float(loss.detach() / expected.detach()) - 1) < LOSS
    for one, other in zip(torch.autograd.grad(loss, (far, head)), torch.autograd.grad(expected, exact), strict=True):
        assert distance(one, other) < GRADIENT


def test_nothing_counts_and_frozen_inputs():
    hidden, head, targets, weights = case(300, 64, 1000, 1000)
    loss = linear_cross_entropy(hidden, head, torch.full_like(targets, -100))
    assert loss == 0
    assert not any(slope.any() for slope in torch.autograd.grad(loss, (hidden, head)))
    (one,) = torch.autograd.grad(linear_cross_entropy(hidden, head.detach(), targets, weights=weights), hidden)
    (other,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights=weights), hidden)
    assert torch.equal(one, other)
    (one,) = torch.autograd.grad((token_logprobs(hidden.detach(), head, targets)[0] * weights).sum(), head)
    (other,) = torch.autograd.grad((token_logprobs(hidden, head, targets)[0] * weights).sum(), head)
    assert torch.equal(one, other)


def test_the_same_twice():
    """No sum depends on the order in which programs finish."""
    hidden, head, targets, _ = case(3000, 256, 30001, 30001)
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, head, targets)
        runs.append(
            [loss.detach(), *torch.autograd.grad(loss, (hidden, head)), *(each.detach() for each in token_logprobs(hidden, head, targets))]
        )
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
