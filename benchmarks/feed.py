"""From raw chat records to packed, masked rows on two cores: ours beside datasets' `map` with TRL's packing.

    python benchmarks/feed.py [--quick] [--out FILE]

Records are conversations of worked word problems (reasoning-gym), several questions and answers each; the tokenizer is that of the
model folder in `ROLECALL_MODEL`, or the demo model's. First every record's tokens and mask are compared with the peer's. Then both sides go
over all records with two processes, which stay up between rounds and do a little untimed work before each; the peer is given
what its documentation recommends: a batched `map` with a process a core, then `pack_dataset(…, "bfd")`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np

CORES = 2
CAPACITY = 8192
TURNS = 4  # questions and answers of a conversation
TARGET_HF, TARGET_RATE = 10.0, 5e6  # times the peer; tokens/s
PEER = "datasets map + TRL packing"
PROBE = 64  # records whose tokens are compared one by one

_feed: Any = None  # of this process


def records(count: int) -> list[dict[str, Any]]:
    """Conversations of `TURNS` worked word problems."""
    from rolecall.roles.data import ReasoningGym

    source = ReasoningGym("gsm_symbolic", size=count * TURNS, completion="answer_cot")
    found, said = [], []
    for _, problem in source.records(repeats=True):
        said += [{"role": "user", "content": problem["prompt"]}, {"role": "assistant", "content": problem["completion"]}]
        if len(said) == 2 * TURNS:
            found.append({"messages": said})
            said = []
    return found


def ready(path: str, model: str, block: int) -> None:
    """Make this process a data member."""
    global _feed
    from rolecall.roles.base import Member
    from rolecall.roles.data import Documents, Files, Mix

    _feed = Documents(Mix({"chat": Files(path)}, epochs={"chat": 1}), model=model, row_tokens=CAPACITY, block=block)
    _feed.setup(Member())


def made(block: int) -> int:
    """Tokens of a block of rows."""
    batch = _feed.batch(block)
    return int((batch.segments >= 0).sum())


def ours(pool: ProcessPoolExecutor, blocks: int) -> Callable[[], int]:
    """All blocks, each member in turn, as a run asks for them."""
    return lambda: sum(pool.map(made, range(blocks)))


def peer_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens and labels of one conversation as the ecosystem makes them where a template has no generation markers: the template
    up to each answer, and with it; what is new is trained."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in range(1, len(messages), 2):
        before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=True, return_dict=False)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=True, return_dict=False)
        labels += [-100] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return ids, labels


def peer(data: Any, model: str, pack: Callable[..., Any]) -> Callable[[], int]:
    """datasets' map over all records, then TRL's packing, without its cache on disk."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        found = [peer_tokens(tokenizer, messages) for messages in batch["messages"]]
        return {"input_ids": [ids for ids, _ in found], "labels": [labels for _, labels in found]}

    def run() -> int:
        mapped = data.map(encode, batched=True, num_proc=CORES, remove_columns=data.column_names, load_from_cache_file=False)
        return sum(map(len, pack(mapped, CAPACITY, "bfd")["input_ids"]))

    return run


def check(sample: list[dict[str, Any]], model: str) -> tuple[int, int]:
    """Ours and the peer's tokens of some records are the same, and so are the masks, but for the line break that a template writes
    after an answer: nobody samples it, and ours doesn't train it. Returns records and tokens compared."""
    from rolecall.roles.data.encode import Encoder
    from rolecall.roles.data.records import recognise
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    layout = recognise(["messages"])
    encoded = Encoder(tokenizer).encode_all([layout.read(each) for each in sample])
    tokens = 0
    for own, each in zip(encoded, sample, strict=True):
        ids, labels = peer_tokens(tokenizer, each["messages"])
        assert own.tokens.tolist() == ids, "the ids differ"
        trained = np.array(labels) != -100
        more = np.flatnonzero(trained & ~own.trained)
        assert not (own.trained & ~trained).any(), "the peer doesn't train what ours does"
        assert {tokenizer.decode([ids[at]]).strip() for at in more} <= {""}, "ours doesn't train what the peer does"
        tokens += len(ids)
    return len(sample), tokens


def main() -> None:
    """The benchmark."""
    given = harness.arguments(__doc__ or "")
    model = os.environ.get("ROLECALL_MODEL", str(Path(__file__).resolve().parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"))
    count, block = (1024, 256) if given.quick else (8192, 512)
    chats = records(count)
    compared = check(chats[:PROBE], model)
    print(f"exact: {compared[0]} records, {compared[1]} tokens: ids equal, masks equal but for the line break after an answer")
    missing, contenders = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        import msgspec

        path.write_bytes(b"\n".join(map(msgspec.json.encode, chats)) + b"\n")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(CORES, mp_context=context, initializer=ready, initargs=(str(path), model, block)) as pool:
            contenders["ours"] = ours(pool, -(-count // block))
            before = {"ours": ours(pool, 2 * CORES)}
            try:
                import datasets
                from trl import pack_dataset
            except ImportError as error:
                missing[PEER] = str(error)
            else:
                datasets.disable_progress_bars()
                data = datasets.Dataset.from_json(str(path), cache_dir=folder)
                contenders[PEER] = peer(data, model, pack_dataset)
                before[PEER] = peer(data.select(range(2 * PROBE)), model, pack_dataset)
            tokens = contenders["ours"]()
            timings = harness.alternate(contenders, given.rounds, before=before)
    rate = tokens / timings["ours"].median
    times = timings[PEER].median / timings["ours"].median if PEER in timings else float("nan")
    harness.finish(
        bench="feed",
        workload=f"{count} conversations of {TURNS} turns, {tokens / count:.0f} tokens each, to rows of {CAPACITY}; {CORES} processes",
        timings=timings,
        ours="ours",
        targets={"times the peer": (times, times >= TARGET_HF), "tokens/s": (rate, rate >= TARGET_RATE)},
        target=f">= {TARGET_HF:g}x datasets map + TRL packing, >= {TARGET_RATE / 1e6:g} M tokens/s",
        unit="s",
        scale=1.0,
        missing=missing,
        details={"tokens_per_s": rate, "tokens": tokens, "records": count},
        packages=("datasets", "tokenizers", "transformers", "trl", "numpy"),
        quick=given.quick,
        out=given.out,
    )


if __name__ == "__main__":
    main()
