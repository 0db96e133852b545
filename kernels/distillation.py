"""Losses that draw a student's next-token distributions to a teacher's, from hidden states, without ever holding all logits.

K tokens, D hidden size, V vocabulary, Vp rows of the head (padding beyond V), k outcomes that the teacher names. With q the teacher's and
p the student's probabilities the loss of a token is the generalised Jensen-Shannon divergence of arXiv:2306.13649, section 3,

    beta KL(q | m) + (1 - beta) KL(p | m),   m = beta q + (1 - beta) p,

and at its ends, where that vanishes, what it tends to when divided by beta or 1 - beta: beta = 0 is the forward KL(q | p), which covers
all that the teacher says; beta = 1 the reverse KL(p | q), which keeps to what it prefers. `distill` takes the teacher's own hidden states
and head; `distill_top` its k likeliest tokens with their logprobs, and as one outcome more all others together: the tail. Merging
outcomes never makes a divergence larger, so the second is a lower bound of the first, equal to it where k = V.

Logits are made `chunk` tokens at a time, and in the backward pass once more: a student's cost 8 K D V operations in all. Gradients go
to the student alone. Each function stands beside the plain one of the same signature that it is tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from rolecall.kernels.head import Gradients, Law, chunks, factor, law, logits, wide
from torch import Tensor

FLOOR = 1e-7  # of the teacher's tail: what is left of 1 by logprobs in float32 is not known better
NEVER = -1e4  # log of a probability that is 0 in float64 too
TABLES = 3  # [k, V] tensors that a chunk holds, where the other losses hold one


def distill(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_scale: float = 1.0,
) -> Tensor:
    """Divergence of the student's distribution from the teacher's over the whole vocabulary, of each token.

    Args:
        hidden: [K, D], the student's states that predict the tokens (after the final norm).
        head: [Vp, D], its output embedding, of the same dtype.
        teacher_hidden: [K, D'], the teacher's states for the same places.
        teacher_head: [Vp', D'], its output embedding, over the same vocabulary.
        beta: 0 for forward KL, 1 for reverse KL, between for the generalised Jensen-Shannon divergence.
        temperature: divides both models' logits; the loss is not multiplied by its square.
        chunk: tokens whose logits are held at once; 0 means as many as suits the device.
        vocab: true size of the vocabulary; 0 means all rows, of which both heads then have equally many.
        softcap, scale: of the student's logits (`kernels/head.py`).
        teacher_softcap, teacher_scale: of the teacher's.

    Returns:
        [K] in nats, float32 (float64 if the student's inputs are). Gradients go to `hidden` and `head`; they can't be differentiated again.

    Raises:
        ValueError: shapes disagree, a number is out of its range, or the teacher wants a gradient.
    """
    rules = _both(hidden, head, teacher_hidden, teacher_head, beta, temperature, vocab, (softcap, scale, teacher_softcap, teacher_scale))
    chunks(0, chunk, hidden, 1)
    teacher = _Whole(teacher_hidden, teacher_head, rules[1], wide(hidden, head))
    losses: Tensor = _Distill.apply(hidden, head, teacher, rules[0], beta, chunk)  # type: ignore[no-untyped-call]
    return losses


def distill_plain(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_scale: float = 1.0,
) -> Tensor:
    """The same by the formula, all logits at once; `chunk` is only checked."""
    rules = _both(hidden, head, teacher_hidden, teacher_head, beta, temperature, vocab, (softcap, scale, teacher_softcap, teacher_scale))
    chunks(0, chunk, hidden, 1)
    dtype = wide(hidden, head)
    student = _table(hidden.to(dtype), head.to(dtype), rules[0])
    teacher = _table(teacher_hidden.to(dtype), teacher_head.to(dtype), rules[1])
    return _formula(student, teacher, beta)


def distill_top(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Divergence of the student's distribution from the teacher's over k tokens and the tail of all others, of each token.

    The student's tail is summed over all its other logits, so it is right however small. The teacher's is what its logprobs leave of 1,
    at least 1e-7. Where all tokens are named there is no tail.

    Args:
        hidden, head, beta, chunk, vocab, softcap, scale: as for `distill`.
        tokens: [K, k] int, tokens that the teacher names, no token twice in a row.
        logprobs: [K, k], their logprobs over the whole vocabulary at `temperature`; -inf where a row names fewer than k: what `tokens`
            says there does not matter.
        temperature: divides the student's logits.

    Returns:
        [K] in nats, with gradients, as `distill`.

    Raises:
        ValueError: as for `distill`.
    """
    rule = _top(hidden, head, tokens, logprobs, beta, temperature, vocab, softcap, scale)
    chunks(0, chunk, hidden, 1)
    teacher = _Named(tokens.long(), logprobs, wide(hidden, head))
    losses: Tensor = _Distill.apply(hidden, head, teacher, rule, beta, chunk)  # type: ignore[no-untyped-call]
    return losses


def distill_top_plain(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """The same by the formula, all logits at once; `chunk` is only checked."""
    rule = _top(hidden, head, tokens, logprobs, beta, temperature, vocab, softcap, scale)
    chunks(0, chunk, hidden, 1)
    dtype = wide(hidden, head)
    student = _table(hidden.to(dtype), head.to(dtype), rule)
    rows = []
    for row, names, values in zip(student, tokens.long(), logprobs.to(dtype), strict=True):
        names, values = names[values > -torch.inf], values[values > -torch.inf]
        others = torch.ones_like(row, dtype=torch.bool).index_fill(0, names, False)
        p, q = row[names], values
        if others.any():
            p = torch.cat([p, torch.logsumexp(row[others], 0)[None]])
            q = torch.cat([q, (1 - values.exp().sum()).clamp_min(FLOOR).log()[None]])
        rows.append(_formula(p, q, beta))
    return torch.stack(rows) if rows else student.sum(-1)


def _table(hidden: Tensor, head: Tensor, rule: Law) -> Tensor:
    raw = rule.scale * (hidden @ head[: rule.vocab].T)
    return torch.log_softmax((rule.softcap * torch.tanh(raw / rule.softcap) if rule.softcap else raw) / rule.temperature, dim=-1)


def _formula(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence [...] of log probabilities [..., outcomes]."""
    p, q = student.exp(), teacher.exp()
    if beta == 0:
        return (q * (teacher - student)).sum(-1)
    if beta == 1:
        return (p * (student - teacher)).sum(-1)
    middle = _middle(student, teacher, beta)
    return beta * (q * (teacher - middle)).sum(-1) + (1 - beta) * (p * (student - middle)).sum(-1)


def _both(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    beta: float,
    temperature: float,
    vocab: int,
    forms: tuple[float, float, float, float],
) -> tuple[Law, Law]:
    if len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"Student and teacher see unlike many tokens. Asked: hidden {tuple(hidden.shape)}, "
            f"teacher_hidden {tuple(teacher_hidden.shape)}. Do: give the states of both for the same places."
        )
    if not vocab and len(head) != len(teacher_head):
        raise ValueError(
            f"Student and teacher have unlike heads. Have: {len(head)} and {len(teacher_head)} rows. "
            "Do: say the true vocabulary by vocab=, if the tokens are the same and only the padding differs."
        )
    _numbers(beta, teacher_hidden, teacher_head)
    softcap, scale, teacher_softcap, teacher_scale = forms
    return (
        law(hidden, head, hidden, vocab=vocab, temperature=temperature, softcap=softcap, scale=scale),
        law(teacher_hidden, teacher_head, hidden, vocab=vocab, temperature=temperature, softcap=teacher_softcap, scale=teacher_scale),
    )


def _top(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    beta: float,
    temperature: float,
    vocab: int,
    softcap: float,
    scale: float,
) -> Law:
    if tokens.ndim != 2 or tokens.shape != logprobs.shape:
        raise ValueError(
            f"Shapes disagree. Asked: tokens {tuple(tokens.shape)}, logprobs {tuple(logprobs.shape)}. "
            "Do: give both [K, k], one row a token."
        )
    _numbers(beta, logprobs)
    return law(hidden, head, tokens, vocab=vocab, temperature=temperature, softcap=softcap, scale=scale)


def _numbers(beta: float, *teacher: Tensor) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"Asked: beta={beta}. Do: give 0 (forward KL), 1 (reverse KL) or a number between (Jensen-Shannon).")
    if torch.is_grad_enabled() and any(each.requires_grad for each in teacher):
        raise ValueError("The teacher gets no gradient here. Do: detach what it gives, its head too.")


class _Whole:
    """What a teacher says by its states and head: the outcomes are all tokens."""

    def __init__(self, hidden: Tensor, head: Tensor, rule: Law, dtype: torch.dtype) -> None:
        self._hidden, self._rule, self._dtype = hidden.detach(), rule, dtype
        self._weight = factor(head.detach()[: rule.vocab])

    def outcomes(self, table: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Log probabilities of the outcomes, the student's (from its logits, overwritten) and the teacher's."""
        mine = table.sub_(torch.logsumexp(table, -1, keepdim=True))
        other = logits(self._hidden[part], self._weight, self._rule)
        return mine, other.sub_(torch.logsumexp(other, -1, keepdim=True)).to(self._dtype)

    def slope(self, mine: Tensor, gain: Tensor, table: Tensor, part: slice) -> Tensor:
        """Gradient of the logits from that of the student's log probabilities (overwritten)."""
        return gain.sub_(mine.exp().mul_(gain.sum(-1, keepdim=True)))


class _Named:
    """What a teacher says by the logprobs of some tokens: the outcomes are these, and the tail of all others."""

    def __init__(self, tokens: Tensor, logprobs: Tensor, dtype: torch.dtype) -> None:
        logprobs = logprobs.detach().to(dtype)
        self._real = logprobs > -torch.inf
        self._tokens = tokens.where(self._real, 0)
        left = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(FLOOR)
        self._teacher = torch.cat([logprobs.where(self._real, NEVER), left.log()], -1)

    def outcomes(self, table: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Log probabilities [c, k + 1] of the named tokens and the tail; what there is none of has NEVER in both."""
        named, whole = table.gather(1, self._tokens[part]), torch.logsumexp(table, -1, keepdim=True)
        rest = torch.logsumexp(self._without(table, part), -1, keepdim=True)
        tail = rest > -torch.inf
        mine = torch.cat([(named - whole).where(self._real[part], NEVER), (rest - whole).where(tail, NEVER)], -1)
        other = self._teacher[part].clone()
        other[:, -1:] = other[:, -1:].where(tail, NEVER)
        return mine, other

    def slope(self, mine: Tensor, gain: Tensor, table: Tensor, part: slice) -> Tensor:
        """A logit of the tail has its share of the tail's gradient; `table` are the logits."""
        rest = self._without(table, part)
        whole = torch.logsumexp(rest, -1, keepdim=True)
        share = rest.sub_(whole.where(whole > -torch.inf, 0)).exp_()
        free = gain.sub_(mine.exp().mul_(gain.sum(-1, keepdim=True)))
        return share.mul_(free[:, -1:]).scatter_add_(1, self._tokens[part], free[:, :-1].where(self._real[part], 0))

    def _without(self, table: Tensor, part: slice) -> Tensor:
        """Logits of the tail alone, -inf elsewhere. By the least of both, so that a place that is not real undoes none that is."""
        bound = torch.where(self._real[part], -torch.inf, torch.inf).to(table.dtype)
        return table.scatter_reduce(1, self._tokens[part], bound, "amin")


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[c] from log probabilities [c, outcomes]."""
    if beta == 0:
        return teacher.sub(student).mul_(teacher.exp()).sum(-1)
    if beta == 1:
        return student.sub(teacher).mul_(student.exp()).sum(-1)
    middle = _middle(student, teacher, beta)
    first = teacher.sub(middle).mul_(teacher.exp()).sum(-1)
    return beta * first + (1 - beta) * middle.neg_().add_(student).mul_(student.exp()).sum(-1)


def _gain(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Derivative of the divergence in the student's log probabilities, each taken for free: [c, outcomes]."""
    if beta == 0:
        return teacher.exp().neg_()
    if beta == 1:
        return student.sub(teacher).add_(1).mul_(student.exp())
    return _middle(student, teacher, beta).neg_().add_(student).mul_(student.exp()).mul_(1 - beta)


def _middle(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)"""
    weights = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(teacher + weights[0], student + weights[1])


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, teacher: _Whole | _Named, rule: Law, beta: float, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, head)
        ctx.teacher, ctx.rule, ctx.beta, ctx.chunk = teacher, rule, beta, chunk
        losses = hidden.new_empty(len(hidden), dtype=wide(hidden, head))
        weight = factor(head[: rule.vocab])
        for part in chunks(len(hidden), chunk, hidden, TABLES * rule.vocab):
            mine, other = teacher.outcomes(logits(hidden[part], weight, rule), part)
            losses[part] = _divergence(mine, other, beta)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Logits of both are made again; of them come the gradients of the student's."""
        hidden, head = ctx.saved_tensors
        teacher, rule = ctx.teacher, ctx.rule
        gradients = Gradients(hidden, head, to_hidden=ctx.needs_input_grad[0], to_head=ctx.needs_input_grad[1])
        weight = factor(head[: rule.vocab])
        for part in chunks(len(hidden), ctx.chunk, hidden, TABLES * rule.vocab):
            table = logits(hidden[part], weight, rule)
            bend = rule.bend(table)
            mine, other = teacher.outcomes(table, part)
            gain = _gain(mine, other, ctx.beta).mul_(of_losses[part, None])
            gradients.add(teacher.slope(mine, gain, table, part).mul_(bend), hidden[part], weight, part)
        return *gradients.results(), None, None, None, None
