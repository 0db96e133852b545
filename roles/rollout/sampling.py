"""From hidden states' logits to sampled tokens, each sequence drawing from its own random stream.

Shape letters: A active sequences, V vocabulary.

A token is found by inverting the cumulated distribution at one uniform number, which is a function of the sample's seed
and of the token's place alone. So, given equal logits, a sample is the same whatever else is in the batch, whichever
member makes it and however often it is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from rolecall.protocols.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FIRST_LOOK = 256  # candidates sorted for top-p before all of the vocabulary is: sorting 49k costs more than the model's head


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep the k most probable tokens (exactly k, also among ties); 0 keeps all.
        top_p: keep the fewest most probable tokens whose mass, after `top_k`, reaches this share; 1 keeps all.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError("The temperature is out of range.", ask=f"temperature={self.temperature}", remedy="give 0 (greedy) or more")
        if isinstance(self.top_k, bool) or int(self.top_k) != self.top_k or self.top_k < 0:
            raise UserError("top_k is out of range.", ask=f"top_k={self.top_k}", remedy="give a whole number, 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p is out of range.", ask=f"top_p={self.top_p}", remedy="give a share in (0, 1], 1 to keep all tokens")


def sample_seed(seed: int, key: int, prompt: str, sibling: int) -> int:
    """Seed (64 bits) of one sample: a hash of the run's seed, the prompt's place in the stream and id, and the number of the sibling."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{key}\0{sibling}\0{prompt}".encode("utf-8", "surrogatepass"))


def uniforms(seeds_A: np.ndarray, places_A: np.ndarray) -> np.ndarray:
    """One number in [0, 1) each, float64 [A]: SplitMix64 (Steele et al., OOPSLA 2014) started at the seed, at this place of its stream.

    Args:
        seeds_A: uint64.
        places_A: which token of the completion, from 0.
    """
    with np.errstate(over="ignore"):
        mixed = seeds_A.astype(np.uint64) + (places_A.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    drawn: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def choose(logits_AV: Tensor, sampling: Sampling, uniforms_A: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens and their logprobs.

    The logprob is that of the whole vocabulary's distribution at the temperature (at temperature 1 when greedy), before
    top-k and top-p: what a trainer computes again from the same weights.

    Args:
        logits_AV: any float dtype; computed in float32. May be overwritten.
        uniforms_A: float64 in [0, 1) on the logits' device; not looked at when greedy.

    Returns:
        tokens int64 [A], logprobs float32 [A] in nats.
    """
    scaled = logits_AV.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled.div_(sampling.temperature)
    norm = scaled.logsumexp(-1, keepdim=True)
    if sampling.temperature == 0:
        tokens = scaled.argmax(-1, keepdim=True)
        return tokens[:, 0], (scaled.gather(-1, tokens) - norm)[:, 0]
    limit = min(sampling.top_k or scaled.shape[1], scaled.shape[1])
    if limit < scaled.shape[1] or sampling.top_p < 1:
        first = limit if sampling.top_k or scaled.is_cuda else min(FIRST_LOOK, limit)  # to look twice costs a GPU a sync
        tokens = _draw_kept(scaled, norm, uniforms_A, sampling, first, limit)
    else:
        tokens = _invert((scaled - norm).exp_(), uniforms_A)
    return tokens[:, 0], (scaled.gather(-1, tokens) - norm)[:, 0]


def _draw_kept(scaled: Tensor, norm: Tensor, uniforms_A: Tensor, sampling: Sampling, width: int, limit: int) -> Tensor:
    """Tokens [A, 1] drawn from what top-k and top-p keep, looking at the `width` best first and, where they don't do, at `limit`.

    Each row's way depends on that row alone; else a sample would depend on its neighbours through the order of ties.
    """
    if scaled.is_cuda or width == scaled.shape[1]:
        best, ids = (part[:, :width] for part in scaled.sort(dim=-1, descending=True, stable=True))
    else:
        best, ids = scaled.topk(width, dim=-1)
    mass = (best - norm).exp_()
    reached = mass.double().cumsum(-1)
    if sampling.top_p < 1:
        bound = sampling.top_p * (reached[:, -1:] if sampling.top_k else 1.0)
        mass = mass.masked_fill_(reached - mass >= bound, 0.0)
    tokens = ids.gather(-1, _invert(mass, uniforms_A))
    if width < limit:
        short = (reached[:, -1] < sampling.top_p).nonzero()[:, 0]
        if len(short):
            tokens[short] = _draw_kept(scaled[short], norm[short], uniforms_A[short], sampling, limit, limit)
    return tokens


def _invert(mass_AW: Tensor, uniforms_A: Tensor) -> Tensor:
    """First column at which the cumulated mass exceeds the uniform share of the whole: int64 [A, 1]."""
    import torch

    cumulated = mass_AW.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(cumulated, uniforms_A[:, None] * cumulated[:, -1:], right=True)
    return found.clamp_(max=mass_AW.shape[1] - 1)
