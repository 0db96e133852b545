"""`codec`: one rollout batch encoded, decoded and split to 8 readers, against what others pass their batches with.

The same 512 rollouts go through each contender, from the form that its framework keeps them in to eight parts that a
reader can use. Ours pays for its checksum on both sides and for its checks where the batch is encoded (in one
piece, as from a socket, on both sides); no peer verifies anything.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Timing, alternate, arguments, finish
from rolecall.protocols import Samples, decode, encode, from_bytes, to_bytes

SEED, PROMPTS, SIBLINGS, READERS = 7, 64, 8, 8
LONGEST_PROMPT, LONGEST_COMPLETION, TOKENS = 1024, 3072, 488_000  # verl pads to the two limits, as its configuration does
PACKAGES = ("rolecall", "numpy", "msgspec", "xxhash", "verl", "torch", "tensordict", "protobuf")


def workload(prompts: int) -> Samples:
    """`prompts` x 8 rollouts of lognormal length, 953 tokens on average."""
    random = np.random.default_rng(SEED)
    number = prompts * SIBLINGS
    prompt = np.repeat(random.integers(64, 512, prompts), SIBLINGS)
    completion = random.lognormal(0.0, 0.8, number)
    wanted = TOKENS * prompts // PROMPTS - int(prompt.sum())
    completion = np.clip(completion / completion.sum() * wanted, 1, LONGEST_COMPLETION).astype(np.int64)
    lengths = prompt + completion
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    logprobs = -random.exponential(0.5, int(cu_seqlens[-1])).astype(np.float32)
    for begin, length in zip(cu_seqlens, prompt, strict=False):
        logprobs[begin : begin + length] = 0
    return Samples(
        keys=np.arange(prompts),
        ids=tuple(f"record-{number}" for number in range(prompts)),
        texts=("",) * prompts,
        counts=np.full(prompts, SIBLINGS, np.int32),
        tokens=random.integers(0, 150_000, int(cu_seqlens[-1]), dtype=np.int32),
        logprobs=logprobs,
        cu_seqlens=cu_seqlens,
        prompt_lengths=prompt.astype(np.int32),
        siblings=np.tile(np.arange(SIBLINGS, dtype=np.int32), prompts),
        finish=(completion == LONGEST_COMPLETION).astype(np.uint8),
        completions=("",) * number,
        span_starts=np.array([0]),
        span_versions=np.array([3]),
    )


class Contender:
    """A form of the batch, what sends it through bytes to 8 parts, and what reads tokens and logprobs back from them."""

    name: str
    about: str

    def run(self) -> Any:
        raise NotImplementedError

    def read(self, parts: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, logprobs) of each sample, in order."""
        raise NotImplementedError

    def size(self) -> int:
        """Bytes on the wire."""
        raise NotImplementedError


class Ours(Contender):
    """What a frame costs where it is handed on as Ray does it: its parts out of band. What a transport copies is counted for nobody."""

    name, about = "rolecall", "encode, decode, 8 x take; all bytes hashed on both sides, all values checked where they are encoded"

    def __init__(self, batch: Samples) -> None:
        self.batch = batch
        self.units = shares(len(batch.keys))

    def run(self) -> list[Samples]:
        received = decode(encode(self.batch), Samples)
        return [received.take(units) for units in self.units]

    def read(self, parts: list[Samples]) -> list[tuple[np.ndarray, np.ndarray]]:
        return rollouts(Samples.join(parts))

    def size(self) -> int:
        return len(to_bytes(encode(self.batch)))


class Copied(Ours):
    """The same with the copy that a store or a socket makes of it, into memory mapped beforehand."""

    name, about = "rolecall, in one piece", "encode, write_into memory, from_bytes and decode there, 8 x take"

    def __init__(self, batch: Samples) -> None:
        super().__init__(batch)
        self.memory = bytearray(self.size())

    def run(self) -> list[Samples]:
        encode(self.batch).write_into(self.memory)
        received = decode(from_bytes(self.memory), Samples)
        return [received.take(units) for units in self.units]


class Pickled(Contender):
    """Pickle protocol 5 of one object a rollout."""

    def __init__(self, batch: Samples, lists: bool) -> None:
        self.name = "pickle 5" if lists else "pickle 5, arrays"
        self.about = f"a list of rollouts, each with {'lists' if lists else 'arrays'} of tokens and logprobs; dumps, loads, 8 slices"
        turned = [(t.tolist(), p.tolist()) if lists else (t.copy(), p.copy()) for t, p in rollouts(batch)]
        prompts = batch.prompt_lengths.tolist()
        self.rollouts = [
            {"id": batch.ids[number // SIBLINGS], "sibling": number % SIBLINGS, "prompt_length": prompts[number], "version": 3,
             "finish": "stop", "tokens": tokens, "logprobs": logprobs}
            for number, (tokens, logprobs) in enumerate(turned)
        ]  # fmt: skip

    def run(self) -> list[Any]:
        received = pickle.loads(pickle.dumps(self.rollouts, protocol=5))
        each = len(received) // READERS
        return [received[start : start + each] for start in range(0, len(received), each)]

    def read(self, parts: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.asarray(one["tokens"], np.int32), np.asarray(one["logprobs"], np.float32)) for part in parts for one in part]

    def size(self) -> int:
        return len(pickle.dumps(self.rollouts, protocol=5))


class PickledFlat(Contender):
    name = "pickle 5, our layout"
    about = "our own flat message as it is, unchecked: dumps, loads, 8 x take"

    def __init__(self, batch: Samples) -> None:
        self.batch = batch
        self.units = shares(len(batch.keys))

    def run(self) -> list[Samples]:
        received = pickle.loads(pickle.dumps(self.batch, protocol=5))
        return [received.take(units) for units in self.units]

    def read(self, parts: list[Samples]) -> list[tuple[np.ndarray, np.ndarray]]:
        return rollouts(Samples.join(parts))

    def size(self) -> int:
        return len(pickle.dumps(self.batch, protocol=5))


class Verl(Contender):
    """verl's DataProto as its rollout workers return it: padded tensors; pickle of it is its wire form."""

    def __init__(self, batch: Samples, mode: str) -> None:
        import torch
        from verl import DataProto

        self.mode = mode
        self.name = "verl DataProto" if not mode else f"verl DataProto, {mode}"
        self.about = f"padded to {LONGEST_PROMPT} + {LONGEST_COMPLETION}; pickle 5 dumps, loads, chunk(8)"
        number, width = len(batch.siblings), LONGEST_PROMPT + LONGEST_COMPLETION
        ids, mask = torch.zeros(number, width, dtype=torch.int64), torch.zeros(number, width, dtype=torch.int64)
        logprobs = torch.zeros(number, LONGEST_COMPLETION)
        for row, ((tokens, values), prompt) in enumerate(zip(rollouts(batch), batch.prompt_lengths.tolist(), strict=True)):
            start = LONGEST_PROMPT - prompt
            ids[row, start : start + len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, start : start + len(tokens)] = 1
            logprobs[row, : len(tokens) - prompt] = torch.from_numpy(values[prompt:].copy())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        tensors = {
            "prompts": ids[:, :LONGEST_PROMPT].clone(), "responses": ids[:, LONGEST_PROMPT:].clone(), "input_ids": ids,
            "attention_mask": mask, "position_ids": positions, "response_mask": mask[:, LONGEST_PROMPT:].clone(),
            "rollout_log_probs": logprobs,
        }  # fmt: skip
        names = np.array([batch.ids[row // SIBLINGS] for row in range(number)], dtype=object)
        self.data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": names})

    def _in_mode(self, call: Callable[[], Any]) -> Any:
        """verl reads the mode from the environment at each pickling and unpickling."""
        os.environ["VERL_DATAPROTO_SERIALIZATION_METHOD"] = self.mode
        try:
            return call()
        finally:
            del os.environ["VERL_DATAPROTO_SERIALIZATION_METHOD"]

    def run(self) -> list[Any]:
        return self._in_mode(lambda: pickle.loads(pickle.dumps(self.data, protocol=5)).chunk(READERS))

    def read(self, parts: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for part in parts:
            fields = part.batch
            for ids, mask, values in zip(fields["input_ids"], fields["attention_mask"], fields["rollout_log_probs"], strict=True):
                tokens = ids[mask.bool()].numpy().astype(np.int32)
                prompt = int(mask[:LONGEST_PROMPT].sum())
                logprobs = np.concatenate([np.zeros(prompt, np.float32), values[: len(tokens) - prompt].numpy()])
                found.append((tokens, logprobs))
        return found

    def size(self) -> int:
        return len(self._in_mode(lambda: pickle.dumps(self.data, protocol=5)))


class Protobuf(Contender):
    name = "protobuf"
    about = "repeated Rollout with packed int32 and float fields; SerializeToString, FromString, 8 slices"

    def __init__(self, batch: Samples) -> None:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

        kinds, labels = descriptor_pb2.FieldDescriptorProto, descriptor_pb2.FieldDescriptorProto
        file = descriptor_pb2.FileDescriptorProto(name="rollouts.proto", package="bench", syntax="proto3")
        rollout = file.message_type.add(name="Rollout")
        for place, (name, kind, label) in enumerate(
            [("id", kinds.TYPE_STRING, labels.LABEL_OPTIONAL), ("prompt_length", kinds.TYPE_INT32, labels.LABEL_OPTIONAL),
             ("tokens", kinds.TYPE_INT32, labels.LABEL_REPEATED), ("logprobs", kinds.TYPE_FLOAT, labels.LABEL_REPEATED)]
        ):  # fmt: skip
            rollout.field.add(name=name, number=place + 1, type=kind, label=label)
        many = file.message_type.add(name="Batch")
        many.field.add(name="rollouts", number=1, type=kinds.TYPE_MESSAGE, type_name=".bench.Rollout", label=labels.LABEL_REPEATED)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self.kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Batch"))
        prompts = batch.prompt_lengths.tolist()
        self.arrays = [(batch.ids[n // SIBLINGS], prompts[n], t, p) for n, (t, p) in enumerate(rollouts(batch))]

    def _built(self) -> Any:
        message = self.kind()
        for name, prompt, tokens, logprobs in self.arrays:
            one = message.rollouts.add(id=name, prompt_length=prompt)
            one.tokens.extend(tokens.tolist())
            one.logprobs.extend(logprobs.tolist())
        return message

    def run(self) -> list[Any]:
        received = self.kind.FromString(self._built().SerializeToString())
        each = len(received.rollouts) // READERS
        return [received.rollouts[start : start + each] for start in range(0, len(received.rollouts), each)]

    def read(self, parts: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.array(one.tokens, np.int32), np.array(one.logprobs, np.float32)) for part in parts for one in part]

    def size(self) -> int:
        return len(self._built().SerializeToString())


def shares(prompts: int) -> list[range]:
    """Which prompts each reader gets."""
    return [range(prompts * number // READERS, prompts * (number + 1) // READERS) for number in range(READERS)]


def rollouts(batch: Samples) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, logprobs) of each sample."""
    inner = batch.cu_seqlens[1:-1]
    return list(zip(np.split(batch.tokens, inner), np.split(batch.logprobs, inner), strict=True))


def contenders(batch: Samples) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be had here, and why the others can't."""
    found: list[Contender] = [Ours(batch), Copied(batch)]
    missing: dict[str, str] = {}
    makers: dict[str, Callable[[], Contender]] = {
        "pickle 5": lambda: Pickled(batch, lists=True),
        "pickle 5, arrays": lambda: Pickled(batch, lists=False),
        "pickle 5, our layout": lambda: PickledFlat(batch),
        "protobuf": lambda: Protobuf(batch),
        "verl DataProto, numpy": lambda: Verl(batch, "numpy"),
        "verl DataProto": lambda: Verl(batch, ""),
    }
    for name, make in makers.items():
        try:
            found.append(make())
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def exact(batch: Samples, contender: Contender) -> None:
    """What eight readers see is what was sampled, bit by bit."""
    for (tokens, logprobs), (sent, said) in zip(contender.read(contender.run()), rollouts(batch), strict=True):
        if not np.array_equal(tokens, sent) or not np.array_equal(logprobs, said):
            sys.exit(f"{contender.name} does not give back what was put in")


def memcpy(batch: Samples) -> float:
    """Milliseconds to copy the arrays once into memory that is already mapped: the bound of whatever copies."""
    source = np.concatenate([batch.tokens, batch.logprobs.view(np.int32)])
    target = np.empty_like(source)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Exactness, timing, table, JSON."""
    options = arguments(__doc__ or "")
    batch = workload(PROMPTS // 4 if options.quick else PROMPTS)
    found, missing = contenders(batch)
    for contender in found:
        exact(batch, contender)
    timings: dict[str, Timing] = alternate({contender.name: contender.run for contender in found}, options.rounds)
    arrays = sum(buffer.nbytes for buffer in encode(batch).buffers)
    wire = {contender.name: contender.size() for contender in found}
    ours = timings["rolecall"].median
    targets = {
        f"at least {times}x {name}": (timings[name].median / ours, timings[name].median / ours >= times)
        for name, times in {"verl DataProto": 500, "verl DataProto, numpy": 150, "pickle 5": 20}.items()
        if name in timings
    }
    share = wire["rolecall"] / arrays
    targets["wire at most 1.02x the arrays"] = (share, share <= 1.02)
    finish(
        bench="codec",
        workload=f"{len(batch.siblings)} rollouts, {len(batch.tokens)} tokens: encode, decode, split to {READERS}",
        timings=timings,
        ours="rolecall",
        targets=targets,
        target="500x verl DataProto, 150x its numpy mode, 20x pickle; wire at most 1.02x the arrays",
        limit=memcpy(batch),
        missing=missing,
        details={"array_bytes": arrays, "wire_bytes": wire, "about": {contender.name: contender.about for contender in found}},
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()
