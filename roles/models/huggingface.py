"""The fallback: any causal language model of transformers, as its own class behind our seam."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rolecall.kernels.attention import Where
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.families.common import stops_of, windows_of
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HuggingFaceModel(CausalModel):
    """A model as transformers defines it.

    Args:
        net: a transformers PreTrainedModel with a head, of which the types say little.
    """

    net: Any

    def __init__(self, net: Any) -> None:
        self.net = net.eval()
        self.spec = _spec(net)
        self.longest = self.spec.window  # the mask given below is one for all layers

    @property
    def head(self) -> Tensor:
        """[V, D]; a parameter, the embedding itself where they are tied."""
        weight: Tensor = self.net.get_output_embeddings().weight
        return weight

    def hidden(self, tokens: Tensor, positions: Tensor, where: Where, cache: Any = None) -> Tensor:
        """As `CausalModel.hidden`."""
        mask = where.dense()
        if self.longest and mask.shape[-1] > self.longest:
            raise ModelError(
                f"Rows of {mask.shape[-1]} tokens are longer than the sliding window of this model.",
                have=f"a window of {self.longest} tokens",
                remedy=f"set row_tokens and prompt + completion to at most {self.longest}",
            )
        options = {} if cache is None else {"past_key_values": cache}
        out = self.net.base_model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=cache is not None, **options)
        states: Tensor = out.last_hidden_state
        return states

    def named_tensors(self) -> dict[str, Tensor]:
        """As `CausalModel.named_tensors`."""
        found = {name: tensor.detach() for name, tensor in self.net.named_parameters()}
        buffers = {name for name, _ in self.net.named_buffers()}
        found |= {name: tensor for name, tensor in self.net.state_dict().items() if name in buffers}
        return found

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """As `CausalModel.write`."""
        self.net.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def load_huggingface(path: str, *, dtype: torch.dtype, device: str) -> HuggingFaceModel:
    """Load a model as its transformers class.

    Raises:
        ModelError: it can't be loaded, its weights are not whole, or it is not what packed training takes it for.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = Path(path).expanduser()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(local) if local.is_dir() else path,
            dtype=dtype,
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
    model = HuggingFaceModel(net.to(device))
    prove(model)
    return model


@torch.no_grad()
def prove(model: HuggingFaceModel) -> None:
    """Raise ModelError unless the model is what packed training takes it for.

    1. Its logits are hidden states times the head, with nothing after it (soft-capping, scaling, bias).
    2. A mask is all that joins two tokens of a row: not so with recurrent or convolution layers.
    """
    tokens = torch.tensor([[3, 5]], device=model.device) % model.spec.vocab
    positions = torch.tensor([[0, 1]], device=model.device)
    joined = _Mask(torch.tensor([[[[True, False], [True, True]]]], device=model.device))
    apart = _Mask(torch.eye(2, dtype=torch.bool, device=model.device)[None, None])
    states = model.hidden(tokens, positions, joined)  # type: ignore[arg-type]
    ours = model.logits(states)
    theirs = model.net(input_ids=tokens, position_ids=positions, attention_mask=joined.mask, use_cache=False).logits.float()
    loose = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3  # rounding of the dtype, generously
    if not torch.allclose(ours.float(), theirs, rtol=loose, atol=loose * float(theirs.abs().max())):
        raise ModelError(
            f"{type(model.net).__name__} changes its logits after the head (soft-capping, scaling or a bias).",
            remedy="use another architecture, such as Llama or Qwen",
        )
    packed = model.hidden(tokens, positions, apart)[:, 1]  # type: ignore[arg-type]
    alone = model.hidden(tokens[:, 1:], positions[:, 1:], _Mask(apart.mask[:, :, 1:, 1:]))[:, 0]  # type: ignore[arg-type]
    leak, effect = (packed - alone).abs().max(), (states[:, 1] - alone).abs().max()
    if float(leak) > 0.1 * float(effect) + loose * float(alone.abs().max()):
        raise ModelError(
            f"{type(model.net).__name__} joins tokens of a row by more than attention, so sequences can't share a row.",
            remedy="use an architecture of attention layers alone, such as Llama or Qwen",
        )


class _Mask:
    """A mask as it is, for trying a model out."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def dense(self, window: int = 0) -> Tensor:
        return self.mask


def _spec(net: Any) -> ModelSpec:
    """Read the sizes off a Hugging Face config."""
    config = net.config.get_text_config()
    heads = config.num_attention_heads
    head = net.get_output_embeddings()
    return ModelSpec(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        vocab=head.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None) or 1 << 30,
        tied=head.weight is net.get_input_embeddings().weight,
        stops=stops_of(net.generation_config, config),
        windows=windows_of(config),
    )
