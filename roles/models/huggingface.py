"""The fallback: any causal language model of transformers, as its own class behind our seam."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rolecall.kernels.attention import Dense, Packed, Where
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.families.common import stops_of, windows_of
from rolecall.roles.models.folder import source_of
from rolecall.roles.models.reading import check_finite, check_names, check_shapes
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HuggingFaceModel(CausalModel):
    """A model as transformers defines it.

    A bias of the head becomes a column of the head's matrix, met by a hidden state that is always 1.

    Args:
        net: a transformers PreTrainedModel with a head, of which the types say little.
        packs: whether a mask is all that joins tokens of a row; if not, each segment is computed by itself.
        caches: whether it decodes with a cache of ours.
    """

    net: Any

    def __init__(self, net: Any, *, packs: bool = True, caches: bool = True) -> None:
        self.net = net.eval()
        self.spec = _spec(net)
        self.packs, self.caches = packs, caches
        self.longest = self.spec.window  # the mask given below is one for all layers
        self._bias = getattr(net.get_output_embeddings(), "bias", None)

    @property
    def head(self) -> Tensor:
        """[V, D], the embedding itself where they are tied; [V, D + 1] with a bias."""
        weight: Tensor = self.net.get_output_embeddings().weight
        return weight if self._bias is None else torch.cat((weight, self._bias[:, None]), dim=1)

    def hidden(self, tokens: Tensor, positions: Tensor, where: Where, cache: Any = None) -> Tensor:
        """As `CausalModel.hidden`."""
        if self.packs:
            states = self._masked(tokens, positions, where.dense().to(tokens.device), cache)
        elif isinstance(where, Packed) and cache is None:
            states = self._one_by_one(tokens, where)
        else:
            raise ModelError(f"{type(self.net).__name__} can't decode with a cache of keys and values.")
        return states if self._bias is None else torch.nn.functional.pad(states, (0, 1), value=1.0)

    def _masked(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        if self.longest and mask.shape[-1] > self.longest:
            raise ModelError(
                f"Rows of {mask.shape[-1]} tokens are longer than the sliding window of this model.",
                have=f"a window of {self.longest} tokens",
                remedy=f"set row_tokens and prompt + completion to at most {self.longest}",
            )
        if self.net.config._attn_implementation == "eager":  # it adds the mask
            mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill_(~mask, torch.finfo(self.dtype).min)
        options = {} if cache is None else {"past_key_values": cache}
        out = self.net.base_model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=cache is not None, **options)
        states: Tensor = out.last_hidden_state
        return states

    def _one_by_one(self, tokens: Tensor, where: Packed) -> Tensor:
        """Each segment after its ancestors in a row of its own: as often as it has descendants, and one more time."""
        parents, segments = where.parents.tolist(), where.segments
        found = self.head.new_zeros((*tokens.shape, self.net.get_output_embeddings().weight.shape[1]))
        for row in range(len(tokens)):
            for segment in sorted(set(segments[row].tolist()) - {-1}):
                chain = [segment]
                while parents[chain[0]] >= 0:
                    chain.insert(0, parents[chain[0]])
                slots = [(segments[row] == one).nonzero()[:, 0] for one in chain]
                out = self.net.base_model(input_ids=tokens[row, torch.cat(slots)][None], use_cache=False)
                found[row, slots[-1]] = out.last_hidden_state[0, -len(slots[-1]) :]
        return found

    def named_tensors(self) -> dict[str, Tensor]:
        """As `CausalModel.named_tensors`."""
        found = {name: tensor.detach() for name, tensor in self.net.named_parameters() if ".lora_" not in name}
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
        ModelError: as `from_transformers` and `examine` say.
    """
    return examine(from_transformers(path, dtype=dtype).to(device))


@torch.no_grad()
def from_transformers(path: str, *, dtype: torch.dtype) -> Any:
    """A model as its transformers class.

    Raises:
        ModelError: it can't be loaded, tensors are missing or of another shape (all are listed), or a number in one is not finite.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    name, options = source_of(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The model {path} can't be loaded: {reason}",
            remedy="check that the folder is whole; for a hub name, that it is spelt right and the hub can be reached",
        ) from error
    net, report = loaded
    # transformers only warns of these, and fills them with random numbers; what is there for nothing it leaves aside
    check_shapes(path, {name: (tuple(own), tuple(place)) for name, own, place in report["mismatched_keys"]})
    missing = set(report["missing_keys"])
    if missing:
        check_names(path, missing, set(report["unexpected_keys"]))
    check_finite(path, [name for name, parameter in net.named_parameters() if not torch.isfinite(parameter).all()])
    return net


@torch.no_grad()
def examine(net: Any) -> HuggingFaceModel:
    """Find out what a model can do, on two tokens, and say what it can't in `notes`.

    Raises:
        ModelError: its logits are not its hidden states times its head, scaled and capped as its config says, or it looks ahead.
    """
    model, name = HuggingFaceModel(net), type(net).__name__
    tokens = torch.tensor([[3, 5]], device=model.device) % model.spec.vocab
    positions = torch.tensor([[0, 1]], device=model.device)
    together = Packed(torch.zeros_like(positions), torch.tensor([-1], device=model.device), positions)
    apart = Packed(positions, torch.tensor([-1, -1], device=model.device), positions)
    loose = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3  # rounding of the dtype, generously
    alone = HuggingFaceModel(net, packs=False)
    wanted, single = alone.hidden(tokens, positions, together), alone.hidden(tokens, positions, apart)
    ahead = float((wanted[:, 0] - single[:, 0]).abs().max())
    if ahead > loose * float(single.abs().max()):
        raise ModelError(f"{name} looks ahead: what a token means depends on those after it.", remedy="use a causal language model")
    theirs = net(input_ids=tokens, use_cache=False).logits.float()
    if not torch.allclose(alone.logits(wanted).float(), theirs, rtol=loose, atol=loose * float(theirs.abs().max())):
        raise ModelError(
            f"{name} changes its logits after the head in a way that its config does not tell.",
            remedy="use another architecture, such as Llama or Qwen",
        )
    why = ""
    effect = float((wanted[:, 1] - single[:, 1]).abs().max()) + loose * float(single.abs().max())
    try:
        masked = model.hidden(tokens, positions * 0, apart)  # each token at the place that it has alone
        packs = float((masked - single).abs().max()) < 0.1 * effect
        packs = packs and float((model.hidden(tokens, positions, together) - wanted).abs().max()) < 0.1 * effect
    except Exception as error:  # the class's own code runs here: whatever it can't do, it may say in any way
        packs, why = False, f" ({type(error).__name__}: {str(error)[:200]})"
    model = HuggingFaceModel(net, packs=packs, caches=packs and _decodes(model, tokens, wanted, 0.1 * effect))
    if not packs:
        model.notes += (f"{name} joins tokens by more than attention under a mask: segments of a row are computed one by one{why}",)
    if not model.caches:
        model.notes += (f"{name} can't decode with our cache: the native engine can't sample from it",)
    if model.longest:
        model.notes += (f"rows of {name} can't be longer than its sliding window of {model.longest}",)
    return model


def _decodes(model: HuggingFaceModel, tokens: Tensor, wanted: Tensor, loose: float) -> bool:
    """Whether the second token after the first one's keys and values is as with it."""
    from rolecall.roles.rollout.cache import PrefillCache

    spec, places = model.spec, torch.tensor([[0, 1]], device=tokens.device)
    sees = torch.ones((1, 1, 1, 2), dtype=torch.bool, device=tokens.device)
    try:
        first = PrefillCache(model.head.new_zeros((spec.layers, 2, spec.kv_heads, 0, spec.head_dim)))
        model.hidden(tokens[:, :1], places[:, :1], Dense(sees[..., :1], places[:, :1], places[:, :1]), first)
        second = PrefillCache(first.whole())
        found = model.hidden(tokens[:, 1:], places[:, 1:], Dense(sees, places[:, 1:], places), second)
    except Exception:
        return False
    return float((found - wanted[:, 1:]).abs().max()) < loose


def _spec(net: Any) -> ModelSpec:
    """Read the sizes off a Hugging Face config."""
    config = net.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # a recurrent model has none
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
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def _logit_scale(config: Any) -> float:
    """What logits are multiplied by: `logit_scale` of Cohere and others, 1 / `logits_scaling` of Granite."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
