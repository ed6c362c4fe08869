"""Deterministic mode: what stands against it is named."""

from collections.abc import Iterator

import pytest
import torch

from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime.deterministic import compute_deterministically, naming_what_is_not


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(mode=False)


def test_cuda_gets_the_variables_and_keeps_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("NCCL_ALGO", "Ring")
    compute_deterministically(torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")


def test_a_variable_under_which_it_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(EnvironmentFault, match=r"runtime.deterministic = True: NCCL_ALGO = 'NVLS' .*unset it"):
        compute_deterministically(torch.device("cuda"))


def test_an_operation_without_a_fixed_order_is_named() -> None:
    compute_deterministically(torch.device("cpu"))
    pooled, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    named = r"runtime.deterministic = True: max_unpooling2d\S* has no kernel"
    with pytest.raises(EnvironmentFault, match=named), naming_what_is_not():
        torch.nn.functional.max_unpool2d(pooled, places, 2)
    with pytest.raises(RuntimeError, match="something else"), naming_what_is_not():
        raise RuntimeError("something else")
