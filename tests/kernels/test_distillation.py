"""Distillation through the head: against the formula in float64, finite differences, the tail, extreme logits, TRL's own divergence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels import distillation as module
from rolecall.kernels.distillation import distill, distill_plain, distill_top, distill_top_plain

EXACT = 1e-11  # float64, the same sums in another order
SINGLE = 3e-5  # float32 against float64: logits of order 30 carry an absolute rounding of some 1e-6
SLOPE = 1e-4  # its gradients: in the reverse KL products with differences of logprobs of that order
HALF = 2e-2  # bfloat16 inputs; gradients are rounded to 3 digits
BETAS = [0.0, 0.3, 1.0]


def case(K=6, D=5, V=23, padding=0, k=4, dtype=torch.float64, scale=1.0, seed=0, named=None):
    """Student, a teacher of another width, and the teacher's likeliest k tokens; row i of them names named[i] if that is given."""
    rng = torch.Generator().manual_seed(seed)
    student = [scale * torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((K, D), (V + padding, D))]
    teacher = [scale * torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((K, D + 2), (V, D + 2))]
    logprobs, tokens = torch.log_softmax(teacher[0] @ teacher[1].T, -1).topk(min(k, V))
    if named is not None:
        gone = torch.arange(logprobs.shape[1]) >= torch.tensor(named)[:, None]
        logprobs = logprobs.masked_fill(gone, -torch.inf)
        tokens = tokens.masked_fill(gone, -1)
    student = [values.to(dtype).requires_grad_() for values in student]
    return student, [values.to(dtype) for values in teacher], (tokens, logprobs)


def results(function, student, teacher, **options):
    losses = function(*student, *teacher, **options)
    weights = torch.linspace(-1, 2, len(losses), dtype=losses.dtype)
    return [losses, *torch.autograd.grad((losses * weights).sum(), student)]


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance * max(size, 1e-3))


@settings(max_examples=50, deadline=None)
@given(
    K=st.integers(0, 9),
    V=st.integers(1, 30),
    padding=st.integers(0, 5),
    chunk=st.integers(0, 10),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([1.0, 0.6]),
    softcap=st.sampled_from([0.0, 3.0]),
    scale=st.sampled_from([1.0, -0.4]),
    seed=st.integers(0, 9),
)
def test_whole_equals_plain(K, V, padding, chunk, beta, temperature, softcap, scale, seed):
    student, teacher, _ = case(K, 4, V, padding, seed=seed)
    options = {"beta": beta, "temperature": temperature, "softcap": softcap, "scale": scale, "vocab": V, "teacher_softcap": 2.0}
    found = results(distill, student, teacher, chunk=chunk, **options)
    assert_same(found, results(distill_plain, student, teacher, **options), EXACT)
    assert not found[2][V:].any(), "padding rows of the head have no gradient"
    assert bool((found[0] > -EXACT).all()), "a divergence is not negative"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_top_equals_plain(data):
    K, V = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 20))
    k = data.draw(st.integers(1, V + 2))
    named = data.draw(st.lists(st.integers(0, k), min_size=K, max_size=K))
    student, _, top = case(K, 4, V, 3, k, seed=data.draw(st.integers(0, 9)), named=named)
    options = {"beta": data.draw(st.sampled_from([0.0, 0.3, 1.0])), "vocab": V, "softcap": data.draw(st.sampled_from([0.0, 3.0]))}
    found = results(distill_top, student, top, chunk=data.draw(st.integers(0, 8)), temperature=0.7, **options)
    assert_same(found, results(distill_top_plain, student, top, temperature=0.7, **options), EXACT)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_are_those_of_finite_differences(beta, softcap):
    student, teacher, top = case(K=3, D=2, V=6, k=3, padding=2, named=[3, 2, 0])
    options = {"beta": beta, "softcap": softcap, "chunk": 2, "vocab": 6, "temperature": 0.8}
    assert torch.autograd.gradcheck(lambda hidden, head: distill(hidden, head, *teacher, **options), student)
    assert torch.autograd.gradcheck(lambda hidden, head: distill_top(hidden, head, *top, **options), student)


@pytest.mark.parametrize("beta", BETAS)
def test_naming_all_tokens_is_the_whole_and_fewer_is_less(beta):
    student, teacher, (tokens, logprobs) = case(V=23, k=23)
    whole = results(distill, student, teacher, beta=beta)
    assert_same(results(distill_top, student, (tokens, logprobs), beta=beta), whole, EXACT)
    losses = [distill_top(*student, tokens[:, :k], logprobs[:, :k], beta=beta) for k in range(1, 23)]
    for fewer, more in zip(losses, [*losses[1:], whole[0]], strict=True):
        assert bool((fewer <= more + EXACT).all()), "merging outcomes never makes a divergence larger"
    assert float(losses[0].detach().min()) > 0, "the tail counts, even with one token named"


def test_the_same_model_is_at_no_distance():
    student, _, _ = case()
    for beta in BETAS:
        losses, *slopes = results(distill, student, [each.detach() for each in student], beta=beta)
        assert float(losses.detach().abs().max()) < EXACT
        assert all(float(slope.abs().max()) < EXACT for slope in slopes)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_divergences_are_those_of_other_people(beta):
    """Batch mean of TRL's generalised JSD, written out from its arguments: log-softmax at a temperature, KL by torch."""
    student, teacher, _ = case(K=9)
    mine, other = (torch.log_softmax(states @ head.T / 0.9, -1) for states, head in (student, teacher))
    distance = torch.nn.functional.kl_div
    if beta == 0:
        expected = distance(mine, other, reduction="none", log_target=True)
    elif beta == 1:
        expected = distance(other, mine, reduction="none", log_target=True)
    else:
        shares = torch.tensor([1 - beta, beta], dtype=torch.float64).log()
        middle = torch.logsumexp(torch.stack([mine + shares[0], other + shares[1]]), 0)
        parts = [distance(middle, each, reduction="none", log_target=True) for each in (other, mine)]
        expected = beta * parts[0] + (1 - beta) * parts[1]
    assert_same([distill(*student, *teacher, beta=beta, temperature=0.9)], [expected.sum(-1)], EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SLOPE), (torch.bfloat16, HALF), (torch.float16, HALF)])
@pytest.mark.parametrize("beta", BETAS)
def test_narrow_inputs(dtype, tolerance, beta):
    student, teacher, (tokens, logprobs) = case(K=40, D=16, V=300, k=8, dtype=dtype)
    wide = [[values.detach().double().requires_grad_() for values in student], [values.double() for values in teacher]]
    for fast, plain, given_, exact in (
        (distill, distill_plain, teacher, wide[1]),
        (distill_top, distill_top_plain, (tokens, logprobs.float()), (tokens, logprobs.float().double())),
    ):
        found, expected = results(fast, student, given_, beta=beta, chunk=7), results(plain, wide[0], exact, beta=beta)
        assert found[0].dtype == torch.float32
        assert [each.dtype for each in found[1:]] == [dtype, dtype]
        assert_same(found[:1], expected[:1], SINGLE)  # accumulated in float32 whatever the input
        assert_same(found[1:], expected[1:], tolerance)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(beta, scale):
    """Probabilities of 0 and 1, tails of e^-1000: finite gradients everywhere, and losses that are those of float64."""
    student, teacher, _ = case(dtype=torch.float32, scale=scale)
    logprobs, tokens = torch.log_softmax(teacher[0].double() @ teacher[1].double().T, -1).float().topk(4)
    exact = [values.detach().double().requires_grad_() for values in student]
    for fast, plain, given_ in ((distill, distill_plain, teacher), (distill_top, distill_top_plain, (tokens, logprobs))):
        found = results(fast, student, given_, beta=beta)
        expected = results(plain, exact, [each.double() if each.is_floating_point() else each for each in given_], beta=beta)
        assert all(values.isfinite().all() for values in found)
        assert_same(found, expected, SINGLE)


def test_a_tail_is_right_however_small():
    """A student whose tail is e^-60, where 1 minus the named probabilities would be 0; and one that lost all its mass to the tail."""
    head = torch.eye(4).requires_grad_()
    hidden = torch.tensor([[60.0, 59.0, 0.0, 0.0], [0.0, 0.0, 200.0, 200.0]]).requires_grad_()
    tokens, logprobs = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.4], [0.6, 0.4]]).log()
    found = results(distill_top, [hidden, head], (tokens, logprobs))
    exact = [values.detach().double().requires_grad_() for values in (hidden, head)]
    assert_same(found, results(distill_top_plain, exact, (tokens, logprobs)), 1e-5)
    assert float(found[0].detach()[0]) == pytest.approx(0.1 * 59, rel=0.05)


def test_logits_are_never_whole(monkeypatch):
    rows = []
    plain = torch.logsumexp
    monkeypatch.setattr(module.torch, "logsumexp", lambda values, *rest, **named: rows.append(len(values)) or plain(values, *rest, **named))
    student, teacher, top = case(K=17)
    results(distill, student, teacher, chunk=5)
    results(distill_top, student, top, chunk=5)
    assert max(rows) == 5


def test_frozen_inputs_get_no_gradient():
    student, teacher, top = case()
    for function, given_ in ((distill, teacher), (distill_top, top)):
        (slope,) = torch.autograd.grad(function(student[0], student[1].detach(), *given_).sum(), student[0])
        assert slope.shape == student[0].shape
        (slope,) = torch.autograd.grad(function(student[0].detach(), student[1], *given_).sum(), student[1])
        assert slope.shape == student[1].shape
        with torch.no_grad():
            assert not function(*student, *given_).requires_grad


def test_refusals_say_what_to_do():
    (hidden, head), (teacher_hidden, teacher_head), (tokens, logprobs) = case()
    for function in (distill, distill_plain):
        with pytest.raises(ValueError, match=r"teacher_hidden \(5, 7\).*same places"):
            function(hidden, head, teacher_hidden[1:], teacher_head)
        with pytest.raises(ValueError, match=r"23 and 22 rows.*vocab="):
            function(hidden, head, teacher_hidden, teacher_head[1:])
        with pytest.raises(ValueError, match=r"vocab=23.*22 rows"):
            function(hidden, head, teacher_hidden, teacher_head[1:], vocab=23)
        with pytest.raises(ValueError, match=r"beta=1\.5"):
            function(hidden, head, teacher_hidden, teacher_head, beta=1.5)
        with pytest.raises(ValueError, match="temperature=0"):
            function(hidden, head, teacher_hidden, teacher_head, temperature=0)
        with pytest.raises(ValueError, match="detach"):
            function(hidden, head, teacher_hidden, teacher_head.clone().requires_grad_())
        with pytest.raises(ValueError, match="chunk=-1"):
            function(hidden, head, teacher_hidden, teacher_head, chunk=-1)
    for function in (distill_top, distill_top_plain):
        with pytest.raises(ValueError, match=r"logprobs \(6, 3\)"):
            function(hidden, head, tokens, logprobs[:, 1:])
        with pytest.raises(ValueError, match=r"targets \(5, 4\)"):
            function(hidden, head, tokens[1:], logprobs[1:])
        with pytest.raises(ValueError, match="beta=-1"):
            function(hidden, head, tokens, logprobs, beta=-1)
