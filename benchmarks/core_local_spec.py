"""megatron-core as a peer: a model of its own local layers (SequentialMLP, its router) in place of ours."""

import importlib
from typing import Any

import torch

from megatron_ext.config import ModelConfig
from megatron_ext.mcore.build import Trainable, make_trainable
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import seed_everything


def build_core_trainable(cell: Cell, groups: Groups, device: torch.device, length: int) -> Trainable:
    """Return what `mcore.build.build_trainable` would, of megatron-core's local spec. For good in this process.

    Args:
        length: of the sequences; its local attention needs a mask [length, length] of its own.
    """
    from megatron_ext.mcore import model as our_model

    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")  # after ours, which prepares for it
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # its router dies of this without Transformer Engine (0.16)
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")

    def block_spec(model: ModelConfig, config: Any, vp_stage: int | None) -> Any:
        block = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        for layer, is_moe in zip(block.layer_specs, model.moe_layer_pattern, strict=True):
            names = layer.submodules.sharded_state_dict_keys_map
            if is_moe:  # it has the norm saved with a linear layer that such a layer has not
                names = {ours: theirs for ours, theirs in names.items() if ours != "pre_mlp_layernorm."}
            layer.submodules.sharded_state_dict_keys_map = names
        return block

    our_model.block_spec = block_spec
    model, parallel = cell.model, cell.parallel
    seed_everything(cell.seed)
    config: Any = transformer_config(model, parallel, cell.precision, cell.recompute)
    # Ours read none of these: the router and the experts are other modules there.
    config.moe_grouped_gemm = False
    config.moe_router_pre_softmax = model.moe_router_pre_softmax
    config.moe_router_topk_scaling_factor = model.moe_router_topk_scaling_factor
    config.moe_router_load_balancing_type = model.moe_router_load_balancing_type
    config.moe_aux_loss_coeff = model.moe_aux_loss_coeff
    chunks = our_model.build_chunks(model, parallel, config, device)
    future = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    chunks[0].register_forward_pre_hook(lambda module, inputs: (*inputs[:2], future, *inputs[3:]))
    initialize_weights(model, list(chunks), cell.seed)
    return make_trainable(cell, groups, config, chunks)
