"""Dense peaks of GPUs by their names, against which model FLOPs utilisation is measured."""

from megatron_ext.config import Precision

_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500),  # NVIDIA, GB300 NVL72: 5,000 with sparsity
    ("GB200", 2500),  # NVIDIA, GB200 NVL72: 5,000 with sparsity
    ("B300", 2250),  # NVIDIA, HGX B300: 36 PFLOP/s with sparsity on 8 GPUs
    ("B200", 2250),  # NVIDIA, HGX B200: 36 PFLOP/s with sparsity on 8 GPUs
    ("GH200", 989.5),  # NVIDIA, GH200 datasheet: 1,979 with sparsity
    ("H200 NVL", 835.5),  # NVIDIA, H200 datasheet: 1,671 with sparsity
    ("H200", 989.5),  # the same: 1,979 with sparsity
    ("H100 PCIe", 756),  # NVIDIA, H100 datasheet: 1,513 with sparsity
    ("H100 NVL", 835.5),  # the same: 1,671 with sparsity
    ("H100", 989.5),  # the same, SXM: 1,979 with sparsity
    ("H800 PCIe", 756),  # as the H100 PCIe
    ("H800", 989.5),  # as the H100
    ("H20", 148),  # NVIDIA, H20
    ("A100", 312),  # NVIDIA, A100 datasheet
    ("A800", 312),  # as the A100
    ("L40S", 362),  # NVIDIA, L40S datasheet: 733 with sparsity
    ("L40", 181),  # NVIDIA, L40 datasheet
    ("L4", 121),  # NVIDIA, L4 datasheet: 242 with sparsity
    ("A40", 149.7),  # NVIDIA, A40 datasheet
    ("A10", 125),  # NVIDIA, A10 datasheet
    ("RTX A6000", 154.8),  # NVIDIA, RTX A6000: 309.7 with sparsity
    ("MI355X", 2300),  # AMD, MI355X datasheet
    ("MI325X", 1307.4),  # AMD, MI325X datasheet
    ("MI300X", 1307.4),  # AMD, MI300X datasheet
    ("MI250X", 383),  # AMD, MI250X datasheet: both dies
)
"""Part of a device's name, special ones before general ones, and its dense bf16 peak in TFLOP/s."""


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """The dense bf16 peak of a device in TFLOP/s; None where it is not known, and for fp32.

    Training in fp8 is measured against the bf16 peak too, so that the figures of both can be compared.
    """
    if precision.kind == "fp32":
        return None
    words = device_name.replace("-", " ").split()
    for name, peak in _BF16_TFLOPS:
        wanted = name.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            return peak
    return None
