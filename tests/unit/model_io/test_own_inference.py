"""Our exported class as an inference engineer uses it: cache, padding, kernels, devices, fine-tuning, saving."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from megatron_ext.model_io.compare import compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.testing.pool import GlooPool
from tests.unit.model_io.own_models import (
    LENGTH,
    MODELS,
    TOLERANCE,
    VOCABULARY,
    distance,
    export,
    left_padded,
    load,
    tokens,
)

# With dynamic scaling, keys in a cache keep the angles of the length they were computed at, as in transformers.
CACHED = [name for name in MODELS if name != "dynamic"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that exports a model of MODELS, each once."""

    @functools.cache
    def place(name: str) -> Path:
        directory = tmp_path_factory.mktemp("export")
        return export(directory, name)[1]

    return place


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_generation_with_a_cache_and_with_padding_is_generation_without(name: str, exported: Any) -> None:
    network = load(exported(name))
    lengths = [9, 4, 6]
    batch, mask = left_padded(tokens(3, 9), lengths)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = network.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(cached, network.generate(batch, attention_mask=mask, use_cache=False, **settings))
    for row, length in enumerate(lengths):
        alone = network.generate(batch[row : row + 1, -length:], **settings)
        assert torch.equal(cached[row, 9:], alone[0, length:])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padded_rows_and_both_kernels_give_the_logits_of_single_rows(name: str, exported: Any) -> None:
    network = load(exported(name))
    rows, lengths = tokens(2, LENGTH), [LENGTH, 13]
    batch, mask = left_padded(rows, lengths)
    padded = network(batch, attention_mask=mask).logits
    eager = load(exported(name), attn_implementation="eager")(batch, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = network(rows[row : row + 1, :length]).logits[0]
        worst = max(distance(x[row, -length:], alone) for x in (padded, eager))
        print(f"{name}: padded and eager {worst:.1e} of the logits' scale away from a row alone")
        assert worst < TOLERANCE


@torch.no_grad()
def test_a_static_cache_and_a_cache_filled_in_pieces(exported: Any) -> None:
    network = load(exported("DeepSeek-V3 with normalized gating"))
    whole = network(tokens()).logits
    for cache in (None, StaticCache(config=network.config, max_cache_len=40)):
        first = network(tokens()[:, :10], past_key_values=cache, use_cache=True)
        second = network(tokens()[:, 10:], past_key_values=first.past_key_values, use_cache=True)
        assert distance(torch.cat((first.logits, second.logits), dim=1), whole) < TOLERANCE


@torch.no_grad()
def test_what_a_forward_pass_can_return(exported: Any) -> None:
    network = load(exported("Tanuki with a shared expert"), attn_implementation="eager")
    whole = network(tokens(), output_hidden_states=True, output_attentions=True, labels=tokens())
    assert [tuple(h.shape) for h in whole.hidden_states] == [(2, LENGTH, 60)] * 4
    assert [tuple(a.shape) for a in whole.attentions] == [(2, 6, LENGTH, LENGTH)] * 3
    assert torch.equal(network.lm_head(whole.hidden_states[-1]), whole.logits)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert torch.allclose(whole.loss, expected)
    assert torch.allclose(network(tokens(), logits_to_keep=1).logits, whole.logits[:, -1:], atol=1e-6)
    embedded = network.get_input_embeddings()(tokens())
    assert torch.equal(network(inputs_embeds=embedded, return_dict=False)[0], whole.logits)
    trunk = AutoModel.from_pretrained(exported("Tanuki with a shared expert"), trust_remote_code=True).eval()
    assert torch.allclose(trunk(tokens()).last_hidden_state, whole.hidden_states[-1], atol=1e-5)


@pytest.mark.parametrize("name", ["GPT-2 with experts", "DeepSeek-V3 with normalized gating"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, exported: Any) -> None:
    network = load(exported(name)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.gradient_checkpointing_enable()
        torch.manual_seed(0)  # dropout and noise
        network.zero_grad()
        network(tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])
    untouched = {n for n, p in network.named_parameters() if p.requires_grad} - set(gradients[0])
    assert all(".experts." in n for n in untouched)  # an expert that no token was sent to


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.moe_router_noise is not None])
@torch.no_grad()
def test_noise_is_drawn_in_training_only(name: str, exported: Any) -> None:
    router = load(exported(name)).model.layers[2].mlp.gate
    hidden = torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    ids, weights = router(hidden)
    assert torch.equal(router(hidden)[1], weights)
    noisy_ids, noisy_weights = router.train()(hidden)
    assert not torch.equal(noisy_weights, weights)
    assert not torch.equal(noisy_ids, ids)


@torch.no_grad()
def test_noise_has_the_distribution_of_training(exported: Any) -> None:
    """Moments of 40000 draws for one token: standard errors are half a percent."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 60).expand(40000, 60)
    router = load(exported("GPT-2 with experts")).model.layers[2].mlp.gate
    noise = router.train()._logits(hidden) - router.eval()._logits(hidden)
    # Gumbel: mean 0.5772, variance pi^2 / 6; the model's scale is 0.5.
    assert torch.allclose(noise.mean(0), torch.tensor(0.5 * 0.5772), atol=0.02)
    assert torch.allclose(noise.std(0), torch.tensor(0.5 * 1.2825), atol=0.02)
    router = load(exported("Qwen2-MoE with learned noise")).model.layers[2].mlp.gate
    noise = router.train()._logits(hidden) - router.eval()._logits(hidden)
    deviation = torch.nn.functional.softplus(hidden[0] @ router.noise_weight.t())
    assert torch.allclose(noise.std(0) / deviation, torch.ones(5), atol=0.02)
    assert torch.allclose(noise.mean(0) / deviation, torch.zeros(5), atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_again_here_and_in_megatron(name: str, exported: Any, tmp_path: Path) -> None:
    network = load(exported(name))
    network.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, network(tokens()).logits)
    convert(tmp_path / "saved", tmp_path / "back")
    assert not compare_weights(exported(name), tmp_path / "back").different


@pytest.mark.parametrize("name", ["dense", "GPT-2 with experts"])
@torch.no_grad()
def test_device_map(name: str, exported: Any) -> None:
    placed = load(exported(name), device_map="cpu")
    assert torch.equal(placed(tokens()).logits, load(exported(name))(tokens()).logits)


@torch.no_grad()
def test_parts_on_two_devices_generate(exported: Any, tmp_path: Path) -> None:
    """Layers that do not fit are kept on disk, whole, and brought in when their turn comes."""
    name = "DeepSeek-V3 with normalized gating"
    network = load(
        exported(name), device_map="auto", max_memory={"cpu": 300_000}, offload_folder=str(tmp_path / "offloaded")
    )
    assert set(network.hf_device_map.values()) == {"cpu", "disk"}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(network.generate(tokens(), **settings), load(exported(name)).generate(tokens(), **settings))


class Nothing(torch.nn.Module):
    """Experts that compute nothing, since meta tensors have no numbers to route by."""

    def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        assert {hidden.device.type, topk_ids.device.type, topk_weights.device.type} == {"meta"}
        return hidden


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_tensor_is_made_where_the_model_is(name: str, exported: Any) -> None:
    """On torch's meta device, which refuses to mix with the CPU as CUDA does."""
    network = load(exported(name)).to("meta").train()
    for layer in network.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = Nothing()
    assert network(tokens().to("meta")).logits.device.type == "meta"


@torch.no_grad()
def test_a_new_model_is_initialised(exported: Any) -> None:
    """Also what transformers leaves uninitialised unless a class says how: router, biases, learned noise."""
    for name in ("GPT-2 with experts", "Qwen2-MoE with learned noise", "DeepSeek-V3 with normalized gating"):
        config = AutoConfig.from_pretrained(exported(name), trust_remote_code=True)
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
        std = MODELS[name].init_method_std
        for weight_name, weight in network.state_dict().items():
            if weight.dim() > 1 and "noise" not in weight_name:
                assert 0.8 * std < float(weight.std()) < 1.2 * std, weight_name
            else:
                is_scale = "norm" in weight_name and weight_name.endswith("weight")
                assert torch.equal(weight, torch.full_like(weight, float(is_scale))), weight_name
        assert float(network(tokens(), labels=tokens()).loss) == pytest.approx(math.log(VOCABULARY), rel=0.05)


@torch.no_grad()
def test_an_engine_can_replace_the_experts(exported: Any) -> None:
    """As vLLM does: it finds a ModuleList called `experts` and calls its own kernels with the routing."""
    network = load(exported("Tanuki with a shared expert"))
    expected = network(tokens()).logits

    class FusedExperts(torch.nn.Module):
        def __init__(self, experts: torch.nn.ModuleList) -> None:
            super().__init__()
            stacked = [[getattr(e, f"{n}_proj").weight for e in experts] for n in ("gate", "up", "down")]
            self.gate, self.up, self.down = (torch.stack(weights) for weights in stacked)

        def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            gate, up = (torch.einsum("th,efh->tef", hidden, weight) for weight in (self.gate, self.up))
            outputs = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * up, self.down)
            chosen = outputs.gather(1, topk_ids.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            return (chosen * topk_weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    replaced = 0
    for layer in network.model.layers:
        if isinstance(getattr(layer.mlp, "experts", None), torch.nn.ModuleList):
            layer.mlp.experts = FusedExperts(layer.mlp.experts)
            replaced += 1
    assert replaced == 2
    assert distance(network(tokens()).logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["Tanuki with a shared expert", "DeepSeek-V3 with normalized gating"])
@torch.no_grad()
def test_attention_goes_through_the_interface(name: str, exported: Any) -> None:
    """An implementation that an engine registers is called, with what flash kernels need: keys as wide as values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **kwargs: Any) -> Any:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        layers.append((module.layer_idx, kwargs["stream"]))
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return context.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("an_engines_flash", kernel)
    network = load(exported(name))
    expected = network(tokens()).logits
    network.config._attn_implementation = "an_engines_flash"  # as engines do; transformers looks for a flash package
    logits = network(tokens(), stream="handed on").logits
    assert layers == [(layer, "handed on") for layer in range(3)]
    assert distance(logits, expected) < TOLERANCE


def test_the_tensor_parallel_plan_names_linear_layers(exported: Any) -> None:
    import fnmatch

    for name in ("GPT-2 with experts", "OLMoE with biases", "yarn, latent", "DeepSeek-V2 with LayerNorm", "dense"):
        network = load(exported(name))
        linears = {n.removeprefix("model.") for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
        for pattern in network.config.base_model_tp_plan:
            assert fnmatch.filter(linears, pattern), f"{name}: nothing is called {pattern}"


def tensor_parallel_logits(directory: str) -> torch.Tensor:
    """Logits of one process of a tensor-parallel group, by transformers' own tensor parallelism."""
    from transformers.distributed import DistributedConfig

    place = {"RANK": torch.distributed.get_rank(), "WORLD_SIZE": torch.distributed.get_world_size()}
    os.environ |= {name: str(value) for name, value in (place | {"LOCAL_RANK": place["RANK"]}).items()}
    try:
        network = load(Path(directory), distributed_config=DistributedConfig(tp_plan="auto"))
        with torch.no_grad():
            return network(tokens()).logits
    finally:
        for name in (*place, "LOCAL_RANK"):
            del os.environ[name]


@pytest.mark.parametrize(
    "name", ["GPT-2 with experts", "OLMoE with biases", "yarn, latent", "Qwen2-MoE with learned noise"]
)
def test_tensor_parallel_inference(name: str, exported: Any, pool: GlooPool) -> None:
    with torch.no_grad():
        expected = load(exported(name))(tokens()).logits
    for logits in pool.run(2, tensor_parallel_logits, str(exported(name))):
        assert distance(logits, expected) < TOLERANCE


def test_shipped_files_need_torch_and_transformers_only() -> None:
    import ast
    import sys

    import megatron_ext.model_io.huggingface.modeling as shipped

    allowed = {"torch", "transformers"} | sys.stdlib_module_names
    for path in Path(shipped.__file__).parent.glob("*_megatron_ext*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            assert {module.partition(".")[0] for module in modules} <= allowed, f"{path.name}: {modules}"
