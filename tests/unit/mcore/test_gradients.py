"""Which layer and group a weight is of, by its name."""

import pytest

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.config import MultiLatentAttention
from megatron_ext.mcore.gradients import place_of
from megatron_ext.testing.tiny import tiny_model


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("embedding.word_embeddings.weight", (None, "embedding")),
        ("decoder.layers.12.self_attention.linear_qkv.layer_norm_weight", (12, "norm")),
        ("decoder.layers.12.self_attention.linear_qkv.weight", (12, "attention")),
        ("decoder.layers.0.self_attention.q_layernorm.weight", (0, "norm")),
        ("decoder.layers.0.mlp.linear_fc1.weight", (0, "mlp")),
        ("decoder.layers.3.mlp.router.weight", (3, "router")),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2.weight", (3, "experts")),
        ("decoder.layers.3.mlp.shared_experts.linear_fc2.weight", (3, "shared_experts")),
        ("decoder.final_layernorm.weight", (None, "norm")),
        ("output_layer.weight", (None, "output")),
    ],
)
def test_weights_have_a_layer_and_a_group(key: str, place: tuple[int | None, str]) -> None:
    assert place_of(key) == place


def test_only_the_output_layer_is_of_the_group_that_is_left() -> None:
    latent = MultiLatentAttention(kv_lora_rank=8, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8)
    for model in (tiny_model(moe=True, qk_layernorm="head"), tiny_model(multi_latent_attention=latent)):
        others = [key for key in model_shapes(model) if place_of(key)[1] == "output"]
        assert all(key.startswith("output_layer.") for key in others)
