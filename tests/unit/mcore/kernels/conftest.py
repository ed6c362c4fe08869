"""Our Triton kernels, run by Triton's interpreter on CPU tensors; where there is a GPU, compiled for it."""

import pytest
import torch

from megatron_ext.testing.triton_interpreter import mend_interpreter, why_not_interpreting


@pytest.fixture(scope="session")
def where() -> torch.device:
    """Where the kernels run."""
    if torch.cuda.is_available() and why_not_interpreting() is not None:
        pytest.importorskip("triton")
        return torch.device("cuda")
    if (missing := why_not_interpreting()) is not None:
        pytest.skip(missing)
    mend_interpreter()
    return torch.device("cpu")
