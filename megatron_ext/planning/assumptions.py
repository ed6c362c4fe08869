"""What a plan takes for granted of GPUs, links and kernels: stated with every plan, changed by a small YAML."""

from dataclasses import replace
from typing import Any

from pydantic import Field

from megatron_ext.config import dump_yaml, load_config, read_yaml, to_mapping
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError


@config
class Assumptions:
    """Of one kind of GPU in one kind of cluster. Rates are what is reached, not what is printed on the box."""

    name: str = "h100"
    """For people."""
    peak_tflops: float = Field(default=989.5, gt=0)
    """Dense bf16 products at most."""
    memory_gib: float = Field(default=79.6, gt=0)
    """Of one GPU, as its driver says."""
    memory_tb_s: float = Field(default=2.7, gt=0)
    """Terabytes a second that elementwise kernels move: 80% of the data sheet."""
    gpus_per_node: int = Field(default=8, ge=1)
    """That fast links join."""
    node_gb_s: float = Field(default=340.0, gt=0)
    """Gigabytes a second that a GPU sends to others of its node: 75% of NVLink's one direction."""
    network_gb_s: float = Field(default=40.0, gt=0)
    """The same to other nodes: 80% of a network card of 400 Gb/s a GPU."""
    host_gb_s: float = Field(default=50.0, gt=0)
    """The same between a GPU and its host's memory: 80% of PCIe 5.0 with 16 lanes."""
    products: float = Field(default=0.75, gt=0, le=1)
    """Share of the peak of the products of dense layers: 745 TFLOP/s for 8192^3 on an H100 (benchmarks/RESULTS.md)."""
    grouped_products: float = Field(default=0.60, gt=0, le=1)
    """Of routed experts: 595 TFLOP/s of 64 experts (the same)."""
    attention: float = Field(default=0.255, gt=0, le=1)
    """Of attention, forward and backward: 3.81 ms for 2 x 4096 tokens of 32 heads of 128 (the same)."""
    traffic: float = Field(default=1.0, ge=0)
    """Elementwise memory traffic, in that of the torch backend; Transformer Engine's fused kernels need about half."""
    expert_launch_us: float = Field(default=0.0, ge=0)
    """Microseconds a layer and micro-batch for each expert of a rank: 0 torch, 180 Transformer Engine, whose 64 experts
    took 467 ms a step where products and traffic are 280 (benchmarks/RESULTS.md: 4 times as many launches)."""
    slack: float = Field(default=1.1, ge=1)
    """Time of everything over the sum of what is counted: launches, waits, the router's small kernels."""
    fp8_products: float = Field(default=0.84, gt=0)
    """Speed of fp8 over bf16 of dense layers, quantising included: 0.84 torch, 1.33 Transformer Engine (the same)."""
    fp8_grouped: float = Field(default=0.38, gt=0)
    """Of routed experts: 0.38 torch, 0.60 Transformer Engine (the same)."""
    exposed_overlap: float = Field(default=0.15, ge=0, le=1)
    """Share of the data-parallel messages that is still waited for with overlap_grad_reduce, overlap_param_gather."""
    expert_imbalance: float = Field(default=1.2, ge=1)
    """Rows of the fullest expert-parallel rank over the mean."""
    reserved_gib: float = Field(default=2.0, ge=0)
    """Of the memory: the context, cuBLAS, NCCL's channels."""
    fragmentation: float = Field(default=0.05, ge=0, lt=1)
    """Of what is needed, what the allocator cannot use beside."""

    def needed(self, total: float) -> float:
        """Bytes of a GPU's memory that a step takes whose tensors need `total`."""
        return total * (1 + self.fragmentation) + self.reserved_gib * 2**30

    def fits(self, total: float) -> bool:
        """Whether they have room."""
        return self.needed(total) <= self.memory_gib * 2**30


_H100 = Assumptions()
GPUS = {
    "h100": _H100,
    # NVIDIA, H200 datasheet: 4.8 TB/s; else as the H100.
    "h200": replace(_H100, name="h200", memory_gib=140.4, memory_tb_s=3.8),
    # NVIDIA, A100 80GB datasheet: 312 TFLOP/s, 2.0 TB/s, NVLink 300 GB/s a direction, PCIe 4.0; network cards of
    # 200 Gb/s.
    "a100": replace(
        _H100,
        name="a100",
        peak_tflops=312,
        memory_gib=79.3,
        memory_tb_s=1.6,
        node_gb_s=225,
        network_gb_s=20,
        host_gb_s=25,
    ),
    # NVIDIA, HGX B200: 2.25 PFLOP/s, 8 TB/s, NVLink 900 GB/s a direction. No kernel of ours was measured on one.
    "b200": replace(
        _H100, name="b200", peak_tflops=2250, memory_gib=178.0, memory_tb_s=6.4, node_gb_s=675, network_gb_s=40
    ),
}


def assumptions_for(gpu: str, path: str | None, *, transformer_engine: bool = False) -> Assumptions:
    """Those of the GPU called `gpu`, with the keys that the YAML at `path` changes.

    Raises:
        ConfigError: there is no such GPU, or the file is not right.
    """
    if gpu.lower() not in GPUS:
        raise ConfigError(f"--gpu {gpu}: must be one of {', '.join(GPUS)}; others by --assumptions FILE.yaml")
    start = GPUS[gpu.lower()]
    if transformer_engine:
        start = replace(start, traffic=0.5, expert_launch_us=180, fp8_products=1.33, fp8_grouped=0.6)
    given: Any = read_yaml(path) if path else {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(given).__name__}")
    return load_config(Assumptions, {**to_mapping(start), **given}, source=path or f"--gpu {gpu}")


def as_yaml(assumptions: Assumptions) -> str:
    """What `assumptions_for` reads."""
    return dump_yaml(to_mapping(assumptions))
