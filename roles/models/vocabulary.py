"""New tokens in a model and its tokenizer.

V vocabulary, Vp rows with padding, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def extend_model(model: str, folder: str, tokens: Sequence[str], *, dtype: str = "float32", special: bool = True) -> tuple[int, ...]:
    """Write a model with new tokens into a new folder, for all roles to start from.

    Args:
        model: Hugging Face folder or hub name.
        folder: to write.
        tokens: texts; each becomes one token.
        dtype: of what is written.
        special: whether decoding with `skip_special_tokens` leaves them out, as marks of turns and tools should be.

    Returns:
        Their ids.

    Raises:
        ModelError: a text is a token already, empty or given twice; the model can't be loaded; the folder exists.
    """
    from rolecall.roles.models import load
    from rolecall.roles.tokens import load_tokenizer

    net, tokenizer = load(model, dtype=dtype), load_tokenizer(model)
    ids = extend(net, tokenizer, tokens, special=special)
    net.save(folder, tokenizer)
    return ids


@torch.no_grad()
def extend(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, special: bool = True, pad_vocab: int = 64
) -> tuple[int, ...]:
    """Add tokens to a model and its tokenizer, both in place; must come before anything keeps the model's parameters.

    A new token's embedding is the mean of all that there were, and so is its row of the head: its logit is then the mean logit,
    where a random row could be the likeliest token of all (Hewitt 2021, "Initializing new word embeddings").

    Args:
        pad_vocab: rows of embedding and head of our own decoder are a multiple of it.

    Returns:
        Their ids.

    Raises:
        ModelError: as `extend_model`. Nothing has changed then.
    """
    known = tokenizer.get_vocab()
    wrong = [text for text in tokens if not text or text in known] or [text for text in tokens if tokens.count(text) > 1]
    if wrong or not tokens:
        raise ModelError(
            "These can't become new tokens.",
            ask=", ".join(repr(text) for text in dict.fromkeys(wrong)) or "none",
            remedy="give texts that are no tokens yet, each once",
        )
    from transformers import AddedToken

    before = max(known.values()) + 1
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in tokens], special_tokens=special)
    vocabulary = tokenizer.get_vocab()
    ids = tuple(vocabulary[text] for text in tokens)
    vocab = max(model.spec.vocab, max(ids) + 1)
    filled = min(before, model.spec.vocab)
    if isinstance(model, NativeModel):
        _grow_native(model, vocab, pad_vocab)
    elif vocab > model.spec.vocab:
        model.net.resize_token_embeddings(vocab, mean_resizing=False)  # type: ignore[operator]  # a transformers class
        model.spec = dataclasses.replace(model.spec, vocab=vocab)
    for matrix in _matrices(model):
        fresh = [*range(filled, before), *ids] if before > filled else list(ids)
        matrix[fresh] = matrix[:filled].to(torch.promote_types(matrix.dtype, torch.float32)).mean(0).to(matrix.dtype)
    return ids


def _grow_native(model: NativeModel, vocab: int, pad_vocab: int) -> None:
    """More rows for embedding and head of our decoder, all 0."""
    net, old = model.net, model.spec.vocab
    rows = -(-vocab // pad_vocab) * pad_vocab

    def grown(matrix: Tensor) -> nn.Parameter:
        wide = matrix.new_zeros(rows, matrix.shape[1])
        wide[:old] = matrix[:old]
        return nn.Parameter(wide)

    net.embed.weight, net.embed.num_embeddings = grown(net.embed.weight), rows
    net.head.weight, net.head.out_features = net.embed.weight if model.spec.tied else grown(net.head.weight), rows
    model.spec = net.spec = dataclasses.replace(model.spec, vocab=vocab)
    model.config.vocab_size = vocab


def _matrices(model: CausalModel) -> list[Tensor]:
    """Embedding and head, once if they are tied."""
    net: Any = model.net
    embedding: Tensor = net.embed.weight if isinstance(model, NativeModel) else net.get_input_embeddings().weight
    return [embedding] if model.spec.tied else [embedding, model.head]
