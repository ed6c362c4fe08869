"""Shared experts whose linear layers have biases; megatron-core's refuse them."""

from copy import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.mcore.feed_forward import SharedExperts


class BiasedSharedExperts(SharedExperts):
    """Ours with a bias in both linear layers, inside the gate where there is one."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        without_biases = copy(config)
        without_biases.add_bias_linear = False
        super().__init__(without_biases, submodules, gate, pg_collection=pg_collection, **kwargs)
        width = self.config.ffn_hidden_size
        shared: dict[str, Any] = {
            "config": self.config,
            "bias": True,
            "skip_bias_add": True,
            "is_expert": False,
            "tp_group": pg_collection.tp,
        }
        gated = self.config.gated_linear_unit
        self.linear_fc1 = submodules.linear_fc1(
            self.config.hidden_size,
            2 * width if gated else width,
            init_method=self.config.init_method,
            gather_output=False,
            stride=2 if gated else 1,
            tp_comm_buffer_name="fc1",
            **shared,
        )
        self.linear_fc2 = submodules.linear_fc2(
            width,
            self.config.hidden_size,
            init_method=self.config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="fc2",
            **shared,
        )
