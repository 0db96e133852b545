"""What a model is, in numbers: sizes and the few choices by which families of decoders differ. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched; names as in transformers' `rope_parameters`.

    Kinds: "default", "linear", "dynamic" (NTK), "yarn" (arXiv:2309.00071), "longrope" (arXiv:2402.13753), "llama3".
    A field that the kind does not use is left at its default.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0  # context before stretching
    max_positions: int = 0  # of the config; only "dynamic" asks
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the longest sequence of a forward pass."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sparse MLPs: a router sends each token to `active` of `number` experts.

    Kinds: "softmax_top" (Qwen3-MoE): the best probabilities of a softmax over all experts, made to sum to 1 if `renormalise`;
    "top_softmax" (GPT-OSS): a softmax over the best logits, biases everywhere, clamped SwiGLU.
    """

    number: int
    active: int
    intermediate: int
    kind: str = "softmax_top"
    renormalise: bool = False
    layers: tuple[bool, ...]  # which layers are sparse; the others have one dense MLP
    limit: float = 7.0  # "top_softmax": gates are clamped from above, up-projections from both sides
    alpha: float = 1.702  # "top_softmax": gate x sigmoid(alpha x gate)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and choices of a model, one name each whatever its family calls them."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int  # true size; the head's matrix may have more rows
    max_positions: int
    tied: bool  # the head is the embedding matrix
    stops: tuple[int, ...]  # token ids that end a completion, as the model's own files say
    windows: tuple[int, ...]  # positions that each layer sees, its own included; 0 where it sees all
    family: str = ""  # "" where the model runs as its Hugging Face class; what follows is then not filled in
    intermediate: int = 0
    activation: str = "silu"
    eps: float = 1e-6
    ropes: tuple[Rope, ...] = ()
    rope_of: tuple[int, ...] = ()  # which of `ropes` each layer uses
    scale: float = 0.0  # products of queries and keys are multiplied by it
    embed_scale: float = 1.0  # embeddings are multiplied by it
    attention_softcap: float = 0.0
    logit_scale: float = 1.0  # products of hidden states and head are multiplied by it, before the cap
    logit_softcap: float = 0.0  # c: logits x become c tanh(x / c); 0 for none
    gain_offset: float = 0.0  # norms multiply by weight + this (Gemma: 1)
    wide_gain: bool = False  # norms multiply in float32 and round afterwards (Gemma, GPT-OSS), not the other way round (Llama)
    sandwich: bool = False  # norms after attention and MLP too (Gemma)
    qk_norm: bool = False
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False
    sinks: bool = False
    experts: Experts | None = None

    @property
    def window(self) -> int:
        """The narrowest sliding window of any layer; 0 where every layer sees all."""
        return min((window for window in self.windows if window), default=0)
