"""Mixes: shares are kept at every point, any place can be computed by itself, and sources that run dry do what was asked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError
from rolecall.roles.data import Mix, Stream
from rolecall.roles.data.mixing import Schedule

SHARES = st.lists(st.sampled_from([0.001, 0.2, 1.0, 3.0, 1000.0]), min_size=1, max_size=5)
FAR = [0, 1, 999, 10**6, 10**9, 10**12]  # positions where a place is computed by itself


@settings(deadline=None, max_examples=60)
@given(SHARES, st.integers(0, 2**63), st.data())
def test_any_stretch_of_a_schedule_is_the_same_computed_alone(shares: list[float], seed: int, data: st.DataObject):
    schedule = Schedule({0: shares}, [None] * len(shares), seed)
    start = data.draw(st.sampled_from(FAR)) + data.draw(st.integers(0, 50))
    cuts = sorted({start, start + 300, *(start + cut for cut in data.draw(st.lists(st.integers(0, 300), max_size=4)))})
    sources, numbers = schedule.chosen(start, start + 300)
    assert len(sources) == 300
    parts = [schedule.chosen(a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), sources)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), numbers)
    for index, before in enumerate(schedule.before(start)):
        own = numbers[sources == index]
        assert np.array_equal(own, np.arange(before, before + len(own))), "a record is given twice, or left out"


@settings(deadline=None, max_examples=40)
@given(SHARES, st.integers(0, 99), st.integers(0, 3000))
def test_shares_are_kept_at_every_point(shares: list[float], seed: int, position: int):
    schedule = Schedule({0: shares}, [None] * len(shares), seed)
    due = position * np.array(shares) / sum(shares)
    assert sum(schedule.before(position)) == position
    assert np.abs(np.array(schedule.before(position)) - due).max() <= len(shares) + 1  # each source may be a record early or late


def test_the_order_depends_on_the_seed_and_is_no_pattern():
    one, other = (Schedule({0: [1.0, 1.0]}, [None, None], seed).chosen(0, 400)[0] for seed in (1, 2))
    assert not np.array_equal(one, other)
    assert 100 < np.abs(np.diff(one)).sum() < 330  # neither blocks of one source nor one after the other


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.1, 1.0, 5.0])), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_a_stream_with_an_end_gives_every_record_once(parts: list[tuple[int, float]], seed: int, stop: bool):
    caps = [cap for cap, _ in parts]
    schedule = Schedule({0: [share for _, share in parts]}, caps, seed, stop=stop)
    sources, numbers = schedule.chosen(0, 10_000)
    assert len(sources) == schedule.length
    given = [numbers[sources == index].tolist() for index in range(len(caps))]
    assert all(each == list(range(len(each))) for each in given)
    if stop:
        assert any(len(each) == cap for each, cap in zip(given, caps, strict=True))
        assert all(len(each) <= cap for each, cap in zip(given, caps, strict=True))
    else:
        assert [len(each) for each in given] == caps
    assert schedule.chosen(schedule.length + 5, schedule.length + 9)[0].size == 0


def texts(count: int, word: str) -> list[dict]:
    return [{"text": f"{word}{number}"} for number in range(count)]


def words(mix: Mix, stop: int | None = None, seed: int = 0) -> list[str]:
    return [raw.columns["text"] for raw in Stream(mix, seed).at(0, stop)]


def count(found: list[str], word: str) -> int:
    return sum(each.startswith(word) for each in found)


def test_weights_temperature_and_epochs():
    sources = {"a": texts(900, "a"), "b": texts(100, "b")}
    assert count(words(Mix(sources, weights={"a": 1, "b": 3}), 400), "b") in range(297, 304)
    assert count(words(Mix(sources), 400), "b") in range(197, 204)
    assert count(words(Mix(sources, temperature=1.0), 400), "b") in range(37, 44)
    # a third of the exponent: 9 ** (1 / 2) = 3 times as many
    assert count(words(Mix(sources, temperature=2.0), 400), "b") in range(97, 104)
    whole = words(Mix(sources, epochs={"a": 1, "b": 2.5}))
    assert len(whole) == 900 + 250
    assert len(set(whole)) == 1000
    assert min({each for each in whole if whole.count(each) > 1}).startswith("b")


def test_a_curriculum_changes_shares_at_its_steps_and_ramps_change_them_bit_by_bit():
    sources = {"easy": texts(50, "e"), "hard": texts(50, "h")}
    steps = {0: {"easy": 1.0}, 10: {"easy": 1.0, "hard": 1.0}, 20: {"hard": 1.0}}
    found = words(Mix(sources, curriculum=steps, records_per_step=20), 600)
    assert count(found[:198], "h") == 0
    assert count(found[200:400], "h") in range(96, 105)
    assert count(found[402:], "e") == 0
    ramp = words(Mix(sources, curriculum={0: {"easy": 1.0}, 20: {"hard": 1.0}}, records_per_step=20, ramp=True), 400)
    quarters = [count(ramp[start : start + 100], "h") for start in range(0, 400, 100)]
    for found_, due in zip(quarters, (12.5, 37.5, 62.5, 87.5), strict=True):
        assert abs(found_ - due) <= 4


def test_a_source_that_runs_dry_is_repeated_left_or_ends_the_stream():
    sources = {"a": texts(40, "a"), "b": texts(5, "b")}
    again = words(Mix(sources, weights={"a": 1, "b": 1}), 60)
    assert count(again, "b") >= 25
    for start in range(0, 25, 5):  # every epoch gives each once, in another order
        assert sorted([each for each in again if each[0] == "b"][start : start + 5]) == [f"b{number}" for number in range(5)]
    left = words(Mix(sources, dry="leave"))
    assert sorted(left) == sorted(each["text"] for source in sources.values() for each in source)
    stopped = words(Mix(sources, dry="stop"))
    assert count(stopped, "b") == 5
    assert 3 <= count(stopped, "a") <= 7


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"sources": {}}, "at least one source"),
        ({"weights": {"a": 1, "c": 1}}, "names no source: c.*There is: a, b"),
        ({"weights": {"a": 1}}, "leaves out b"),
        ({"weights": {"a": -1, "b": 1}}, "at least 0"),
        ({"weights": {"a": 0, "b": 0}}, "not all 0"),
        ({"weights": {"a": float("nan"), "b": 0}}, "at least 0"),
        ({"weights": {"a": 1, "b": 1}, "temperature": 2}, "one way to divide"),
        ({"curriculum": {5: {"a": 1}}}, "begins at step 0"),
        ({"curriculum": {0: {"c": 1}}}, "names no source: c"),
        ({"temperature": -1}, "must be positive"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_mixes_that_make_no_sense_are_refused_before_anything_is_read(settings_: dict, message: str):
    with pytest.raises(DataError, match=message):
        Mix(**{"sources": {"a": "/nowhere.jsonl", "b": "/nowhere.jsonl"}, **settings_}).check()


@pytest.mark.parametrize("way", [{}, {"temperature": 2.0}, {"epochs": {"a": 1, "b": 1}}, {"dry": "leave"}, {"dry": "stop"}])
def test_an_empty_source_is_named(way: dict):
    with pytest.raises(DataError, match="The source 'b' is empty"):
        words(Mix({"a": texts(3, "a"), "b": []}, **way), 10)
    with pytest.raises(DataError, match="The source 'a' is empty"):
        words(Mix({"a": []}, **{**way, **({"epochs": {"a": 1}} if "epochs" in way else {})}), 10)
