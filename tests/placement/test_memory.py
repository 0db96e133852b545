"""Estimates of memory, against numbers from elsewhere."""

import json

import pytest
from rolecall.placement.memory import Shape, adapters, cache_bytes, forward, logits, read_memory, read_shape, sampling, training
from rolecall.protocols.errors import ConfigError

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 80, "vocab_size": 101}
# meta-llama/Llama-2-7b's published sizes; it has 6,738,415,616 parameters
LLAMA7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": False}),
        ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("gemma3_text", {"head_dim": 24, "num_key_value_heads": 1}),
    ],
)
def test_parameters_are_those_of_the_real_model(family, more):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **TINY, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_shape(config.to_dict()).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_known_model_has_its_published_size():
    assert LLAMA7B.parameters == 6_738_415_616


def test_training_states_are_sixteen_bytes_a_parameter():
    """ZeRO's example (Rajbhandari et al. 2020): 7.5 B parameters take 120 GB; the share of one of 64 is 1.9 GB."""
    for sizes in ({}, {"bytes_each": 2, "gradient_bytes": 2, "state_bytes": 12}):
        whole = training(LLAMA7B, tokens=1, **sizes)
        states = whole.weights + whole.gradients + whole.optimiser
        assert states * 7.5e9 / LLAMA7B.parameters == pytest.approx(120)
        part = training(LLAMA7B, tokens=1, shards=64, **sizes)
        assert part.weights + part.gradients + part.optimiser == pytest.approx(states / 64)


def test_the_cache_of_a_token_is_that_of_the_paper():
    """PagedAttention (Kwon et al. 2023, section 3): OPT-13B, 2 x 5120 x 40 x 2 bytes = 800 KB."""
    opt = Shape(hidden=5120, layers=40, heads=40, kv_heads=40, head_dim=128, intermediate=20480, vocab=50272)
    assert cache_bytes(opt, 2) == 819_200
    assert sampling(opt, slots=10, context=1000, bytes_each=2).cache == pytest.approx(8.192)


def test_activations_grow_with_tokens_and_logits_by_chunks():
    one, two = training(LLAMA7B, tokens=4096, chunk=1024), training(LLAMA7B, tokens=8192, chunk=1024)
    kept = one.activations - 2 * logits(LLAMA7B, 1024)
    assert two.activations - one.activations == pytest.approx(kept)
    plain = training(LLAMA7B, tokens=4096, chunk=1024, row=4096)
    assert plain.activations - one.activations == pytest.approx(4096 * 32 * 2 * 32 * 4096 * 4 / 1e9)
    assert forward(LLAMA7B, tokens=4096).activations < one.activations / 10


def test_adapters_have_gradients_and_moments_alone():
    """Rank 16 on all linears of Llama-2-7b: peft prints 39,976,960 trainable parameters."""
    assert adapters(LLAMA7B, 16) == 39_976_960
    whole, part = (training(LLAMA7B, tokens=1024, bytes_each=2, gradient_bytes=4, state_bytes=12, lora=rank) for rank in (0, 16))
    assert part.weights == pytest.approx(2 * (LLAMA7B.parameters + 39_976_960) / 1e9)
    assert (part.gradients, part.optimiser) == (pytest.approx(0.03997696 * 4), pytest.approx(0.03997696 * 12))
    assert whole.activations < part.activations < 1.01 * whole.activations


def test_recomputation_keeps_less():
    none, selective, full = (training(LLAMA7B, tokens=4096, chunk=1, recompute=how).activations for how in ("none", "selective", "full"))
    inside = 4096 * 4 * 11008 * 4 / 1e9
    assert none - selective == pytest.approx(31 * inside)  # that of one layer is there again
    assert full == pytest.approx((31 * 4096 * 4096 * 4 + none * 1e9 / 32) / 1e9, rel=1e-3)
    with pytest.raises(ConfigError, match="There is: none, selective, full"):
        training(LLAMA7B, tokens=1, recompute="some")


def test_tables_of_a_config_are_read_strictly(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    model = str(tmp_path)
    good = read_memory({"policy": {"kind": "training", "model": model, "tokens": 64, "pool": "train"}})
    assert good["policy"].pool == "train"
    lean = {"kind": "training", "model": model, "tokens": 64, "lora": 8, "recompute": "full"}
    assert read_memory({"policy": lean})["policy"].device_gb < good["policy"].device_gb
    assert good["policy"].device_gb > 0
    wrong = {
        "'trainning'": {"kind": "trainning", "model": model},
        "'tokens'": {"kind": "training", "model": model, "token": 64},
        "no such recomputation": {"kind": "training", "model": model, "tokens": 64, "recompute": "fully"},
        "set slots and context": {"kind": "sampling", "model": model, "slots": 4},
        "config.json": {"kind": "training", "model": str(tmp_path / "none"), "tokens": 64},
        "tokens = '64'": {"kind": "training", "model": model, "tokens": "64"},
    }
    for words, table in wrong.items():
        with pytest.raises(ConfigError) as caught:
            read_memory({"policy": table})
        assert words in str(caught.value)
        assert "memory.policy" in str(caught.value)


def test_configs_that_can_not_be_counted_are_refused():
    with pytest.raises(ConfigError, match="gpt_oss"):
        read_shape({"model_type": "gpt_oss", **TINY})
    with pytest.raises(ConfigError, match="vocab_size"):
        read_shape({**TINY, "vocab_size": None})
