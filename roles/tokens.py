"""The tokenizer of a model: loading it, and the hash by which roles know that they mean the same tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rolecall.protocols.errors import ModelError
from rolecall.roles.models.folder import HUB_NAME, check_tokenizer, is_gguf, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model folder or GGUF file (or of a hub name).

    Raises:
        ModelError: there is none, or it can't be read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_tokenizer(folder)
    elif not is_gguf(path) and not HUB_NAME.fullmatch(path):
        raise ModelError(f"The model folder {path} is missing.", remedy="give an existing folder, or a hub name of the form owner/name")
    from transformers import AutoTokenizer

    try:
        name, options = source_of(path)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The tokenizer of {path} can't be loaded: {reason}",
            remedy="check that tokenizer.json is whole, or that the name exists and the hub can be reached",
        ) from error
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a tokenizer.

    Raises:
        ModelError: it has none, as base models often do.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so there is no telling where a prompt ends.",
            remedy="use an instruction-tuned model, or put the template into the model folder as chat_template.jinja",
        )
    return str(template)


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash (32 hexadecimal digits) of vocabulary, merges, added tokens and template: equal means that texts get equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # these two are settings of the last call, not of the vocabulary
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        added = sorted((number, token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items())
        rules = {"vocab": sorted(tokenizer.get_vocab().items()), "added": added}
    whole = json.dumps([rules, getattr(tokenizer, "chat_template", None)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]
