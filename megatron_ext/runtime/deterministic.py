"""The same bits from the same run: what torch, cuBLAS, NCCL and Transformer Engine must be told for it."""

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_ext.errors import EnvironmentFault

_NEEDED = {
    # cuBLAS splits products over streams by what workspace it finds.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NVLS adds up inside the switch, in the order of arrival; the others in a fixed order.
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Variables of the environment with the values that are possible; the first is the one to take."""


def compute_deterministically(device: torch.device) -> None:
    """Have everything from now on computed in a fixed order; before the first product on CUDA, and before NCCL starts.

    Raises:
        EnvironmentFault: a variable is set to something under which that cannot be.
    """
    torch.use_deterministic_algorithms(mode=True)
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = False
    for name, values in _NEEDED.items():
        if (value := os.environ.setdefault(name, values[0])) not in values:
            raise EnvironmentFault(
                f"runtime.deterministic = True: {name} = {value!r} leaves the order of sums open; unset it, or set one "
                f"of {', '.join(values)}"
            )


@contextlib.contextmanager
def naming_what_is_not() -> Iterator[None]:
    """Say in one message which operation cannot be computed in a fixed order.

    Raises:
        EnvironmentFault: one inside has no such kernel.
    """
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        operation = str(error).partition(" does not have")[0]
        raise EnvironmentFault(
            f"runtime.deterministic = True: {operation} has no kernel on this device that adds up in a fixed order; "
            "set runtime.deterministic: false, or train without what needs it"
        ) from error
