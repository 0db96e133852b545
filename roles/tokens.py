"""The tokenizer of a model: loading it, and the hash by which roles know that they mean the same tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rolecall.protocols.errors import DataError, ModelError
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
    """Hash (32 hexadecimal digits) of vocabulary, rules, added and special tokens and template.

    Equal means that texts and conversations get equal ids, and that the same tokens begin, end and fill a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # these two are settings of the last call, not of the vocabulary
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        added = sorted((number, token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items())
        pieces = getattr(tokenizer, "sp_model", None)  # SentencePiece: the model says how texts are cut, not the vocabulary alone
        model = hashlib.sha256(pieces.serialized_model_proto()).hexdigest() if pieces is not None else ""
        rules = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items()), "added": added, "model": model}
    facts = [rules, getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map]
    whole = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def check_identity(given: str, own: str, what: str, model: str) -> None:
    """Refuse tokens of another tokenizer than a role's own.

    Args:
        given: identity that came with the tokens; "" where it isn't known, which is let pass.
        own: the role's.
        what: was made: "prompts", "rows".
        model: of the role.

    Raises:
        DataError: they differ.
    """
    if given and given != own:
        raise DataError(
            f"The {what} were made with another tokenizer.",
            ask=f"tokenizer {given}",
            have=f"tokenizer {own} of {model}",
            remedy="give the roles that make tokens and those that read them the same model",
        )
