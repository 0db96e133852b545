"""Whether a model folder has what it must have, told without importing torch."""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path

from rolecall.protocols.errors import ModelError
from rolecall.roles.models.families import FAMILIES
from rolecall.roles.models.lora import ADAPTER_CONFIG

LOST = "no attention kernels for packed rows, no padding of the vocabulary, no count of its operations"  # as a Hugging Face class
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # nothing that is pickled
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")

log = logging.getLogger("rolecall.models")


def source_of(path: str) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` is called with for a folder, a GGUF file or a hub name: the name, and options."""
    local = Path(path).expanduser()
    if is_gguf(path):
        return str(local.parent), {"gguf_file": local.name}
    return (str(local) if local.is_dir() else path), {}


def is_gguf(path: str) -> bool:
    """Whether a model is one GGUF file."""
    return path.endswith(".gguf") and Path(path).expanduser().is_file()


def check_model(path: str, *, tokenizer: bool = True, chat_template: bool = False) -> None:
    """Raise ModelError if `path` is a folder that lacks a config, weights, tokenizer or (if asked) a chat template, or is
    neither folder nor hub name.

    It costs next to nothing: controllers call it before anything starts. What only loading can tell (a hub name that does
    not exist, a torn file) is told by the members' set-up.
    """
    folder = Path(path).expanduser()
    if is_gguf(path):
        return
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(
                f"The model {path} is a file.", ask="a folder", remedy="give the folder that holds config.json, or a .gguf file"
            )
        if not HUB_NAME.fullmatch(path):
            raise ModelError(
                f"The model folder {path} is missing.",
                ask=f"model {path!r}",
                have=_siblings(folder),
                remedy="give an existing Hugging Face folder, or a hub name of the form owner/name",
            )
        return
    have = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "an empty folder"
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"The folder {path} holds adapters, not a model.",
            have=have,
            remedy="write the whole model with policy.export(folder); or go on training with Lora(start=folder)",
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"The model folder {path} has no config.json.", have=have, remedy="give the folder that save_pretrained wrote")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"The model folder {path} has no weights.",
            ask=" or ".join(WEIGHTS),
            have=have,
            remedy="finish the download, or save the model into it with save_pretrained (pickled .bin files are not read)",
        )
    tell_fallback(path)
    if tokenizer or chat_template:
        check_tokenizer(folder)
    if chat_template and not _has_template(folder):
        raise ModelError(
            f"The tokenizer of {path} has no chat template, so there is no telling where a prompt ends.",
            remedy="use an instruction-tuned model, or put the template into the model folder as chat_template.jinja",
        )


@cache
def tell_fallback(path: str) -> None:
    """Log, once in a process, that the model in a folder is of a family without a definition here, and what that costs."""
    try:
        kind = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # loading says what is wrong
    if kind not in FAMILIES:
        log.warning("%s is a %r model, which has no definition here: it runs as its Hugging Face class. So there is %s.", path, kind, LOST)


def _has_template(folder: Path) -> bool:
    """Whether one of the places where transformers keeps chat templates holds something."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError if a folder holds no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZERS) and not _needs_no_vocabulary(folder):
        have = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "an empty folder"
        raise ModelError(
            f"The model folder {folder} has no tokenizer.",
            ask=TOKENIZERS[0],
            have=have,
            remedy="copy tokenizer.json and tokenizer_config.json of the same model into it",
        )


def _needs_no_vocabulary(folder: Path) -> bool:
    """Whether the tokenizer works on bytes or characters, as ByT5's: its class reads no file."""
    try:
        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return False
    if not isinstance(name, str):
        return False
    import transformers

    return not getattr(getattr(transformers, name, None), "vocab_files_names", {"": ""})


def _siblings(folder: Path) -> str:
    """What stands where the folder was looked for."""
    parent = folder.parent
    if not parent.is_dir():
        return f"no folder {parent} either"
    return f"in {parent}: " + (", ".join(sorted(entry.name for entry in parent.iterdir())[:10]) or "nothing")
