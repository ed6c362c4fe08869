"""What the parity grid is made of: layouts by short names, adapters, and how far two layouts may be apart."""

from dataclasses import dataclass

from megatron_ext.config import LoraConfig, LoraTarget, ParallelConfig

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


DENSE = [
    layout("DP2", 2),
    layout("TP2", 2, tp=2),
    layout("TP2 SP", 2, tp=2, sp=True),
    layout("PP2", 2, pp=2),
    layout("PP2 VPP2", 2, pp=2, vpp=2),
    layout("TP2 SP PP2 DP2", 8, tp=2, sp=True, pp=2),
    layout("CP2", 2, cp=2),
    layout("CP4", 4, cp=4),
    layout("CP2 DP2", 4, cp=2),
    layout("TP2 CP2", 4, tp=2, cp=2),
    layout("TP2 SP CP2", 4, tp=2, sp=True, cp=2),
    layout("CP2 PP2", 4, cp=2, pp=2),
]
MOE = [
    layout("DP2", 2),
    layout("TP2 SP ETP2", 2, tp=2, sp=True),
    layout("PP2", 2, pp=2),
    layout("PP2 VPP2", 2, pp=2, vpp=2),
    layout("EP2 all-to-all", 2, ep=2),
    layout("EP2 all-gather", 2, ep=2, dispatch="allgather"),
    layout("EP2 ETP2", 4, tp=2, sp=True, ep=2, etp=2, dispatch="allgather"),
    layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1),
    layout("TP2 SP EP2 ETP2", 4, tp=2, sp=True, ep=2, etp=2),
    layout("PP2 EP2", 4, pp=2, ep=2),
    layout("PP2 VPP2 EP2", 4, pp=2, vpp=2, ep=2),
    layout("TP2 SP PP2 EP2 ETP1", 8, tp=2, sp=True, pp=2, ep=2, etp=1),
    layout("TP2 SP PP2 EP2 ETP2", 8, tp=2, sp=True, pp=2, ep=2, etp=2),
    layout("CP2", 2, cp=2),
    layout("CP2 EP2", 2, cp=2, ep=2),
    layout("CP2 EP2 DP2", 4, cp=2, ep=2),
    layout("TP2 SP CP2 EP2 ETP1", 4, tp=2, sp=True, cp=2, ep=2, etp=1),
    layout("TP2 SP CP2 PP2 EP2 ETP2", 8, tp=2, sp=True, cp=2, pp=2, ep=2, etp=2),
    layout("CP2 PP2 VPP2", 4, cp=2, pp=2, vpp=2),
]
ADAPTERS = LoraConfig(
    targets=[
        LoraTarget(match=["q", "down"], rank=2, alpha=8.0),
        LoraTarget(match=["layers.*", "embedding.*", "output_layer"], rank=4, alpha=8.0),
    ],
    lr_ratio=4.0,
)
