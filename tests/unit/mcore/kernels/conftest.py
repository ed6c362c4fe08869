"""Our Triton kernels, run by Triton's interpreter on CPU tensors; where there is a GPU, compiled for it."""

import pytest
import torch

from megatron_ext.testing.triton_interpreter import round_to_nearest, why_not_interpreting


@pytest.fixture(scope="session")
def where() -> torch.device:
    """Where the kernels run."""
    if torch.cuda.is_available() and why_not_interpreting() is not None:
        pytest.importorskip("triton")
        return torch.device("cuda")
    if (missing := why_not_interpreting()) is not None:
        pytest.skip(missing)
    round_to_nearest()
    return torch.device("cpu")
