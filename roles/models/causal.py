"""The seam between the roles and a model's code: today any Hugging Face causal language model class.

Shape letters: R rows, C slots of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rolecall.protocols.errors import ModelError, WeightsError
from rolecall.roles.folders import new_folder
from rolecall.roles.models.folder import check_model
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, one name each whatever its family calls them."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    max_positions: int
    tied: bool  # the head is the embedding matrix
    stops: tuple[int, ...]  # token ids that end a completion, as the model's own files say
    window: int  # slots that a layer with a sliding window sees; 0 where every layer sees all


class CausalModel:
    """A causal language model without its head applied: tokens in, hidden states out.

    The head is kept apart because only some positions need logits. Dropout is off, in training too: the policy that is
    trained must be the one that sampled.
    """

    def __init__(self, net: Any) -> None:
        self.net = net.eval()  # a transformers PreTrainedModel, of which the types say little
        self.spec = _spec(net)

    @property
    def head(self) -> Tensor:
        """[V, D] matrix that turns hidden states into logits; a parameter, the embedding itself where they are tied."""
        weight: Tensor = self.net.get_output_embeddings().weight
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.device

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [R, C] int64.
            positions: [R, C] int64, of each token within its sequence.
            mask: [R, 1, C, keys] bool, True where a slot may attend; keys is C, or the cache's length with a cache.
                Every slot needs at least one True. None means causal.
            cache: object with `update(keys, values, layer, ...) -> (keys, values)` as in transformers, for decoding.

        Returns:
            [R, C, D] in the model's dtype.
        """
        if self.spec.window and max(tokens.shape[1], 0 if mask is None else mask.shape[-1]) > self.spec.window:
            raise ModelError(
                f"Rows of {tokens.shape[1]} tokens are longer than the sliding window of this model.",
                have=f"a window of {self.spec.window} tokens",
                remedy=f"set row_tokens and prompt + completion to at most {self.spec.window}",
            )
        options = {} if cache is None else {"past_key_values": cache}
        out = self.net.base_model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=cache is not None, **options)
        states: Tensor = out.last_hidden_state
        return states

    def check_length(self, tokens: int) -> None:
        """Raise ModelError if a sequence of so many tokens is longer than the model's context."""
        if tokens > self.spec.max_positions:
            raise ModelError(
                "A prompt with its completion is longer than the model's context.",
                ask=f"{tokens} tokens",
                have=f"{self.spec.max_positions} positions",
                remedy="leave out long prompts, lower max_tokens, or use a model with a longer context",
            )

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Every parameter once, in a fixed order."""
        found: Iterator[torch.nn.Parameter] = self.net.parameters()
        return found

    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint of the model holds: Hugging Face name → tensor (not a copy, without gradient), tied ones once."""
        found = {name: tensor.detach() for name, tensor in self.net.named_parameters()}
        buffers = {name for name, _ in self.net.named_buffers()}
        found |= {name: tensor for name, tensor in self.net.state_dict().items() if name in buffers}
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the same names and shapes over the model's; dtype and device may differ.

        Raises:
            WeightsError: a name is missing or unknown, or a shape differs; nothing was copied then.
        """
        own = self.named_tensors()
        if own.keys() != tensors.keys():
            missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            raise WeightsError(f"The weights are of another model: missing {missing[:3]}, unknown {unknown[:3]}.")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise WeightsError(f"Tensor {name} is {tuple(tensors[name].shape)}, the model's is {tuple(tensor.shape)}.")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """Write a new folder that plain transformers loads; returns its path. Raises ModelError if it exists already."""
        with new_folder(folder, ModelError) as aside:
            self.write(aside, tokenizer)
        return str(folder)

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write config, weights (safetensors) and tokenizer into an existing folder."""
        self.net.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def load_causal(path: str, *, dtype: str = "float32", device: str = "cpu") -> CausalModel:
    """What `rolecall.roles.models.load` does."""
    if dtype not in DTYPES:
        raise ModelError(f"There is no dtype {dtype!r}.", have=", ".join(DTYPES), remedy="choose one of these")
    check_model(path, tokenizer=False)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = Path(path).expanduser()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(local) if local.is_dir() else path,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The model {path} can't be loaded: {reason}",
            remedy="check that the folder is whole; for a hub name, that it is spelt right and the hub can be reached",
        ) from error
    net, report = loaded
    wanting = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wanting:  # transformers only warns, and fills these with random numbers
        raise ModelError(
            f"The weights of {path} are not whole.",
            ask=f"{len(wanting)} more tensors, such as {wanting[0]}",
            remedy="download or save the model again",
        )
    model = CausalModel(net.to(device))
    prove(model)
    return model


@torch.no_grad()
def prove(model: CausalModel) -> None:
    """Raise ModelError unless the model is what packed training takes it for.

    1. Its logits are hidden states times the head, with nothing after it (soft-capping, scaling, bias).
    2. A mask is all that joins two tokens of a row: not so with recurrent or convolution layers.
    """
    tokens = torch.tensor([[3, 5]], device=model.device) % model.spec.vocab
    positions = torch.tensor([[0, 1]], device=model.device)
    joined = torch.tensor([[[[True, False], [True, True]]]], device=model.device)
    apart = torch.eye(2, dtype=torch.bool, device=model.device)[None, None]
    states = model.hidden(tokens, positions, joined)
    ours = states.float() @ model.head.float().T
    theirs = model.net(input_ids=tokens, position_ids=positions, attention_mask=joined, use_cache=False).logits.float()
    loose = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3  # rounding of the dtype, generously
    if not torch.allclose(ours, theirs, rtol=loose, atol=loose * float(theirs.abs().max())):
        raise ModelError(
            f"{type(model.net).__name__} changes its logits after the head (soft-capping, scaling or a bias).",
            remedy="use another architecture, such as Llama or Qwen",
        )
    packed = model.hidden(tokens, positions, apart)[:, 1]
    alone = model.hidden(tokens[:, 1:], positions[:, 1:], apart[:, :, 1:, 1:])[:, 0]
    leak, effect = (packed - alone).abs().max(), (states[:, 1] - alone).abs().max()
    if float(leak) > 0.1 * float(effect) + loose * float(alone.abs().max()):
        raise ModelError(
            f"{type(model.net).__name__} joins tokens of a row by more than attention, so sequences can't share a row.",
            remedy="use an architecture of attention layers alone, such as Llama or Qwen",
        )


def _spec(net: Any) -> ModelSpec:
    """Read the sizes off a Hugging Face config."""
    config = net.config.get_text_config()
    heads = config.num_attention_heads
    head = net.get_output_embeddings()
    kinds = set(getattr(config, "layer_types", None) or ())
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    stops: list[int] = []
    for source in (net.generation_config, config):
        found = getattr(source, "eos_token_id", None)
        stops += [] if found is None else [found] if isinstance(found, int) else list(found)
    return ModelSpec(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        vocab=head.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None) or 1 << 30,
        tied=head.weight is net.get_input_embeddings().weight,
        stops=tuple(dict.fromkeys(stops)),
        window=(getattr(config, "sliding_window", None) or 0) if sliding else 0,
    )
