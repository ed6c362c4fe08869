"""The code under test computed in float64: rounding shrinks by nine orders of magnitude, a fault stays what it is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch

from megatron_ext.mcore import optimizer, products, transformer_config


@contextmanager
def in_double_precision() -> Iterator[None]:
    """Whatever asks for fp32 gets float64: tables of dtypes, those that code names, and `Tensor.float()`.

    ZeRO's shards are fp32 views: without `use_distributed_optimizer`.
    """
    double = torch.float64
    with ExitStack() as stack:
        for table in (transformer_config.DTYPES, optimizer._MOMENT_DTYPES):
            stack.enter_context(mock.patch.dict(table, fp32=double))
        for name in ("float32", "float"):
            stack.enter_context(mock.patch.object(torch, name, double))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        # oneDNN has no float64.
        stack.enter_context(mock.patch.object(products, "by_onednn", return_value=False))
        # megatron-core's defaults were read when it was imported, and it compares them with what torch calls float32.
        defaults = dict.fromkeys(("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), double)
        settings = partial(optimizer.OptimizerConfig, **defaults)
        stack.enter_context(mock.patch.object(optimizer, "OptimizerConfig", settings))
        usual = torch.get_default_dtype()
        torch.set_default_dtype(double)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
