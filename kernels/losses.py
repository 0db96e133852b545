"""Losses of trained tokens: functions from tokens to a loss for each of them.

A loss is a value handed to the policy: `partial(clipped_surrogate, high=0.28)`. It returns the loss of each token [K]
and what is worth measuring of each token [K], without gradient. The policy minimises sum(loss * weights), so that how
tokens are averaged is decided by the weights alone (aggregation.py). Only tensor methods are used: importing this module
costs no torch. Finite inputs, however extreme, give finite losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT_LIMIT = 20.0  # log-ratios beyond it are cut, so that exp stays finite; verl's value
KL_LIMIT = 10.0  # the k3 estimate of one token is cut here (its gradient is then 0); verl's value


class Tokens(NamedTuple):
    """The trained tokens of a pass, all [K] and on one device; floats are float32 (or all float64)."""

    logprobs: Tensor  # under the policy that is trained, nats; carries the gradient
    old: Tensor | None  # when sampled; None in data that no rollout made
    advantages: Tensor | None
    weights: Tensor  # in the loss; sum to 1 over all passes and members
    samples: Tensor  # int, which sample the token is of; tokens of one sample stand together, in order
    reference: Tensor | None = None  # logprobs under the reference model
    entropy: Tensor | None = None  # of the policy's distribution, nats; carries a gradient


Measures = dict[str, "Tensor"]
Loss = Callable[[Tokens], "tuple[Tensor, Measures]"]


def clipped_surrogate(
    tokens: Tokens, *, low: float = 0.2, high: float = 0.2, dual: float = 0.0, kl: float = 0.0, entropy: float = 0.0
) -> tuple[Tensor, Measures]:
    """PPO's clipped objective: max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logprob - old).

    Schulman et al. 2017 (arXiv:1707.06347, equation 7); unequal bounds from DAPO (arXiv:2503.14476, section 3.1); with
    `dual` = c > 1, tokens of A < 0 lose at most -A c (dual clip, Ye et al. 2019, arXiv:1912.09729, equation 5).
    Equal to verl's `vanilla` loss (there c = 3 always).

    Args:
        tokens: the trained tokens.
        low, high: how far the ratio may move below and above 1.
        dual: the constant c; 0 leaves the dual clip out.
        kl: coefficient of the KL to the reference in the loss (`kl_to_reference`).
        entropy: coefficient of the entropy bonus.

    Returns:
        Loss [K] and measures [K]: ratio, approx_kl (old - logprob), clip_fraction (1 where the clip decides),
        dual_fraction (1 where the dual clip decides; if on), kl (if there is a reference), entropy (if known).

    Raises:
        ValueError: an option makes no sense, or needs a reference or an entropy that the tokens lack.
    """
    if low < 0 or high < 0 or (dual != 0 and dual <= 1):
        raise ValueError(
            f"Bounds of the ratio make no sense. Asked: low={low}, high={high}, dual={dual}. "
            "Do: give low >= 0, high >= 0, and dual > 1 (3 is usual) or 0 for none."
        )
    old, advantages = sampled(tokens)
    log_ratio = (tokens.logprobs - old).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = plain.maximum(clipped)
    measures = {"ratio": ratio.detach(), "approx_kl": -log_ratio.detach(), "clip_fraction": (clipped > plain).to(loss.dtype)}
    if dual:
        ceiling = -advantages * dual
        decides = (advantages < 0) & (loss > ceiling)
        measures["dual_fraction"] = decides.to(loss.dtype)
        loss = ceiling.where(decides, loss)
    return regularised(loss, measures, tokens, kl, entropy)


def policy_gradient(tokens: Tokens, *, kl: float = 0.0, entropy: float = 0.0) -> tuple[Tensor, Measures]:
    """REINFORCE: -A logprob (Williams 1992), for samples of the very weights that are trained, as in RLOO.

    No ratio corrects for older weights; `approx_kl` shows how far from on-policy the samples are. Options, result and
    errors as in `clipped_surrogate`; measures are ratio, approx_kl, kl and entropy.
    """
    old, advantages = sampled(tokens)
    loss = -advantages * tokens.logprobs
    log_ratio = (tokens.logprobs.detach() - old).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    return regularised(loss, {"ratio": log_ratio.exp(), "approx_kl": -log_ratio}, tokens, kl, entropy)


def nll(tokens: Tokens) -> tuple[Tensor, Measures]:
    """Negative log-likelihood: -logprob. For SFT and rejection sampling, where the weights choose the samples."""
    return regularised(-tokens.logprobs, {}, tokens, 0.0, 0.0)


def sampled(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The logprobs when sampled and the advantages, both [K], for losses that need them.

    Raises:
        ValueError: the tokens were not sampled by a rollout.
    """
    if tokens.old is None or tokens.advantages is None:
        raise ValueError(
            "This loss compares with the policy that sampled. There is: a batch without old logprobs or advantages. "
            "Do: pack samples of a rollout, or train with nll."
        )
    return tokens.old, tokens.advantages


def kl_to_reference(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) at sampled tokens: exp(d) - d - 1, d = reference - logprob; [K], >= 0.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). d is cut at +-20 and the estimate at 10,
    as in verl's `low_var_kl`: a token that drifted further (d > 2.6) pulls no more, in place of outweighing all others.
    """
    distance = (reference - logprobs).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    return (distance.exp() - distance - 1).clamp(-KL_LIMIT, KL_LIMIT)


def regularised(loss: Tensor, measures: Measures, tokens: Tokens, kl: float, entropy: float) -> tuple[Tensor, Measures]:
    """Add the KL to a loss and take the entropy bonus off; measure both wherever they are known.

    For losses of your own too. Arguments and errors as in `clipped_surrogate`; `measures` is added to and returned.
    """
    if kl and tokens.reference is None:
        raise ValueError(
            f"A KL needs something to differ from. Asked: kl={kl}. There is: no reference logprobs in the batch. "
            "Do: pack the batch with reference=reference.split.logprobs(samples), or set kl=0."
        )
    if entropy and tokens.entropy is None:
        raise ValueError(
            f"An entropy bonus needs the entropy. Asked: entropy={entropy}. There is: no entropy of the tokens. "
            "Do: give Tokens.entropy (token_logprobs returns it), or set entropy=0."
        )
    if tokens.reference is not None:
        estimate = kl_to_reference(tokens.logprobs, tokens.reference)
        measures["kl"] = estimate.detach()
        if kl:
            loss = loss + kl * estimate
    if tokens.entropy is not None:
        measures["entropy"] = tokens.entropy.detach()
        if entropy:
            loss = loss - entropy * tokens.entropy
    return loss, measures
