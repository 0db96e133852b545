"""Decoding steps that are recorded and replayed: what a step has too many of touches nobody, and what is generated stays the same."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from families import family_model
from prompting import prompts_of, random_rows
from rolecall.roles.base import Member
from rolecall.roles.reference import Reference
from rolecall.roles.rollout import Rollout
from rolecall.roles.rollout.engine import Engine
from rolecall.roles.rollout.replay import CudaGraphs, replayable

LOGPROB = 5e-5  # float32, sums in another order; logprobs down to -20
LENGTHS = (1, 17, 5, 30, 9, 2, 23, 11, 40, 7)


class Recorder:
    """Does the work again at each replay, and takes away what the one before returned, as graphs with one memory do."""

    def __init__(self):
        self.records, self.replays, self._last = 0, 0, None

    def __call__(self, work):
        self.records += 1

        def replay():
            if self._last is not None:
                self._last.fill_(float("nan"))
            self.replays += 1
            self._last = work().clone()
            return self._last

        return replay


def completions(samples):
    ends, starts = samples.cu_seqlens[1:], samples.cu_seqlens[:-1] + samples.prompt_lengths
    return [samples.tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def pair(folder: Path, device: str = "cpu", **settings):
    """A rollout role as it is, and one with each step done as it comes, or replayed by a `Recorder`."""
    roles, recorder = [], Recorder()
    for _ in range(2):
        role = Rollout(folder, **settings)
        role.setup(Member(seed=7, device=device))
        roles.append(role)
    engine = roles[1]._engine
    roles[1]._engine = Engine(engine._model, slots=roles[1].slots, ends=engine._ends, record=recorder)
    return *roles, recorder


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 4, 7, 64])
@pytest.mark.parametrize("start", [(), tuple(range(5, 105))], ids=["apart", "shared beginning"])
def test_the_same_is_generated(tiny, slots, start):
    """The shared beginning is in every slot from the start: nothing may write over it."""
    plain, replayed, recorder = pair(tiny, slots=slots, max_tokens=70)
    prompts = prompts_of([[*start, *row] for row in random_rows(LENGTHS)])
    stop = list("abc")  # now and then one is said: slots fall free one by one
    for temperature in (0.0, 1.0):
        wanted, found = (role.generate(prompts, per_prompt=3, temperature=temperature, stop=stop) for role in (plain, replayed))
        assert completions(found) == completions(wanted)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=LOGPROB)
    assert recorder.replays > 4 * recorder.records > 0, "records don't serve many steps"


@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma3", "gpt-oss"])
def test_families(name, tmp_path):
    plain, replayed, recorder = pair(family_model(name, tmp_path, tokenizer=True), slots=5, max_tokens=30)
    prompts = prompts_of(random_rows(LENGTHS))
    wanted, found = (role.generate(prompts, temperature=0) for role in (plain, replayed))
    assert completions(found) == completions(wanted)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=LOGPROB)
    assert recorder.replays


def test_a_cpu_has_nothing_to_record(rollout_model):
    assert not replayable(rollout_model)


@pytest.fixture
def rollout_model(tiny):
    from rolecall.roles.models import load

    return load(tiny)


class FakeCuda:
    """What of torch.cuda is called to record graphs, with PyTorch's rule of pools: one that its last graph has left takes none any more."""

    def __init__(self, monkeypatch):
        self.graphs, self.streams, self.device = {}, 0, None  # pool → graphs in it
        cuda, own = self, {"graph_pool_handle": lambda: (0, len(self.graphs)), "current_stream": self.stream_made}

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                assert cuda.device == torch.device("cuda:1"), "work is recorded on the device that it is done on"
                assert cuda.graphs.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
                cuda.graphs[pool] = cuda.graphs.get(pool, 0) + 1
                self.pool = pool

            def capture_end(self):
                pass

            replay = capture_end

            def __del__(self):
                cuda.graphs[self.pool] -= 1

        for name, value in {**own, "CUDAGraph": Graph, "Stream": self.stream_made, "stream": nullcontext, "device": self.on}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "zeros", lambda *sizes, device: torch.ones(1))

    def stream_made(self):
        self.streams += 1
        return type("Stream", (), {"wait_stream": lambda self, other: None})()

    @contextmanager
    def on(self, device):
        self.device, before = device, self.device
        yield
        self.device = before


def test_graphs_that_are_let_go_of_leave_a_pool_that_takes_others(monkeypatch):
    """As when the cache grows, or another run begins: all records so far are useless then."""
    cuda, done = FakeCuda(monkeypatch), []
    graphs = CudaGraphs(torch.device("cuda:1"))
    assert not cuda.graphs, "as long as nothing is generated no memory is taken"
    for number in range(3):
        record = graphs(lambda number=number: done.append(number) or torch.tensor(number))
        assert record() == number
        assert cuda.graphs == {(0, 0): 2}
        del record
    assert done == [0, 1, 2]
    assert cuda.graphs == {(0, 0): 1}
    del graphs
    assert cuda.graphs == {(0, 0): 0}


EACH = 2 * 2 * 2 * 16 * 4 * 50  # keys and values, layers, heads, size, bytes, tokens


@pytest.mark.parametrize(("free", "kept", "slots"), [(40, 0, 10), (30, 10, 10), (0, 0, 1), (9999, 0, 512)])
def test_as_many_slots_as_free_memory_has_room_for(rollout_model, monkeypatch, free, kept, slots):
    """What PyTorch keeps of the run before counts as free: runs alike have as many slots."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * EACH, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept * EACH + 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    for asked, found in ((0, slots), (3, 3)):
        engine = Engine(rollout_model, slots=asked, ends=frozenset())
        engine._device = torch.device("cuda")
        assert engine.slots_for(50) == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma3", "gemma3-untied-capped", "llama-untied-biased", "llama-llama3", "llama-yarn"])
@pytest.mark.parametrize("start", [0, 50], ids=["apart", "shared beginning"])
def test_graphs_on_a_gpu(name, start, tmp_path):
    """What CUDA graphs sample is what the packed trainer computes, also after the cache has grown and in a second run."""
    folder = family_model(name, tmp_path, tokenizer=True)
    rollout, reference = Rollout(folder, slots=8, max_tokens=90), Reference(folder, row_tokens=1024)
    for role in (rollout, reference):
        role.setup(Member(seed=7, device="cuda:0"))

    assert replayable(rollout._model)
    begins = random_rows((start,), seed=3)[0] if start else []
    prompts = prompts_of([begins + row for row in random_rows(LENGTHS[:8] * 2)])
    for _ in range(2):
        samples = rollout.generate(prompts, per_prompt=2)
        wanted = reference.logprobs(samples).logprobs * (samples.logprobs != 0)
        np.testing.assert_allclose(samples.logprobs, wanted, rtol=0, atol=LOGPROB)
