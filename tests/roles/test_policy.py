"""Training on packed rows is training on each sample alone: same logprobs, same gradient, same update."""

from __future__ import annotations

import math
from functools import partial

import msgspec
import numpy as np
import pytest
import torch
from rolecall.kernels.losses import Tokens, clipped_surrogate, nll, policy_gradient
from rolecall.protocols.errors import ConfigError, ModelError, RolecallError, UserError, WeightsError
from rolecall.protocols.messages import PackedBatch, Samples
from rolecall.roles.base import Member
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.policy.optimiser import scheduled
from rolecall.roles.reference import Reference
from tiny import VOCAB, tiny_samples
from transformers import AutoModelForCausalLM

# Logprobs of a model of two layers. float32: sums in another order, and another attention kernel where there is a mask.
# float64: transformers computes norms and rotary angles in float32 whatever the model is, so about float32's rounding.
LOGPROB = {"float32": 5e-5, "float64": 5e-6}
# Gradients, as a share of the largest entry of each tensor; for the same reasons.
GRADIENT = {"float32": 2e-4, "float64": 1e-5}
LOSS = partial(clipped_surrogate, low=0.2, high=0.3, kl=0.1, entropy=0.01)


def ready(model: str, **settings: object) -> Policy:
    policy = Policy(model, **settings)
    policy.check()
    policy.setup(Member())
    return policy


def train_data(policy: Policy, samples: Samples, capacity: int = 64) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
    """A batch as a controller makes it, with weights that differ from sample to sample; samples near to the policy's own."""
    number = len(samples.prompt_lengths)
    rng = np.random.default_rng(7)
    advantages = rng.standard_normal(number).astype(np.float32)
    weights = rng.random(number).astype(np.float32) / len(samples.tokens)
    reference = policy.logprobs(samples)
    noise = np.where(reference.logprobs != 0, rng.uniform(-0.4, 0.4, len(reference.logprobs)), 0).astype(np.float32)
    near = msgspec.structs.replace(samples, logprobs=reference.logprobs + noise)
    other = msgspec.structs.replace(reference, logprobs=reference.logprobs - noise)
    return pack_samples(near, advantages, weights, other, capacity=capacity), advantages, weights


def alone(net: torch.nn.Module, samples: Samples, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of a sample's completion by plain transformers, nothing else in the row."""
    start, stop = samples.cu_seqlens[sample : sample + 2]
    tokens = torch.tensor(samples.tokens[start:stop]).long()[None]
    table = torch.log_softmax(net(input_ids=tokens).logits[0, :-1] / samples.temperature, -1)
    first = int(samples.prompt_lengths[sample]) - 1
    return table.gather(1, tokens[0, 1:, None])[first:, 0], -(table.exp() * table).sum(-1)[first:]


def true_size(tensor: torch.Tensor) -> torch.Tensor:
    """Without the rows that pad the vocabulary to a multiple of 64."""
    return tensor[:VOCAB] if len(tensor) == 320 else tensor


def gradients(policy: Policy) -> list[torch.Tensor]:
    """Of each parameter, in the order of transformers, which is ours too."""
    return [true_size(view).clone() for view in policy._training.gradients.views]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], share: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("capacity", [32, 100])
def test_logprobs_are_those_of_each_sample_alone(tiny: str, dtype: str, capacity: int) -> None:
    samples = msgspec.structs.replace(tiny_samples(4, 3), temperature=0.7)
    net = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
    role = Reference(tiny, dtype=dtype, row_tokens=capacity, rows_per_pass=2)
    role.check()
    role.setup(Member())
    answer = role.logprobs(samples)
    with torch.no_grad():
        for sample, (start, stop) in enumerate(zip(samples.cu_seqlens[:-1], samples.cu_seqlens[1:], strict=True)):
            prompt = samples.prompt_lengths[sample]
            own = answer.logprobs[start:stop]
            np.testing.assert_allclose(own[prompt:], alone(net, samples, sample)[0], atol=LOGPROB[dtype], rtol=0)
            assert not own[:prompt].any()
    assert (answer.keys is samples.keys, answer.version) == (True, 0)
    assert set(role.meter.drain()) == {"tokens_per_s"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_is_that_of_each_sample_alone(tiny: str, dtype: str) -> None:
    """Prompts are computed once for all their completions; the gradient is as if each had been computed by itself."""
    policy = ready(tiny, dtype=dtype)
    samples = msgspec.structs.replace(tiny_samples(3, 4), temperature=1.3)
    batch, advantages, weights = train_data(policy, samples)
    metrics = policy.accumulate(batch, LOSS)
    net = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
    total = torch.zeros(())
    for sample in range(len(advantages)):
        logprobs, entropy = alone(net, samples, sample)
        of = batch.samples == sample
        old, reference = (torch.tensor(values[of]).to(logprobs) for values in (batch.old, batch.reference))
        fixed = torch.full_like(logprobs, float(advantages[sample])), torch.full_like(logprobs, float(weights[sample]))
        each, _ = LOSS(Tokens(logprobs, old, *fixed, torch.tensor(batch.samples[of]), reference, entropy))
        total = total + (each * fixed[1]).sum()
    total.backward()
    assert_close(gradients(policy), [parameter.grad for parameter in net.parameters()], GRADIENT[dtype])
    assert metrics.sums["loss"][0] == pytest.approx(float(total.detach()), rel=1e-4)
    assert metrics.sums["loss"][1] == pytest.approx(float(batch.weights.sum()), rel=1e-6)
    assert metrics.sums["tokens"] == (len(batch.targets), 1.0)
    assert {"kl", "clip_fraction", "entropy", "ratio", "approx_kl", "logprob_gap", "tokens_per_s"} <= metrics.sums.keys()
    gap = np.abs(batch.old - batch.reference).sum() / 2  # the noise went up in one and down in the other
    assert metrics.sums["logprob_gap"][0] == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize(("capacity", "rows_per_pass"), [(32, 1), (32, 3), (48, 2), (512, 1)])
def test_how_rows_are_cut_does_not_change_the_gradient(tiny: str, capacity: int, rows_per_pass: int) -> None:
    samples = tiny_samples(5, 3)
    plain = ready(tiny)
    plain.accumulate(train_data(plain, samples)[0], LOSS)
    policy = ready(tiny, rows_per_pass=rows_per_pass)
    policy.accumulate(train_data(policy, samples, capacity)[0], LOSS)
    assert_close(gradients(policy), gradients(plain), GRADIENT["float32"])


def test_calls_add_up_until_the_update(tiny: str) -> None:
    samples = tiny_samples(4, 3)
    whole, parts = ready(tiny), ready(tiny)
    batch = train_data(whole, samples)[0]
    whole.accumulate(batch, LOSS)
    for kept in (batch.samples < 5, batch.samples >= 5):
        flat = {name: getattr(batch, name)[kept] for name in ("sources", "targets", "weights", "samples", "old", "advantages", "reference")}
        parts.accumulate(msgspec.structs.replace(batch, **flat), LOSS)
    assert_close(gradients(parts), gradients(whole), GRADIENT["float32"])
    assert (parts.update(1e-3), whole.update(1e-3)) == (1, 1)
    assert not any(view.any() for view in gradients(parts))


def test_updates_are_those_of_adamw_after_clipping(tiny: str) -> None:
    """Against torch's own AdamW and clipping, on gradients computed apart from ours."""
    policy = ready(tiny, clip=0.5, weight_decay=0.1, warmup=2, betas=(0.8, 0.9))
    net = AutoModelForCausalLM.from_pretrained(tiny)
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim == 1]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9))
    batch = train_data(policy, tiny_samples(3, 2))[0]
    batch = msgspec.structs.replace(batch, weights=batch.weights * 40)  # a gradient longer than the clip
    for step in range(3):
        policy.accumulate(batch, LOSS)
        for parameter, view in zip(net.parameters(), gradients(policy), strict=True):
            parameter.grad = view
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 2)
        adam.step()
        assert policy.update(1e-3) == step + 1 == policy.version
        sums = policy.meter.drain()
        assert sums["grad_norm"][0] == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.5
        assert sums["learning_rate"] == (adam.param_groups[0]["lr"], 1.0)
        assert sums["skipped"] == (0.0, 1.0)
        for ours, theirs in zip(policy._training.model.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(
                true_size(ours), theirs, rtol=0, atol=2e-6
            )  # fused and plain AdamW round differently; a step is 1e-3


def test_training_raises_what_is_rewarded(tiny: str) -> None:
    policy = ready(tiny)
    samples = tiny_samples(2, 2, longest=4)
    number, before = len(samples.prompt_lengths), policy.logprobs(samples).logprobs.sum()
    batch = pack_samples(samples, np.ones(number), np.full(number, 1 / 10), capacity=64)
    for loss in (nll, policy_gradient):
        for _ in range(5):
            policy.accumulate(batch, loss)
            policy.update(3e-3)
        after = policy.logprobs(samples)
        assert after.logprobs.sum() > before + 1
        before = after.logprobs.sum()
    assert after.version == 10


def test_bfloat16_keeps_small_steps_in_its_masters(tiny: str) -> None:
    """A step of 1e-5 is lost in a bfloat16 weight of 0.2; thirty of them must not be."""
    policy = ready(tiny, dtype="bfloat16")
    batch = train_data(policy, tiny_samples(3, 2))[0]
    name = "model.layers.0.mlp.up_proj.weight"
    before = policy._training.model.named_tensors()[name].clone()
    for _ in range(30):
        policy.accumulate(batch, nll)
        policy.update(1e-4)
    after, master = policy._training.model.named_tensors()[name], policy._training.optimiser.tensors()["master/blocks.0.mlp.up.weight"]
    assert (after.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(after, master.bfloat16())
    assert (after != before).float().mean() > 0.3
    assert not torch.equal(master.bfloat16().float(), master)


def poisoned(tokens: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return tokens.logprobs * math.nan, {}


def test_a_gradient_that_is_not_finite_is_skipped(tiny: str) -> None:
    policy = ready(tiny)
    batch = train_data(policy, tiny_samples(2, 2))[0]
    policy.accumulate(batch, nll)
    policy.update(1e-3)
    policy.meter.drain()
    before = {name: tensor.clone() for name, tensor in policy._training.model.named_tensors().items()}
    policy.accumulate(batch, poisoned)
    assert policy.update(1e-3) == 1
    assert policy.meter.drain()["skipped"] == (1.0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy._training.model.named_tensors().items())
    policy.accumulate(batch, nll)
    assert policy.update(1e-3) == 2
    assert all(tensor.isfinite().all() for tensor in policy._training.model.named_tensors().values())


def test_a_loss_of_another_shape_is_refused_and_leaves_no_gradient(tiny: str) -> None:
    policy = ready(tiny)
    batch = train_data(policy, tiny_samples(2, 2))[0]
    policy.accumulate(batch, nll)
    with pytest.raises(UserError, match=r"gives 'loss' in another shape.*Do: return \(loss \[K\]"):
        policy.accumulate(batch, lambda tokens: (nll(tokens)[0].mean(), {}))
    assert not any(view.any() for view in gradients(policy))
    with pytest.raises(UserError, match="gives 'mean' in another shape"):
        policy.accumulate(batch, lambda tokens: (nll(tokens)[0], {"mean": tokens.old.mean()}))


def test_where_nothing_was_scored_nothing_moves_not_even_by_momentum(tiny: str) -> None:
    policy = ready(tiny)
    samples = tiny_samples(2, 2)
    policy.accumulate(train_data(policy, samples)[0], nll)
    assert policy.update(1e-3) == 1
    before = {name: tensor.clone() for name, tensor in policy._training.model.named_tensors().items()}
    policy.meter.drain()
    assert policy.accumulate(pack_samples(samples, None, np.zeros(4), capacity=64), nll).sums == {}
    assert policy.update(1e-3) == 1, "the version stays"
    assert policy.meter.drain()["skipped"] == (1.0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy._training.model.named_tensors().items())


def test_a_share_without_samples_has_no_logprobs(tiny: str) -> None:
    answer = ready(tiny).logprobs(tiny_samples(2, 2).take([]))
    assert (len(answer.keys), len(answer.logprobs), answer.cu_seqlens.tolist()) == (0, 0, [0])


def test_a_sample_longer_than_the_context_is_refused(tiny: str) -> None:
    policy = ready(tiny)
    samples = tiny_samples(1, 1, longest_prompt=1)
    long = np.full(600, 9, np.int32)
    samples = msgspec.structs.replace(
        samples, tokens=long, logprobs=np.zeros(600, np.float32), cu_seqlens=np.array([0, 600]), prompt_lengths=np.array([590], np.int32)
    )
    with pytest.raises(ModelError, match="longer than the model's context"):
        policy.logprobs(samples)


def test_published_weights_load_into_another_policy(tiny: str) -> None:
    policy, other = ready(tiny), ready(tiny)
    batch = train_data(policy, tiny_samples(2, 2))[0]
    policy.accumulate(batch, nll)
    policy.update(1e-2)
    part = policy.publish()
    answer = other.load(part)
    assert (answer["version"], len(answer["digest"]), other.version) == (1, 32, 1)
    mine, theirs = (role._training.model.named_tensors() for role in (policy, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    torn = part.data.copy()
    torn[100] ^= 1
    with pytest.raises(WeightsError, match="damaged"):
        other.load([msgspec.structs.replace(part, version=2, data=torn)])
    assert other.version == 1
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    half = ready(tiny, publish_dtype="bfloat16").publish()
    assert {entry.dtype for entry in half.manifest} == {"bfloat16"}
    assert len(half.data) < 0.6 * len(part.data)


def test_measuring_trains_nothing(tiny: str) -> None:
    """With all that is known of sampled tokens, and as fine-tuning does it."""
    policy, trained = ready(tiny, rows_per_pass=2), ready(tiny, rows_per_pass=2)
    batch = train_data(policy, tiny_samples(4, 3))[0]
    for data, loss in ((batch, LOSS), (msgspec.structs.replace(batch, old=None, advantages=None, reference=None), nll)):
        measured, found = policy.measure(data, loss).sums, trained.accumulate(data, loss).sums
        assert {f"held_out_{name}" for name in found} - measured.keys() <= {"held_out_tokens_per_s", "held_out_tflops"}
        assert measured["held_out_loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert not any(view.any() for view in gradients(policy))
    assert policy.measure(batch.take([]), nll).sums == {}


def test_schedules() -> None:
    rates = [scheduled(2.0, step, schedule="cosine", warmup=2, total_steps=6) for step in range(8)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0])
    assert [scheduled(2.0, step, schedule="linear", warmup=0, total_steps=4) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    stable = {"schedule": "wsd", "warmup": 2, "total_steps": 10}
    assert [scheduled(2.0, step, cooldown=4, **stable) for step in range(11)] == [1.0, 2.0, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0.0]
    assert [scheduled(2.0, step, **stable) for step in (8, 9, 10)] == [2.0, 2.0, 0.0], "a tenth of the updates"
    assert [scheduled(2.0, step, schedule="constant", warmup=4, total_steps=0) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"publish_dtype": "fp8"}, "no publish_dtype 'fp8'"),
        ({"schedule": "step"}, "no schedule 'step'.*constant, linear, cosine"),
        ({"schedule": "cosine"}, "ends at total_steps"),
        ({"schedule": "linear", "warmup": 5, "total_steps": 5}, "ends at total_steps"),
        ({"rows_per_pass": 0}, "too small"),
        ({"clip": -1.0}, "too small"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy(tiny, **settings).check()


def test_roles_refuse_a_bad_folder_before_anything_starts(tiny: str) -> None:
    for role in (Policy("/no/such/folder"), Reference("/no/such/folder")):
        with pytest.raises(ModelError, match="is missing"):
            role.check()
    with pytest.raises(ConfigError, match="at least 1"):
        Reference(tiny, row_tokens=0).check()
    with pytest.raises(RolecallError, match="not set up"):
        Policy(tiny).update(1e-3)
    with pytest.raises(RolecallError, match="not set up"):
        Reference(tiny).logprobs(tiny_samples(1, 1))
