"""What the training benchmarks count, and that all contenders get the same documents."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

SAME_ATTENTION = 1e-5  # float32 sums in another order
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def drawn(seed: int = 0, rows: int = 4, capacity: int = 256):
    from documents import Law, rows_of

    return rows_of(Law(3.5, 0.8, capacity), rows, capacity, 300, seed)


def test_rows_are_full_and_of_the_law() -> None:
    from documents import Law, rows_of, whole

    rows = rows_of(Law(6.5, 0.8, 8192), 8, 8192, 1000, 0)
    assert all(0.99 * 8192 <= sum(map(len, row)) <= 8192 for row in rows.documents)
    logs = np.log(np.concatenate([rows_of(Law(6.5, 0.8, 8192), 8, 8192, 1000, seed).lengths for seed in range(8)]))
    assert abs(logs.mean() - 6.5) < 0.1  # some 600 documents: a standard error of 0.03; a long document waits for longer in an open row
    assert abs(logs.std() - 0.8) < 0.1
    assert rows_of(whole(128), 3, 128, 1000, 0).lengths.tolist() == [128] * 3
    assert drawn(1).documents[0][0].tolist() == drawn(1).documents[0][0].tolist() != drawn(2).documents[0][0].tolist()


def test_ours_gets_each_document_once_and_predicts_all_but_its_first_token() -> None:
    rows = drawn()
    batch = rows.packed()
    flat = [each for row in rows.documents for each in row]
    for number, each in enumerate(flat):
        slots = np.flatnonzero(batch.segments == number)
        assert batch.tokens[slots].tolist() == each.tolist()
        assert batch.positions[slots].tolist() == list(range(len(each)))
        mine = batch.samples == number
        assert batch.sources[mine].tolist() == slots[:-1].tolist()
        assert batch.targets[mine].tolist() == each[1:].tolist()
    assert batch.weights.sum() == pytest.approx(1, rel=1e-5)
    assert len(batch.targets) == rows.trained == rows.tokens - len(flat)


@pytest.mark.parametrize("form", ["flattened", "padded"])
def test_peers_get_the_same_tokens_and_targets(form: str) -> None:
    rows = drawn()
    pairs = sorted((one, two) for row in rows.documents for each in row for one, two in pairwise(each.tolist()))
    seen, tokens = [], 0
    for batch in getattr(rows, form)(2):
        ids, labels = (np.asarray(batch[name]) for name in ("input_ids", "labels"))
        assert ids.shape == labels.shape
        tokens += int(np.asarray(batch["attention_mask"]).sum()) if form == "padded" else ids.size
        for row, wanted in zip(ids, labels, strict=True):
            seen += [(int(one), int(two)) for one, two in zip(row[:-1], wanted[1:], strict=True) if two != -100]
    assert sorted(seen) == pairs
    assert tokens == rows.tokens


def test_figures_are_of_the_median_step() -> None:
    from gpu import VENDOR_RATE
    from race import Result, figures

    results = {"a": Result(seconds=[0.5, 9.0, 0.4, 0.5, 0.6], memory=3.0, first=7.0)}
    found = figures(results, tokens=1000, flops=0.25 * VENDOR_RATE, rate=0.8 * VENDOR_RATE)
    assert found["tokens/s"] == {"a": 2000}
    assert found["MFU % of 989"] == {"a": 50.0}
    assert found["MFU % of measured"] == {"a": 62.5}
    assert (found["peak GiB"], found["start s"]) == ({"a": 3.0}, {"a": 7.0})


def test_gaps_are_of_the_worst_peer_and_not_a_number_is_no_agreement() -> None:
    from race import LOSS_TOLERANCE, Result, exactly, gaps, nearly

    results = {"own": Result(loss=2.0, norm=1.0), "near": Result(loss=2.0, norm=1.0), "far": Result(loss=2.02, norm=0.5)}
    assert gaps(results, "own") == pytest.approx({"loss": 0.02 / 2.02, "norm": 1.0})
    _, targets = nearly(results, "own")
    assert [met for _, met in targets.values()] == [False, False]
    assert LOSS_TOLERANCE < 0.02 / 2.02
    with pytest.raises(SystemExit, match="disagree"):
        exactly(results, "own")
    del results["far"]
    assert set(exactly(results, "own").values()) == {0.0}
    assert gaps({**results, "broken": Result(loss=math.nan, norm=1.0)}, "own")["loss"] == math.inf


class Steps:
    """A contender that counts, and fails at a step."""

    about = "counts"

    def __init__(self, fails: int = -1) -> None:
        self.steps, self.fails, self.closed = 0, fails, False

    def step(self, rows: object) -> None:
        self.steps += 1
        if self.steps == self.fails:
            raise RuntimeError("no more\nof this")

    def loss_and_norm(self, rows: object) -> tuple[float, float]:
        return 1.0, 2.0

    def close(self) -> None:
        self.closed = True


def test_a_race_outlives_what_fails_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    from race import race

    sound, late = Steps(), Steps(fails=2 + 3)
    missing: dict[str, str] = {}
    makers = {"own": lambda: sound, "at once": lambda: Steps(fails=1), "late": lambda: late}
    results = race(makers, [0, 1], rounds=5, steps={"own": 2, "late": 1}, missing=missing)
    assert list(results) == ["own"]
    assert len(results["own"].seconds) == 5
    assert sound.steps == 2 + 5 * 2
    assert sound.closed
    assert late.closed
    assert missing == {"at once": "RuntimeError: no more", "late": "round 2: RuntimeError: no more"}
    assert "round 4, seconds a step: own" in capsys.readouterr().out


def test_a_race_ends_in_time_with_what_it_has() -> None:
    from race import race

    missing: dict[str, str] = {}
    makers = {"own": Steps, "other": Steps}
    results = race(makers, [0], rounds=5, steps={"own": 1, "other": 1}, missing=missing, until=time.monotonic() - 1)
    assert missing == {"other": "no time was left"}
    assert len(results["own"].seconds) == 1


def test_gaps_between_kernels_leave_out_what_overlaps() -> None:
    from breakdown import gaps_of

    spans = [(20.0, 30.0, "c"), (0.0, 10.0, "a"), (5.0, 7.0, "b"), (30.0, 31.0, "d"), (131.0, 132.0, "e")]
    gaps, wall = gaps_of(spans)
    assert wall == pytest.approx(0.132)
    assert gaps == [(pytest.approx(0.01), "a", "c"), (pytest.approx(0.1), "d", "e")]


def test_padding_counts_slots_of_batches_as_they_come() -> None:
    from documents import Law, Rows
    from pack_gain import ideal, padding

    rows = Rows([[np.zeros(size, np.int32) for size in (5, 1, 1)], [np.zeros(size, np.int32) for size in (3, 2)]], 8)
    sizes = [len(each) for each in rows.shuffled]
    assert padding(rows, 2) == (2 * max(sizes[:2]) + 2 * max(sizes[2:4]) + sizes[4]) / 12
    assert padding(rows, 5) == 25 / 12
    assert ideal(Law(6.0, 1.5, 32768), 8) == pytest.approx(4.31, abs=0.03)
    assert ideal(Law(6.0, 1.5, 32768), 16) == pytest.approx(6.43, abs=0.05)


def test_padded_rows_train_the_documents_alone() -> None:
    from pack_gain import padded_rows

    documents = [np.arange(1, 6, dtype=np.int32), np.arange(11, 13, dtype=np.int32)]
    batch = padded_rows(documents, 5)
    assert batch.capacity == 5
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 11, 12, 0, 0, 0]
    assert batch.sources.tolist() == [0, 1, 2, 3, 5]
    assert batch.targets.tolist() == [2, 3, 4, 5, 12]
    assert batch.weights.tolist() == pytest.approx([0.2] * 5)
    assert (batch.segments >= 0).all()


def by_sequence(q, k, v, ends, _ends, longest, _longest, _dropout, causal, _debug, *, scale, window_size_left=-1, window_size_right=-1):
    """What torch's FlashAttention 2 computes of sequences end to end, one after the other."""
    assert causal
    assert longest == int(ends.diff().max())
    out = torch.empty_like(q)
    for start, stop in pairwise(ends.tolist()):
        one, two, three = (part[start:stop].transpose(0, 1)[None] for part in (q, k, v))
        far = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (far >= 0) & (far <= window_size_left if window_size_left >= 0 else far >= 0)
        mixed = torch.nn.functional.scaled_dot_product_attention(one, two, three, attn_mask=seen, scale=scale, enable_gqa=True)
        out[start:stop] = mixed[0].transpose(0, 1)
    return (out,)


@pytest.mark.parametrize("form", ["flattened", "padded"])
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Gemma3-1B"])
def test_the_peers_attention_sees_what_sdpa_sees(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contenders
    from documents import Rows
    from models import build, small

    monkeypatch.setattr(contenders, "flash", by_sequence)
    rows, model = drawn(rows=2, capacity=128), build(name, tmp_path / "model", dtype="float32", **small(name))
    found = []
    for attention in ("varlen", "sdpa"):
        peer = contenders.HuggingFace(
            attention, "", model, form=getattr(Rows, form), micro=(4,), attention=attention, device="cpu", dtype="float32"
        )
        found.append(peer.loss_and_norm(rows))
    assert found[0] == pytest.approx(found[1], rel=SAME_ATTENTION)
