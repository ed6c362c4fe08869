"""Memory of the training state of one rank: weights, gradients and optimizer, without activations."""

import math
import re
from dataclasses import dataclass

from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.config import Layout, ModelConfig, Precision, RunConfig

# Layers split by output split their biases too; those split by input, and projections to a latent vector, do not.
_SPLIT_OVER_TP = re.compile(
    r"(linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(weight|bias)$"
    r"|(linear_proj|linear_fc2|word_embeddings|output_layer)\.weight$"
)


@dataclass(frozen=True)
class StateMemory:
    """The fullest rank's share."""

    parameters: int
    bytes: int


def state_memory(run: RunConfig, layout: Layout) -> StateMemory:
    """Parameters and bytes of state on the rank that holds most.

    A parameter takes 4 (fp32) or 2 (bf16) bytes and its gradient 4. Adam's two moments (and in bf16 the fp32 master
    weight) take 8 (12) bytes, split by the distributed optimizer over the ranks that have the same
    weights: data-parallel x context-parallel ones, and for experts those of the expert grid.
    """
    stages = [_stage(run.model, layout, stage) for stage in range(layout.pp)]
    weight, state = (4, 8) if run.precision.kind == "fp32" else (2, 12)
    dense_share = layout.dp * layout.cp if run.parallel.use_distributed_optimizer else 1
    expert_share = layout.edp if run.parallel.use_distributed_optimizer else 1

    def size(dense: int, expert: int) -> int:
        held = (dense + expert) * (weight + 4)
        return held + math.ceil(dense / dense_share) * state + math.ceil(expert / expert_share) * state

    dense, expert = max(stages, key=lambda parts: size(*parts))
    return StateMemory(dense + expert, size(dense, expert))


def _stage(model: ModelConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """Dense and expert parameters that a rank of pipeline stage `stage` holds."""
    dense = expert = 0
    for name, shape in model_shapes(model).items():
        if stage not in _stages_of(name, model, layout.pp):
            continue
        count = math.prod(shape)
        if ".mlp.experts." in name:
            expert += count // (layout.ep * layout.etp)
        else:
            dense += count // (layout.tp if _is_split(name, model) else 1)
    return dense, expert


def _is_split(name: str, model: ModelConfig) -> bool:
    """Whether each rank of a TP group holds a part of the tensor, and not the whole."""
    over_projection = model.qk_layernorm == "projection" and name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
    return over_projection or _SPLIT_OVER_TP.search(name) is not None


def _stages_of(name: str, model: ModelConfig, pp: int) -> tuple[int, ...]:
    """The pipeline stages that hold a tensor. With chunks a stage has the same number of layers, others than here."""
    if name.startswith("decoder.layers."):
        return (int(name.split(".")[2]) * pp // model.num_layers,)
    if name.startswith("embedding.position_embeddings"):
        return (0,)
    if name.startswith("embedding."):
        tied = not model.untie_embeddings_and_output_weights
        return (0, pp - 1) if tied and pp > 1 else (0,)
    return (pp - 1,)


def checkpoint_bytes(model: ModelConfig, precision: Precision) -> int:
    """Bytes of a checkpoint's tensors: weights, and in fp32 the optimizer's own weights and Adam's two moments."""
    parameters = sum(math.prod(shape) for shape in model_shapes(model).values())
    return parameters * ((4 if precision.kind == "fp32" else 2) + 12)
