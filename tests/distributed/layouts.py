"""Layouts by short names, and how far two of them may be apart."""

from dataclasses import dataclass

from megatron_ext.config import (
    ParallelConfig,
)

# fp32 rounds to 6e-8. Splitting a matrix product or a batch changes the order of additions, and Adam turns a relative
# error of a gradient into the same relative error of a step; after 5 steps the largest difference seen is 7e-7. Real
# faults (a gradient reduced over the wrong group, a loss scaled wrongly) show as 1e-4 and more.
TOLERANCE = 5e-6


@dataclass(frozen=True)
class GridCase:
    name: str
    processes: int
    parallel: ParallelConfig

    @property
    def data_parallel(self) -> int:
        p = self.parallel
        return self.processes // (
            p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        )


def layout(name: str, processes: int, **degrees: object) -> GridCase:
    short = {
        "tp": "tensor_model_parallel_size",
        "sp": "sequence_parallel",
        "cp": "context_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "dispatch": "moe_token_dispatcher_type",
    }
    return GridCase(name, processes, ParallelConfig(**{short[key]: value for key, value in degrees.items()}))
