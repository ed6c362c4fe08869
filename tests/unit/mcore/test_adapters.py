"""A plan changes the parts that it names and no others; an empty one changes nothing."""

from typing import Any

import pytest
import torch

from megatron_ext.config import Fp32Precision, LoraConfig, LoraTarget, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.adapters import AdapterPlan, with_adapters
from megatron_ext.mcore.adapters.low_rank import ModuleAdapters
from megatron_ext.mcore.adapters.plan import adapter_plan
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.layer_specs import block_spec
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

MODEL = tiny_model(moe=True)
PARTS = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.experts", "mlp.shared_experts.linear_fc2")


def subclass(part: type) -> type:
    return type(f"Adapted{part.__name__}", (part,), {})


def configuration() -> Any:
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    return transformer_config(MODEL, ParallelConfig(), Fp32Precision(kind="fp32"), RecomputeConfig())


def adapted_modules(plan: AdapterPlan) -> tuple[list[str], torch.Tensor]:
    """Names of the modules of adapted classes, and the logits of some tokens."""
    (network,) = build_chunks(MODEL, ParallelConfig(), configuration(), torch.device("cpu"), plan)
    initialize_weights(MODEL, [network], 0)
    names = [name for name, module in network.named_modules() if type(module).__name__.startswith("Adapted")]
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        return names, network.eval()(tokens, torch.arange(16).expand(2, -1), None)


def test_named_parts_are_changed_where_they_are(pool: GlooPool) -> None:
    ((nothing, before),) = pool.run(1, adapted_modules, {})
    ((adapted, after),) = pool.run(1, adapted_modules, dict.fromkeys(PARTS, subclass))
    assert nothing == []
    layers = [(layer, part) for layer in range(4) for part in PARTS]
    expected = [
        f"decoder.layers.{n}.{part}" for n, part in layers if ("expert" not in part) == (n == 0) or "qkv" in part
    ]
    assert sorted(adapted) == sorted(expected)
    assert torch.equal(before, after)


def test_outputs_of_adapters_stand_where_those_of_the_module_do() -> None:
    """Queries, keys and values take turns by query groups, which TP splits; of gate and up it splits each."""
    q, k = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])
    qkv = ModuleAdapters((), (("q", 4), ("k", 2), ("v", 2)), groups=2, groups_are_split=True)
    assert qkv.assemble({"k": k, "q": q}, 1).tolist() == [1, 2, 5, 0, 3, 4, 6, 0]
    assert qkv.assemble({"k": k[1:], "q": q[2:]}, 2).tolist() == [3, 4, 6, 0]
    gated = ModuleAdapters((), (("gate", 4), ("up", 4)))
    assert gated.assemble({"up": q}, 1).tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert gated.assemble({"up": q[:2]}, 2).tolist() == [0, 0, 1, 2]


def rewriting() -> tuple[bool, bool, str]:
    """Whether an empty plan returns the spec, whether a plan leaves it as it was, and what an unknown name gives."""
    spec = block_spec(MODEL, configuration(), None)
    linear = spec.layer_specs[0].submodules.self_attention.submodules.linear_qkv
    changed = with_adapters(spec, {PARTS[0]: subclass})
    kept = spec.layer_specs[0].submodules.self_attention.submodules.linear_qkv is linear
    new = changed.layer_specs[0].submodules.self_attention.submodules.linear_qkv
    with pytest.raises(KeyError) as caught:
        with_adapters(spec, {"self_attention.linear_qvk": subclass})
    return with_adapters(spec, {}) is spec, kept and issubclass(new, linear) and new is not linear, str(caught.value)


def test_a_rewrite_is_pure_and_knows_its_names(pool: GlooPool) -> None:
    ((identity, pure, message),) = pool.run(1, rewriting)
    assert identity
    assert pure
    assert "no layer has a part self_attention.linear_qvk" in message


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 8.0)], ids=["LoRA", "rsLoRA"])
def test_every_module_is_built_with_the_scale_of_its_rank(use_rslora: bool, scale: float) -> None:
    """alpha / rank, of rsLoRA alpha / sqrt(rank): 16 / 4 and 16 / 2."""
    adapters = LoraConfig(targets=[LoraTarget(match=["*"], rank=4, alpha=16.0)], use_rslora=use_rslora)
    plan = adapter_plan(tiny_model(moe=True), adapters)
    pairs = [pair for make in plan.values() for _, pair in make.args[0].pairs]
    assert len({pair.projection for pair in pairs}) >= 7
    assert {pair.scale for pair in pairs} == {scale}
