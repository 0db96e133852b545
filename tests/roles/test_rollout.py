"""The rollout role and its native engine against transformers' own generation and forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prompting import prompts_of, random_rows
from rolecall.protocols import Samples, check, decode, encode
from rolecall.roles.base import Member
from rolecall.roles.rollout import Rollout
from tiny import tiny_model

LOGPROB = 2e-5  # float32: a cached step and a whole forward add in another order; logprobs here are down to -20
LENGTHS = (1, 17, 5, 30, 9, 2, 23, 11, 40, 7)
EOS = 2


@pytest.fixture(scope="module")
def rollout(tiny):
    role = Rollout(tiny, slots=4, max_tokens=20)
    role.setup(Member(seed=7))
    return role


@pytest.fixture(scope="module")
def theirs(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def completions(samples):
    """Token ids of each completion."""
    ends, starts = samples.cu_seqlens[1:], samples.cu_seqlens[:-1] + samples.prompt_lengths
    return [samples.tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def greedy_of(model, row, count):
    out = model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=count, eos_token_id=EOS, pad_token_id=3)
    return out[0, len(row) :].tolist()


@torch.no_grad()
def forward_logprobs(model, samples, temperature):
    """Logprob of each completion token by one whole forward a sample."""
    found = []
    for start, end, prompt in zip(samples.cu_seqlens, samples.cu_seqlens[1:], samples.prompt_lengths, strict=False):
        row = torch.from_numpy(samples.tokens[start:end].astype(np.int64))
        table = (model(row[None]).logits[0] / temperature).log_softmax(-1)
        found.append(np.concatenate([np.zeros(prompt), table[prompt - 1 : -1].gather(1, row[prompt:, None])[:, 0].numpy()]))
    return np.concatenate(found)


def test_greedy_equals_transformers_with_more_sequences_than_slots(rollout, theirs):
    rows = random_rows(LENGTHS)
    samples = rollout.generate(prompts_of(rows), temperature=0)
    assert completions(samples) == [greedy_of(theirs, row, 20) for row in rows]
    assert np.abs(samples.logprobs - forward_logprobs(theirs, samples, 1.0)).max() < LOGPROB
    assert samples.temperature == 1.0


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_the_number_of_slots_changes_nothing(tiny, rollout, slots):
    prompts = prompts_of(random_rows(LENGTHS))
    other = Rollout(tiny, slots=slots, max_tokens=20)
    other.setup(Member(seed=7))
    assert completions(other.generate(prompts, per_prompt=3)) == completions(rollout.generate(prompts, per_prompt=3))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 20, 0.9)])
def test_logprobs_equal_a_whole_forward_at_the_temperature(rollout, theirs, temperature, top_k, top_p):
    rows = random_rows(LENGTHS)
    stop = list("abcdefghij")  # now and then one is said: completions of many lengths
    samples = rollout.generate(prompts_of(rows), per_prompt=3, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop)
    assert samples.temperature == temperature
    assert np.abs(samples.logprobs - forward_logprobs(theirs, samples, temperature)).max() < LOGPROB
    lengths = np.diff(samples.cu_seqlens) - samples.prompt_lengths
    assert len(set(lengths.tolist())) > 1, "every completion is equally long: slots never fell free one by one"


@pytest.mark.parametrize("shape", [{"kv_heads": 4}, {"kv_heads": 1}, {"tied": False, "layers": 3}])
def test_other_shapes_of_model(tmp_path, shape):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "model", **shape, seed=3)
    role = Rollout(folder, slots=3, max_tokens=100)
    role.setup(Member())
    rows = random_rows((4, 90, 33, 64))
    samples = role.generate(prompts_of(rows), temperature=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert completions(samples) == [greedy_of(model, row, 100) for row in rows], "100 tokens: the cache has to grow"


def test_the_message_is_laid_out_as_it_says(rollout):
    rows = random_rows((3, 8, 5))
    prompts = prompts_of(rows, ids=("a", "b", "c"), tokenizer=rollout._identity)
    rollout.version = 4
    samples = rollout.generate(prompts, per_prompt=2)
    rollout.version = 0
    assert samples.ids == ("a", "b", "c")
    assert samples.columns == prompts.columns
    assert samples.counts.tolist() == [2, 2, 2]
    assert samples.siblings.tolist() == [0, 1] * 3
    assert samples.prompt_lengths.tolist() == [3, 3, 8, 8, 5, 5]
    for number in range(6):
        start = samples.cu_seqlens[number]
        assert samples.tokens[start : start + samples.prompt_lengths[number]].tolist() == rows[number // 2]
        assert (samples.logprobs[start : start + samples.prompt_lengths[number]] == 0).all()
    assert (samples.span_starts.tolist(), samples.span_versions.tolist()) == ([0], [4])
    assert (samples.tokens.dtype, samples.logprobs.dtype, samples.finish.dtype) == (np.int32, np.float32, np.uint8)


@pytest.mark.parametrize("lengths", [(), (3,), (3, 8, 5)])
def test_the_message_passes_its_checks_and_survives_the_wire(rollout, lengths):
    samples = rollout.generate(prompts_of(random_rows(lengths)), per_prompt=2)
    check(samples)
    back = decode(encode(samples), Samples)
    assert np.array_equal(back.tokens, samples.tokens)
    assert back.completions == samples.completions
    assert len(back.finish) == 2 * len(lengths)


def test_siblings_share_one_prefill(rollout):
    rows = random_rows((30, 12, 21))
    before = rollout._engine.prefilled
    samples = rollout.generate(prompts_of(rows), per_prompt=9)  # more siblings than the four slots
    assert rollout._engine.prefilled - before == 63
    first = completions(samples)[:9]
    assert len({tuple(one) for one in first}) > 1, "all siblings are the same"


def test_what_all_prompts_begin_with_is_computed_once(rollout, theirs):
    beginning, tails = random_rows((40,))[0], random_rows((3, 1, 8, 20, 5), seed=1)
    rows = [beginning + tail for tail in tails]
    before = rollout._engine.prefilled
    samples = rollout.generate(prompts_of(rows), temperature=0)
    assert rollout._engine.prefilled - before == 40 + sum(map(len, tails))
    assert completions(samples) == [greedy_of(theirs, row, 20) for row in rows]
    assert np.abs(samples.logprobs - forward_logprobs(theirs, samples, 1.0)).max() < LOGPROB
    before = rollout._engine.prefilled
    rollout.generate(prompts_of([beginning] * 3))
    assert rollout._engine.prefilled - before == 39 + 3, "equal prompts: each keeps one token of its own"


def test_a_sample_does_not_depend_on_its_neighbours(rollout):
    rows = random_rows(LENGTHS)
    ids = [f"q{number}" for number in range(len(rows))]
    together = completions(rollout.generate(prompts_of(rows, ids=ids), per_prompt=4))
    for number in (0, 3, 8):
        alone = completions(rollout.generate(prompts_of([rows[number]], ids=[ids[number]], keys=[number]), per_prompt=2))
        assert alone == together[4 * number : 4 * number + 2]
    backwards = completions(rollout.generate(prompts_of(rows[::-1], ids=ids[::-1], keys=range(len(rows))[::-1]), per_prompt=4))
    assert [backwards[4 * n : 4 * n + 4] for n in range(len(rows))][::-1] == [together[4 * n : 4 * n + 4] for n in range(len(rows))]


def test_a_sample_depends_on_run_seed_key_and_prompt_id(tiny, rollout):
    row = random_rows((6,))
    base = completions(rollout.generate(prompts_of(row)))
    assert completions(rollout.generate(prompts_of(row))) == base
    other = Rollout(tiny, max_tokens=20)
    other.setup(Member(seed=8, rank=1, world=2))
    assert completions(other.generate(prompts_of(row))) != base
    assert completions(rollout.generate(prompts_of(row, keys=[1]))) != base
    assert completions(rollout.generate(prompts_of(row, ids=["z"]))) != base
    other.member = Member(seed=7, rank=1, world=2)
    assert completions(other.generate(prompts_of(row))) == base, "the member's rank changed its samples"


def test_end_tokens_stay_and_finish_reasons_are_told(rollout):
    samples = rollout.generate(prompts_of(random_rows(LENGTHS)), per_prompt=4, temperature=3.0, max_tokens=60)
    found = completions(samples)
    ended = [one[-1] == EOS for one in found]
    assert samples.finish.tolist() == [0 if end else 1 for end in ended]
    assert any(ended)
    assert not all(ended)
    assert all(EOS not in one[:-1] for one in found)
    assert all(len(one) == 60 for one, end in zip(found, ended, strict=True) if not end)
    assert not any("<|im_end|>" in text for text in samples.completions)


def test_a_stop_text_ends_with_the_token_that_completes_it(rollout):
    prompts = prompts_of(random_rows((5, 9)))
    free = completions(rollout.generate(prompts, temperature=0))
    stop = rollout._tokenizer.decode(free[0][3:6])
    assert len(stop) == 3
    samples = rollout.generate(prompts, temperature=0, stop=[stop])
    assert completions(samples)[0] == free[0][:6]
    assert samples.finish[0] == 0
    assert samples.completions[0].endswith(stop)
    assert completions(samples)[1] == free[1] or stop in samples.completions[1]


def test_max_tokens_beyond_the_context_is_shortened(rollout):
    rows = random_rows((505, 511, 4))
    samples = rollout.generate(prompts_of(rows), max_tokens=2000, temperature=0, stop=["never"])
    lengths = np.diff(samples.cu_seqlens)
    for length, finish in zip(lengths, samples.finish, strict=True):
        assert length <= 512
        assert finish == 0 or length == 512


def test_what_is_measured(rollout):
    rollout.meter.drain()
    samples = rollout.generate(prompts_of(random_rows((5, 9, 3))), per_prompt=2)
    sums = rollout.meter.drain()
    made = int((np.diff(samples.cu_seqlens) - samples.prompt_lengths).sum())
    assert sums["tokens"] == (made, 1)
    assert sums["completion_length"] == (pytest.approx(made), 6)
    assert sums["finished_by_length"] == (pytest.approx((samples.finish == 1).sum()), 6)
    assert sums["tokens_per_s"][0] == pytest.approx(made)
    assert sums["prompt_tokens"] == (34, 1)
