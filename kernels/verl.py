"""verl's policy losses and advantage estimators, by name, in our signatures.

verl (pinned to 0.9.1) takes seconds to import and configures the root logger when it is: it is imported at the first use,
in the process that uses it, and the logger is put back.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rolecall.kernels.losses import Loss, Measures, Tokens, regularised, sampled

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("cispo", "clip_cov", "dppo_kl", "dppo_tv", "dro", "geo_mean", "gpg", "gspo", "kl_cov", "sapo", "vanilla")
ESTIMATORS = (
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "rloo_vectorized",
)
SEQUENCE_MEAN = ("geo_mean", "sapo")  # losses that average over sequences whatever mode they are asked for
MEASURES = {"actor/ppo_kl": "approx_kl", "actor/pg_clipfrac": "clip_fraction", "actor/pg_clipfrac_lower": "dual_fraction"}
SAME = 1e-4  # advantages of one sample's tokens that differ by less (float32 sums over the batch) count as one


def verl_loss(name: str, *, kl: float = 0.0, entropy: float = 0.0, **config: Any) -> Loss:
    """One of verl's policy losses as a loss of ours: `verl_loss("gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4)`.

    1) How tokens are averaged is decided by our weights, not by verl's `loss_agg_mode`; GSPO, SAPO and GMPO (`geo_mean`) are
    meant for weights of `sequence_mean`. 2) `clip_ratio` alone sets both bounds (in verl the bounds' default wins).
    3) Statistics that a loss takes over its batch (`clip_cov`, `kl_cov`) are those of one pass.

    Args:
        name: one of `LOSSES`.
        kl, entropy: coefficients of the KL to the reference and of the entropy bonus, as in `clipped_surrogate`.
        config: fields of verl's ActorConfig, and of its PolicyLossConfig.

    Returns:
        A picklable function: Tokens → loss [K], measures [K]. verl measures means, which are repeated for each token.

    Raises:
        ValueError: verl has no such loss; at the first use: verl has no such field.
    """
    if name not in LOSSES:
        raise ValueError(f"verl has no such loss of single tokens. Asked: {name!r}. There is: {', '.join(LOSSES)}. Do: name one of them.")
    return partial(_loss, name=name, kl=kl, entropy=entropy, config=config)


def verl_advantages(
    name: str,
    values: npt.ArrayLike,
    counts: npt.ArrayLike,
    *,
    lengths: npt.ArrayLike | None = None,
    scored: npt.ArrayLike | None = None,
    **config: Any,
) -> npt.NDArray[np.float32]:
    """Advantages by one of verl's outcome estimators: `verl_advantages("rloo", scores.values, scores.counts)`.

    verl sees the scored samples alone, in float64. A sample whose siblings all failed is alone in its group: several
    estimators then give it its raw score (ours in advantages.py give 0).

    Args:
        name: one of `ESTIMATORS`.
        values: [N] float, the scores.
        counts: [P] int, samples of each prompt.
        lengths: [N] int, completion tokens of each sample, for estimators that average over tokens (opo, reinforce_plus_plus
            and its baseline form); None means equal lengths.
        scored: [N] bool, which values are real scores; None means all.
        config: further arguments of the estimator, and fields of verl's AlgoConfig (norm_adv_by_std_in_grpo, …).

    Returns:
        [N] float32, 0 where not scored.

    Raises:
        ValueError: verl has no such estimator, shapes disagree, or the advantages of a sample's tokens differ (gamma < 1).
    """
    if name not in ESTIMATORS:
        raise ValueError(f"verl has no such outcome estimator. Asked: {name!r}. There is: {', '.join(ESTIMATORS)}. Do: name one of them.")
    value, count = np.asarray(values, np.float64), np.asarray(counts, np.int64)
    mask = np.ones(len(value), bool) if scored is None else np.asarray(scored, bool)
    length = np.ones(len(value), np.int64) if lengths is None else np.asarray(lengths, np.int64)
    if not len(value) == len(mask) == len(length) == int(count.sum()):
        raise ValueError(
            f"Scores and groups disagree. Asked: {len(value)} values, {len(mask)} scored, {len(length)} lengths, groups that hold "
            f"{int(count.sum())} samples. Do: give values, scored and lengths [N] and counts [P] with sum N."
        )
    chosen = mask & (length > 0)
    advantages = np.zeros(len(value), np.float32)
    if chosen.any():
        index = np.repeat(np.arange(len(count)), count)[chosen]
        advantages[chosen] = _estimate(name, value[chosen], index, length[chosen], config)
    return advantages


def _loss(tokens: Tokens, *, name: str, kl: float, entropy: float, config: dict[str, Any]) -> tuple[Tensor, Measures]:
    """Lay the tokens out as verl wants them, one sample a line; take the loss of each token back from it.

    verl returns one number, linear in importance weights that it multiplies each token's loss by. So the loss of a token
    is the derivative in its weight, over what the averaging makes of one token.
    """
    import torch

    core = _core()
    settings = _actor_config(config)
    samples = tokens.samples
    _, line, lengths = torch.unique_consecutive(samples, return_inverse=True, return_counts=True)
    column = torch.arange(len(samples), device=samples.device) - (lengths.cumsum(0) - lengths)[line]
    if not len(samples):
        return regularised(tokens.logprobs * 0, {}, tokens, kl, entropy)

    def lines(values: Tensor) -> Tensor:
        return values.new_zeros(len(lengths), int(lengths.max())).index_put((line, column), values)

    old, advantages = sampled(tokens)
    mask = lines(torch.ones_like(tokens.logprobs))
    mode = "seq-mean-token-mean" if name in SEQUENCE_MEAN else "token-sum"
    ones = [torch.ones_like(mask).requires_grad_() for _ in range(2)]
    with torch.enable_grad():
        total, found = core.POLICY_LOSS_REGISTRY[name](
            old_log_prob=lines(old),
            log_prob=lines(tokens.logprobs),
            advantages=lines(advantages),
            response_mask=mask,
            loss_agg_mode=mode,
            config=settings,
            rollout_is_weights=ones[0],
        )
        (weighted,) = torch.autograd.grad(total, ones[0], create_graph=True)
        (share,) = torch.autograd.grad(core.agg_loss(ones[1], mask, mode), ones[1])
    loss = weighted[line, column] / share[line, column]
    measures = {MEASURES[key]: torch.full_like(loss.detach(), number) for key, number in found.items() if key in MEASURES}
    return regularised(loss, measures, tokens, kl, entropy)


def _estimate(
    name: str, values: npt.NDArray[np.float64], index: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], config: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """[n] advantages of scored samples; `index` is the group of each."""
    import torch

    estimator = _core().ADV_ESTIMATOR_REGISTRY[name]
    takes = set(inspect.signature(estimator).parameters) - {"config", "kwargs"}
    direct = {key: value for key, value in config.items() if key in takes}
    last = torch.from_numpy(lengths) - 1
    mask = (torch.arange(int(lengths.max())) <= last[:, None]).double()
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(values)), last] = torch.from_numpy(values)
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": index, "config": _algo_config(config, direct)}
    advantages, _ = estimator(**{key: value for key, value in given.items() if key in takes | {"config"}}, **direct)
    first = advantages[:, :1]
    if bool((((advantages - first) * mask).abs() > SAME * (1 + first.abs())).any()):
        raise ValueError(
            f"Advantages differ within a sample. Asked: {name!r} with {config}. There is: one advantage a sample. "
            "Do: use gamma=1, so that the score counts the same for all of its tokens."
        )
    result: npt.NDArray[np.float64] = first[:, 0].numpy()
    return result


@cache
def _core() -> ModuleType:
    """verl's core_algos; importing it leaves the root logger as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from verl.trainer.ppo import core_algos
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return core_algos


def _actor_config(config: dict[str, Any]) -> Any:
    """verl's ActorConfig with these fields; those of its policy_loss are sorted out."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    given: dict[str, Any] = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1} | config
    if "clip_ratio" in config:
        given = {"clip_ratio_low": config["clip_ratio"], "clip_ratio_high": config["clip_ratio"]} | given
    inner = {key: given.pop(key) for key in list(given) if key in inspect.signature(PolicyLossConfig).parameters}
    try:
        return ActorConfig(policy_loss=PolicyLossConfig(**inner), **given)
    except TypeError as error:
        raise _unknown("ActorConfig and PolicyLossConfig", config, error) from error


def _algo_config(config: dict[str, Any], direct: dict[str, Any]) -> Any:
    from verl.trainer.config import AlgoConfig

    fields = set(inspect.signature(AlgoConfig).parameters)
    try:
        return AlgoConfig(**{key: value for key, value in config.items() if key in fields or key not in direct})
    except TypeError as error:
        raise _unknown("AlgoConfig", config, error) from error


def _unknown(where: str, given: dict[str, Any], error: TypeError) -> ValueError:
    return ValueError(
        f"verl has no such setting. Asked: {', '.join(given)}. There is: the fields of verl's {where} ({error}). Do: name one of them."
    )
