"""Language models behind one seam. Light to import: torch and transformers come with `load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rolecall.roles.models.folder import check_model

if TYPE_CHECKING:
    from rolecall.roles.models.causal import CausalModel

__all__ = ["check_model", "load"]


def load(path: str, *, dtype: str = "float32", device: str = "cpu", native: bool | None = None, pad_vocab: int = 64) -> CausalModel:
    """Load the causal language model in a Hugging Face folder (or of that name on the hub).

    Families that our decoder knows run on it; any other model runs as its Hugging Face class, and `notes` of what is returned
    (also logged) say what can't be had then.

    Args:
        path: folder with config.json and weights, or a hub name such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        dtype: of the parameters: "float32", "bfloat16", "float16" or "float64".
        device: where to put them: "cpu", "cuda:0".
        native: True refuses models that our decoder can't play, False takes the Hugging Face class in any case.
        pad_vocab: rows of embedding and head are padded to a multiple of it, which GPUs multiply faster; nobody outside
            sees the padding. 1 for none.

    Raises:
        ModelError: the folder or name, its weights or its architecture can't be used; says what to do.
    """
    from rolecall.roles.models.heads import read_heads
    from rolecall.roles.models.loading import load_causal

    model = load_causal(path, dtype=dtype, device=device, native=native, pad_vocab=pad_vocab)
    model.heads = read_heads(path, hidden=model.spec.hidden, dtype=model.dtype, device=model.device)
    return model
