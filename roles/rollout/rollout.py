"""The rollout role: samples completions of prompts with the weights it was last given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rolecall.protocols.errors import DataError, ModelError, UserError
from rolecall.protocols.messages import Prompts, Samples, Weights
from rolecall.roles.base import Member, Role
from rolecall.roles.rollout.sampling import Sampling, sample_seed

if TYPE_CHECKING:
    from rolecall.roles.rollout.engine import Completion, Request

ENGINES = ("native",)


class Rollout(Role):
    """Generates with the model's own code, a key/value cache and continuous batching.

    Args:
        model: Hugging Face folder or hub name.
        engine: who generates; "native" is built in.
        dtype: of weights and cache: "float32", "bfloat16", "float16". Logits and logprobs are float32 in any case.
        slots: most sequences generated at once; the cache takes memory for so many. 0 for 64 on a CPU and 256 on a GPU, there
            fewer where their cache would take more than a quarter of the free memory.
        max_tokens: most tokens of a completion; less where the model's context ends before.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p, top_k: as `Sampling` says; 1 and 0 keep all tokens.
        stop: texts that end a completion. It keeps the token that completes one.

    Raises:
        UserError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        model: str,
        *,
        engine: str = "native",
        dtype: str = "float32",
        slots: int = 0,
        max_tokens: int = 24,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
    ) -> None:
        if engine not in ENGINES:
            raise UserError(f"There is no engine {engine!r}.", have=", ".join(ENGINES), remedy="choose one of these")
        self.model, self.engine, self.dtype = model, engine, dtype
        self.slots = _at_least_one("slots", slots) if slots != 0 else 0
        self.max_tokens = _at_least_one("max_tokens", max_tokens)
        self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self.stop = _texts(stop)

    def setup(self, member: Member) -> None:
        """Load the model and its tokenizer.

        Raises:
            ModelError: they can't be used; says what to do.
        """
        super().setup(member)
        from rolecall.roles.models import load
        from rolecall.roles.rollout.engine import Engine
        from rolecall.roles.tokens import identity, load_tokenizer

        self._tokenizer: Any = load_tokenizer(self.model)
        self._identity = identity(self._tokenizer)
        self._model = load(self.model, dtype=self.dtype, device=member.device)
        if not self._model.caches:
            raise ModelError(
                f"The native engine can't sample from {self.model}.",
                have="; ".join(self._model.notes),
                remedy="use a model of attention layers alone",
            )
        ends = {*self._model.spec.stops, *([] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id])}
        self._engine = Engine(self._model, slots=self.slots, ends=frozenset(ends))
        positions = self._model.spec.max_positions
        self.context = min(positions, self._model.longest or positions)

    def generate(
        self,
        prompts: Prompts,
        *,
        per_prompt: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Samples:
        """`per_prompt` completions of each prompt, siblings together; what is not given is as in the constructor.

        Each token's logprob is that of the whole vocabulary's distribution at the temperature (at 1 when greedy), before
        top-k and top-p: what the trainer recomputes. An end token is kept as the last token of its completion, a stop text
        with the token that completes it. A completion that ends by neither has finish "length".

        Tokens depend on the run's seed, the prompt's key and id, the sibling's number and the weights, but not on the
        member, the batch or the slot (up to the rounding of logits, which may change with what is computed together).

        Raises:
            DataError: a prompt is empty, has unknown tokens or leaves no room in the context; nothing has run then.
            UserError: a setting is out of its range.
        """
        own = self.sampling
        sampling = Sampling(
            temperature=own.temperature if temperature is None else temperature,
            top_k=own.top_k if top_k is None else top_k,
            top_p=own.top_p if top_p is None else top_p,
        )
        limit = self.max_tokens if max_tokens is None else _at_least_one("max_tokens", max_tokens)
        requests = self._requests(prompts, _at_least_one("per_prompt", per_prompt), limit)
        stopped = self._stopper(self.stop if stop is None else _texts(stop))
        start = time.perf_counter()
        answers = self._engine.run(requests, sampling, stopped)
        samples = self._samples(prompts, answers, sampling.temperature or 1.0)
        self._measure(samples, time.perf_counter() - start)
        return samples

    def load(self, weights: Weights | Sequence[Weights]) -> dict[str, int | str]:
        """Take over one whole version; returns its `version` and `digest`, so that the sender can compare.

        Raises:
            WeightsError: a shard is missing, corrupt or of another model. The version so far goes on serving.
        """
        from rolecall.roles.weights import assemble, version_digest

        parts = [weights] if isinstance(weights, Weights) else list(weights)
        self._model.load_tensors(assemble(parts, self._model.named_tensors()))
        self.version = parts[0].version
        return {"version": self.version, "digest": version_digest(parts)}

    def _requests(self, prompts: Prompts, per_prompt: int, limit: int) -> list[Request]:
        """What the engine is to do, after all prompts were looked at."""
        from rolecall.roles.rollout.engine import Request
        from rolecall.roles.tokens import check_identity

        check_identity(prompts.tokenizer, self._identity, "prompts", self.model)
        vocabulary, requests = self._model.spec.vocab, []
        for number, (key, name) in enumerate(zip(prompts.keys.tolist(), prompts.ids, strict=True)):
            tokens = prompts.tokens[prompts.cu_seqlens[number] : prompts.cu_seqlens[number + 1]]
            length = len(tokens)
            if length == 0:
                raise DataError(f"Prompt {name!r} is empty.", remedy="leave it out of the dataset")
            if length >= self.context:
                raise DataError(
                    f"Prompt {name!r} leaves no room for a completion.",
                    ask=f"a prompt of {length} tokens",
                    have=f"a context of {self.context} tokens in {self.model}",
                    remedy=f"leave out prompts of more than {self.context - limit if limit < self.context else self.context - 1} tokens, "
                    "or use a model with a longer context",
                )
            if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
                raise DataError(
                    f"Prompt {name!r} has tokens that {self.model} does not know.",
                    ask=f"tokens {int(tokens.min())} to {int(tokens.max())}",
                    have=f"0 to {vocabulary - 1}",
                    remedy="tokenise with the tokenizer of this model",
                )
            seeds = tuple(sample_seed(self.member.seed, key, name, sibling) for sibling in range(per_prompt))
            requests.append(Request(tokens=tokens, seeds=seeds, limit=min(limit, self.context - length)))
        return requests

    def _stopper(self, stop: tuple[str, ...]) -> Any:
        """Says of a completion's tokens whether its end completes a stop text; None where there is none."""
        if not stop:
            return None
        # Each token stands for a byte at least, so this many hold any stop text; some more, as the first may be cut characters.
        window = max(len(text.encode()) for text in stop) + 8

        def stopped(tokens: list[int]) -> bool:
            text = self._tokenizer.decode(tokens[-window:], clean_up_tokenization_spaces=False)
            return any(one in text for one in stop)

        return stopped

    def _samples(self, prompts: Prompts, answers: list[list[Completion]], temperature: float) -> Samples:
        """The engine's answers as one message."""
        flat = [one for group in answers for one in group]
        counts = np.array([len(group) for group in answers], dtype=np.int32)
        owners = np.repeat(np.arange(len(counts)), counts)
        before = np.diff(prompts.cu_seqlens)[owners]
        lengths = before + np.array([len(one.tokens) for one in flat], dtype=np.int64)
        cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
        tokens = np.empty(int(cu_seqlens[-1]), dtype=np.int32)
        logprobs = np.zeros(len(tokens), dtype=np.float32)
        for number, one in enumerate(flat):
            start, owner = int(cu_seqlens[number]), int(owners[number])
            middle, end = start + int(before[number]), int(cu_seqlens[number + 1])
            tokens[start:middle] = prompts.tokens[prompts.cu_seqlens[owner] : prompts.cu_seqlens[owner + 1]]
            tokens[middle:end] = one.tokens
            logprobs[middle:end] = one.logprobs
        texts = [self._tokenizer.decode(one.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) for one in flat]
        return Samples(
            keys=prompts.keys,
            ids=prompts.ids,
            texts=prompts.texts,
            columns=prompts.columns,
            counts=counts,
            tokens=tokens,
            logprobs=logprobs,
            cu_seqlens=cu_seqlens,
            prompt_lengths=before.astype(np.int32),
            siblings=np.concatenate([np.arange(count) for count in [*counts.tolist(), 0]]).astype(np.int32),
            finish=np.array([one.finish for one in flat], dtype=np.uint8),
            completions=tuple(texts),
            span_starts=np.zeros(min(1, len(tokens)), dtype=np.int64),
            span_versions=np.full(min(1, len(tokens)), self.version, dtype=np.int64),
            temperature=temperature,
        )

    def _measure(self, samples: Samples, seconds: float) -> None:
        """Count what this call made; rates are weighted by their time, so that they add up over calls."""
        completions = np.diff(samples.cu_seqlens) - samples.prompt_lengths
        made = float(completions.sum())
        self.meter.add("tokens", made)
        self.meter.add("prompt_tokens", float(samples.prompt_lengths.sum()))
        self.meter.add("tokens_per_s", made / seconds, weight=seconds)
        if len(completions):
            self.meter.add("completion_length", made / len(completions), weight=len(completions))
            cut = float((samples.finish == Samples.FINISH.index("length")).mean())
            self.meter.add("finished_by_length", cut, weight=len(completions))


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name} is out of range.", ask=f"{name}={value!r}", remedy="give a whole number, at least 1")
    return int(value)


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    """Stop texts as a tuple; a lone text counts as one."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError("A stop text is empty or no text.", ask=f"stop={texts!r}", remedy="give non-empty texts, or none")
    return texts
