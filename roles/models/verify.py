"""The body of `rolecall verify`: our model against transformers, and where they part.

Transformers in float32, each sequence alone, is taken for the truth. Our logits in float32 must be as near to it as sums in
another order are; in a narrower dtype, about as near as transformers' own in that dtype.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rolecall.protocols.errors import ModelError, RolecallError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.folder import source_of
from rolecall.roles.models.loading import DTYPES, check_device, load_causal
from rolecall.roles.models.verify_traces import Trace, by_transformers, cached, packed, single
from torch import Tensor

AGREES, PARTS, MISTAKEN = 0, 1, 2
EXACT = 3e-4  # float32: largest difference, as a share of the spread (standard deviation) of logits or states
WIDER = 1.5  # narrower dtypes: our mean error over that of transformers in the same dtype
FAST = 64  # rows of a head are fastest in multiples of this
WAYS = {"single": single, "packed": packed, "cached": cached}
TEXTS = (
    "The quick brown fox jumps over the lazy dog, then thinks about it for 37 seconds.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "Was ist 12 + 7? Die Antwort lautet 19. 東京は日本の首都です。 Привет, мир!",
    "What is 12 + 7? Give only the final answer.",
    "What is 12 + 7? Give the answer and show how you found it.",
)


@dataclass(frozen=True)
class Finding:
    """How one way of computing compares."""

    dtype: str
    inputs: str
    way: str
    largest: float  # difference of a logit
    mean: float
    limit: float
    agree: float  # share of tokens with the same most probable next token
    sequence: int
    place: int  # of the worst token
    logit: int  # token id at which it is worst
    parts: str  # where they part; "" where they don't

    @property
    def sound(self) -> bool:
        """Whether this is within the tolerance."""
        return (self.largest if self.dtype in ("float32", "float64") else self.mean) <= self.limit


def verify(path: str, *, dtypes: Sequence[str] = ("float32", "bfloat16"), device: str = "cpu", length: int = 0) -> int:
    """Print how our model compares with transformers.

    Args:
        path: Hugging Face folder or hub name.
        dtypes: to compare in.
        device: to compute on.
        length: tokens of the longest random sequence; 0 chooses one longer than the sliding windows, if these are short.

    Returns:
        Exit status: 0 they agree, 1 they part, 2 the model can't be used.
    """
    try:
        for dtype in dtypes:
            check_device(dtype, device)
        return _verify(path, dtypes, device, length)
    except RolecallError as error:
        print(f"rolecall verify: {error}", file=sys.stderr)
        return MISTAKEN


def _verify(path: str, dtypes: Sequence[str], device: str, length: int) -> int:
    model = load_causal(path, dtype="float32", device=device)
    print(_about(path, model))
    inputs = {"random": _random(model, length)} | _real(path, model)
    everything = [tokens for sequences in inputs.values() for tokens in sequences]
    traces: dict[str, dict[str, list[Trace] | str]] = {"float32": _ways(model, inputs)} if "float32" in dtypes else {}
    del model
    truth = _transformers(path, "float32", device, everything)
    findings = []
    for dtype in dtypes:
        noise = None if dtype in ("float32", "float64") else _transformers(path, dtype, device, everything)
        found = traces.pop(dtype, None) or _ways(load_causal(path, dtype=dtype, device=device), inputs)
        for name, own in found.items():
            findings += _line(dtype, name, own, inputs, truth, noise)
    worst = [finding for finding in findings if not finding.sound]
    for finding in worst:
        print(_explain(path, finding, inputs))
    print("They part." if worst else "They agree.")
    return PARTS if worst else AGREES


def _ways(model: CausalModel, inputs: dict[str, list[Tensor]]) -> dict[str, list[Trace] | str]:
    """ "inputs/way" → traces, or why it can't be had."""
    found: dict[str, list[Trace] | str] = {}
    for name, sequences in inputs.items():
        for way, run in WAYS.items():
            key = f"{name}/{way}"
            if way == "cached" and not model.caches:
                found[key] = "not with this class"
            else:
                found[key] = _fitting(model, run, sequences, way)
    return found


def _fitting(model: CausalModel, run: Callable[..., list[Trace]], sequences: list[Tensor], way: str) -> list[Trace] | str:
    try:
        return run(model, sequences)
    except ModelError as error:
        if not model.longest:
            raise
        return f"{way} rows: {error.message}"


def _line(
    dtype: str, name: str, own: list[Trace] | str, inputs: dict[str, list[Tensor]], truth: list[Trace], noise: list[Trace] | None
) -> list[Finding]:
    """Compare one way, and print a line."""
    given, way = name.split("/")
    head = f"{dtype:9} {given:7} {way:7}"
    if isinstance(own, str):
        print(f"{head} {own}")
        return []
    first = sum(len(sequences) for other, sequences in inputs.items() if list(inputs).index(other) < list(inputs).index(given))
    part = slice(first, first + len(inputs[given]))
    finding = compare(dtype, given, way, own, truth[part], None if noise is None else noise[part])
    print(
        f"{head} largest {finding.largest:.1e}  mean {finding.mean:.1e}  limit {finding.limit:.1e}  "
        f"same choice {finding.agree:6.1%}  worst: sequence {finding.sequence} token {finding.place}  "
        f"{'ok' if finding.sound else 'PARTS at ' + finding.parts}"
    )
    return [finding]


def compare(dtype: str, inputs: str, way: str, ours: Sequence[Trace], truth: Sequence[Trace], noise: Sequence[Trace] | None) -> Finding:
    """One way of computing against the truth.

    Args:
        ours, truth: traces of the same sequences.
        noise: traces by transformers in `dtype`, where that is narrower than float32.
    """
    off = [(own.logits - true.logits).abs() for own, true in zip(ours, truth, strict=True)]
    largest = [float(each.max()) for each in off]
    if any(not torch.isfinite(own.logits).all() for own in ours):
        largest = [float("inf") if not torch.isfinite(own.logits).all() else size for own, size in zip(ours, largest, strict=True)]
    sequence = largest.index(max(largest))
    place, logit = divmod(int(off[sequence].nan_to_num(torch.inf).argmax()), off[sequence].shape[1])
    spread = float(torch.cat([true.logits for true in truth]).std())
    limit = EXACT * max(spread, 1e-6)
    if noise is not None:
        limit += WIDER * _mean([(own.logits - true.logits).abs() for own, true in zip(noise, truth, strict=True)])
    same = [own.logits.argmax(-1) == true.logits.argmax(-1) for own, true in zip(ours, truth, strict=True)]
    finding = Finding(
        dtype, inputs, way, max(largest), _mean(off), limit, float(torch.cat(same).float().mean()), sequence, place, logit, ""
    )
    if finding.sound:
        return finding
    return Finding(**{**vars(finding), "parts": parting(ours[sequence], truth[sequence], None if noise is None else noise[sequence])})


def parting(ours: Trace, truth: Trace, noise: Trace | None) -> str:
    """The first part of the model whose output is off, of those that both have; "the head" where none is."""
    for name, true in truth.states.items():
        if name not in ours.states or ours.states[name].shape != true.shape:
            continue
        off = (ours.states[name] - true).abs()
        limit = EXACT * float(true.std())
        if noise is None and not float(off.max()) <= limit:
            return name
        if noise is not None and not float(off.mean()) <= limit + 2 * WIDER * float((noise.states[name] - true).abs().mean()):
            return name
    return "the final norm or the head"


def _mean(off: Sequence[Tensor]) -> float:
    return float(torch.cat([each.flatten() for each in off]).mean())


def _transformers(path: str, dtype: str, device: str, sequences: list[Tensor]) -> list[Trace]:
    """Traces of the model as its transformers class, which is let go of afterwards."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    name, options = source_of(path)
    net: Any = AutoModelForCausalLM.from_pretrained(name, **options, dtype=DTYPES[dtype], experts_implementation="eager").eval().to(device)
    traces = by_transformers(net, sequences)
    del net
    gc.collect()
    return traces


def _random(model: CausalModel, length: int) -> list[Tensor]:
    """Sequences of several lengths; the last two begin alike."""
    spec = model.spec
    wished = length or (max(spec.windows) + 24 if 0 < max(spec.windows, default=0) <= 1024 else 96)
    longest = max(4, min(wished, _limit(model), model.longest // 4 or wished))
    source = torch.Generator().manual_seed(0)
    sizes = sorted({1, 2, max(2, longest // 7), longest})
    found = [torch.randint(0, spec.vocab, (size,), generator=source) for size in sizes]
    tail = torch.randint(0, spec.vocab, (longest - longest // 2,), generator=source)
    return [*found, torch.cat((found[-1][: longest // 2], tail))]


def _limit(model: CausalModel) -> int:
    """Tokens up to which a sequence does not change the positions of others in its pass."""
    spec = model.spec
    return min(
        [
            spec.max_positions,
            *(rope.original_positions if rope.kind == "longrope" else rope.max_positions for rope in spec.ropes if rope.by_length),
        ]
    )


def _real(path: str, model: CausalModel) -> dict[str, list[Tensor]]:
    """Texts as the model's own tokenizer cuts them; nothing where it has none."""
    from rolecall.roles.tokens import load_tokenizer

    try:
        tokenizer: Any = load_tokenizer(path)
    except ModelError as error:
        print(f"no real inputs: {error.message}")
        return {}
    limit = min(_limit(model), model.longest // 8 or 1 << 30)
    found = [torch.tensor(tokenizer(text)["input_ids"][:limit]) for text in TEXTS]
    model.check_tokens(min(int(tokens.min()) for tokens in found), max(int(tokens.max()) for tokens in found))
    return {"real": found}


def _about(path: str, model: CausalModel) -> str:
    """What the model is, and whether its head has a fast size."""
    spec = model.spec
    lines = [f"{path}: {spec.family or type(model.net).__name__}, {spec.layers} layers, hidden {spec.hidden}, vocabulary {spec.vocab}"]
    lines += [f"note: {note}" for note in model.notes]
    if spec.vocab % FAST:
        rows = len(model.head)
        lines.append(
            f"note: a head of {spec.vocab} rows is slow, {FAST} does not divide it: "
            + (f"it is padded to {rows} in memory" if rows % FAST == 0 else "it stays so in its Hugging Face class")
        )
    return "\n".join(lines)


def _explain(path: str, finding: Finding, inputs: dict[str, list[Tensor]]) -> str:
    """The worst token of a comparison that failed, in words."""
    from rolecall.roles.tokens import load_tokenizer

    tokens = inputs[finding.inputs][finding.sequence]

    def text(token: int) -> str:
        try:
            return repr(load_tokenizer(path).decode([token]))
        except ModelError:
            return "?"

    before, worst = int(tokens[finding.place]), finding.logit
    return (
        f"{finding.dtype} {finding.inputs} {finding.way}: after token {finding.place} of sequence {finding.sequence} "
        f"(id {before}, {text(before)}), the logit of id {worst} ({text(worst)}) is off by {finding.largest:.2e}; "
        f"the first output that differs is that of {finding.parts}."
    )
