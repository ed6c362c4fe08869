"""Our class as vLLM's Transformers backend reads and calls it (sources of 0.32 and 0.33), without vLLM.

docs/conversion.md says what vLLM itself computed of these models.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.unit.model_io.own_models import MODELS, export, tokens

# Other kernels sum in another order.
TOLERANCE = 2e-5
REQUESTS = [13, 8]
"""Tokens of requests that are computed at once."""
REFUSED = {name for name, model in MODELS.items() if name == "dynamic" or model.attention_sinks}
"""Dynamic scaling goes by the longest position of a row, and a row has several requests there; sinks would be lost."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that exports a model of MODELS, each once."""
    return functools.cache(lambda name: export(tmp_path_factory.mktemp("export"), name)[1])


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def engine_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention within each request [1, heads, tokens, D] -> [tokens, heads * D]: vLLM's has neither rows nor mask.

    It has the window that config.json says for the layer.
    """
    is_sliding = module.config.layer_type(module.layer_idx) == "sliding_attention"
    contexts = []
    for q, k, v in zip(*(x[0].split(REQUESTS, dim=1) for x in (query, key, value)), strict=True):
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        if is_sliding:
            seen = seen.triu(1 - module.config.sliding_window)
        context = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=scaling, enable_gqa=True
        )
        contexts.append(context[0].transpose(0, 1).flatten(1))
    return torch.cat(contexts), None


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
@torch.no_grad()
def test_requests_in_one_row_are_computed_as_each_alone(name: str, exported: Any) -> None:
    network = load(exported(name))
    requests = [row[:length] for row, length in zip(tokens(), REQUESTS, strict=True)]
    expected = torch.cat([network(request[None]).logits[0] for request in requests])
    ALL_ATTENTION_FUNCTIONS.register("an_engine", engine_attention)
    network.config._attn_implementation = "an_engine"
    hidden = network.model(
        input_ids=torch.cat(requests)[None],
        inputs_embeds=None,
        position_ids=torch.cat([torch.arange(length) for length in REQUESTS])[None],
        use_cache=False,
        return_dict=False,
    )[0]
    logits = network.lm_head(hidden[0])
    worst = float((logits - expected).abs().max() / expected.abs().max())
    print(f"{name}: {worst:.1e} of the logits' scale away from each alone")
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_an_engine_would_compute_otherwise_is_refused(name: str, exported: Any) -> None:
    network = load(exported(name))
    network(tokens())
    network.config._attn_implementation = "vllm"
    with pytest.raises((NotImplementedError, ValueError), match="longest position of a row|knows no attention sinks"):
        network(tokens())


def interface_call(forward: Any) -> ast.Call:
    """The one call in `forward` of what it looked up as ALL_ATTENTION_FUNCTIONS[...]: vLLM finds it in the text."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    names = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Subscript)
        and ast.unparse(node.value.value) == "ALL_ATTENTION_FUNCTIONS"
    }
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    return call


@pytest.mark.parametrize("name", ["dense", "yarn, latent, DeepSeek's factors"])
def test_attention_is_found_in_the_text_of_its_forward_pass(name: str, exported: Any) -> None:
    """Otherwise vLLM refuses the model: layer 0 does not dispatch through the attention interface."""
    network = load(exported(name))
    for number, layer in enumerate(network.model.layers):
        attention = layer.self_attn
        call = interface_call(type(attention).forward)
        scaling = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["scaling"]
        assert scaling == "self.scaling"
        assert isinstance(attention.scaling, float)
        assert (attention.layer_idx, attention.is_causal) == (number, True)
        assert attention.config is network.config


@pytest.mark.parametrize("name", MODELS)
def test_what_an_engine_takes_for_swiglu_experts_are_swiglu_experts(name: str, exported: Any) -> None:
    """A list called `experts` is replaced by kernels for SwiGLU without biases, whatever it holds, without a word."""
    network, model = load(exported(name)), MODELS[name]
    swiglu = model.gated_linear_unit and model.activation_func == "silu" and not model.add_bias_linear
    swiglu = swiglu and model.activation_func_clamp_value is None and not model.glu_linear_offset
    blocks = [layer.mlp for layer in network.model.layers if hasattr(layer.mlp, "experts")]
    assert len(blocks) == sum(model.moe_layer_pattern)
    for block in blocks:
        assert isinstance(block.experts, torch.nn.ModuleList) == swiglu
    if blocks:
        config = network.config  # what kernels are built from
        assert (config.num_experts, config.num_experts_per_tok) == (model.num_moe_experts, model.moe_router_topk)
        assert config.moe_intermediate_size == (model.moe_ffn_hidden_size or model.ffn_hidden_size)


@pytest.mark.parametrize("name", ["Tanuki with a shared expert", "DeepSeek-V3 with normalized gating", "dense"])
def test_the_plan_of_pipeline_stages_names_its_parts(name: str, exported: Any) -> None:
    """Where a stage gets hidden states it would scale them again or add positions, there is no plan."""
    network = load(exported(name))
    plan = getattr(network.config, "base_model_pp_plan", None)
    assert (plan is None) == (MODELS[name].embedding_scale != 1.0)
    for part in plan or ():
        assert next(network.model.get_submodule(part).parameters()) is not None
    lists = [part for part in plan or () if isinstance(network.model.get_submodule(part), torch.nn.ModuleList)]
    assert lists == (["layers"] if plan else [])


class AllLeaves(torch.fx.Tracer):
    """Reads one module's forward pass, as far as it can be read."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.is_moe])
def test_no_engine_reads_a_choice_of_experts_in_a_gate(name: str, exported: Any) -> None:
    """Where vLLM finds scores of a linear layer and a topk of them it computes a plain gate, without normalization."""
    gate = load(exported(name)).model.layers[-1].mlp.gate
    tracer = AllLeaves()
    with contextlib.suppress(Exception):
        tracer.trace(gate)
    found = {getattr(node.target, "__name__", str(node.target)) for node in tracer.graph.nodes}
    assert "linear" in found
    assert not {name for name in found if "topk" in name}
