"""What runs on CUDA alone, forward and backward, on tensors of torch's device `meta`, which hold no numbers.

Shapes, dtypes and choices of kernels are those of a GPU; and a tensor without numbers cannot be read: whatever would
have the host wait for the device (`item`, `tolist`, `nonzero`, a mask as an index) raises. (Fake tensors that say they
are on CUDA are of no use to a torch without CUDA: a slice of one raises, a backward pass ends the process.)
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore import attention_segments, cross_entropy
from megatron_ext.mcore.fp8.kept_weights import keeping_scalings
from megatron_ext.mcore.model import build_chunks, routers
from megatron_ext.mcore.optimizer import clip_and_step, gradient_norm
from megatron_ext.mcore.rotary import RotaryEmbedding
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, build_cell
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

META = torch.device("meta")
BF16 = Bf16Precision(kind="bf16")
LATENT = MultiLatentAttention(q_lora_rank=32, kv_lora_rank=32, qk_head_dim=16, qk_pos_emb_head_dim=16, v_head_dim=16)
DOCUMENTS = torch.tensor([[10, 22], [32, 0]])
DENSE, MOE = tiny_model(num_layers=1), tiny_model(moe=True, num_layers=2)


def fp8(recipe: str, **fields: Any) -> Fp8Precision:
    return Fp8Precision(kind="fp8", recipe=recipe, **fields)  # type: ignore[arg-type]


FILLED: dict[str, Any] = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
# A capacity that is not filled up is not among them: how many rows stay is asked of the device once a layer.
MODELS: dict[str, tuple[ModelConfig, Precision, Tensor | None]] = {
    "dense": (DENSE, BF16, None),
    "MoE": (MOE, BF16, None),
    "MoE with biases": (tiny_model(moe=True, num_layers=2, add_bias_linear=True), BF16, None),
    "MoE of odd widths": (tiny_model(moe=True, num_layers=2, moe_ffn_hidden_size=41), BF16, None),
    "MoE, filled up": (tiny_model(moe=True, num_layers=2, add_bias_linear=True, **FILLED), BF16, None),
    "MoE, filled up, fp8": (tiny_model(moe=True, num_layers=2, **FILLED), fp8("rowwise"), None),
    "documents": (DENSE, BF16, DOCUMENTS),
    "window": (tiny_model(num_layers=1, sliding_window=8), BF16, None),
    "window, sinks": (tiny_model(num_layers=1, sliding_window=8, attention_sinks=True), BF16, DOCUMENTS),
    "latent": (tiny_model(num_layers=1, num_query_groups=None, multi_latent_attention=LATENT), BF16, None),
    **{f"MoE, fp8 {recipe}": (MOE, fp8(recipe), None) for recipe in ("tensorwise", "rowwise", "delayed")},
    "MoE, fp8 but for weight gradients": (MOE, fp8("tensorwise", fp8_wgrad=False), None),
}


LOSS_BY_PARTS = ("documents", "latent")


def scaled_grouped_shape(a: Tensor, b: Tensor, *unused: Any, offs: Tensor | None = None, **options: Any) -> Tensor:
    """What torch does not say of its kernel: rows of experts, or of each expert the product over its own rows."""
    offs = offs if offs is not None else next(x for x in unused if isinstance(x, Tensor) and x.dtype == torch.int32)
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[1])
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def segment_shape(data: Tensor, reduce: str, *, lengths: Tensor, **options: Any) -> Tensor:
    return data.new_empty(len(lengths), *data.shape[1:])


@contextmanager
def meta_is_a_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Have tensors without numbers count as a GPU's."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device == META), raising=False)
        patch.setitem(cross_entropy.BLOCK, "meta", cross_entropy.BLOCK["cuda"])
        # A step sets it on its device; what trained in this process before has left one on the CPU.
        patch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1, device=META))
        for name, shape in (("_scaled_grouped_mm_v2", scaled_grouped_shape), ("segment_reduce", segment_shape)):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
                library.impl(name, shape)
        try:
            yield
        finally:
            library._destroy()


def trained(capability: tuple[int, int]) -> dict[str, Any]:
    """Of each model its losses' shape and which weights got a gradient of another shape or none; or what went wrong."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    found: dict[str, Any] = {}
    for name, (model, precision, documents) in MODELS.items():
        config = transformer_config(model, ParallelConfig(), precision, RecomputeConfig(logits=name in LOSS_BY_PARTS))
        (chunk,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
        chunk.bfloat16().to(META)
        for module in chunk.modules():
            if isinstance(module, RotaryEmbedding):
                module.device = META
        for router in routers([chunk]):
            router.begin_step()
        for scaling in keeping_scalings([chunk]):
            scaling.open_step()
        tokens = torch.zeros(2, 32, dtype=torch.int64, device=META)
        try:
            with meta_is_a_gpu(capability):
                losses = chunk(tokens, tokens, documents, labels=tokens)
                losses.sum().backward()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        weights = chunk.named_parameters()
        wrong = [key for key, weight in weights if weight.grad is None or weight.grad.shape != weight.shape]
        found[name] = (tuple(losses.shape), losses.dtype, wrong)
    return found


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)], ids=["Hopper", "Blackwell"])
def test_forward_and_backward_never_wait_for_the_device(capability: tuple[int, int], pool: GlooPool) -> None:
    (found,) = pool.run(1, trained, capability)
    assert found == {name: ((2, 32), torch.float32, []) for name in MODELS}


def test_a_trace_sees_waits() -> None:
    x = torch.empty(3, device=META)
    for wait in (lambda: float(x.sum()), x.tolist, lambda: x[x > 0], x.nonzero, x.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


class Waits(TorchDispatchMode):
    """Counts operations that read a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += function in (torch.ops.aten._local_scalar_dense.default,)
        return function(*args, **(kwargs or {}))


def waits_of_an_update() -> int:
    """Numbers read from the device by gradient norm, clipping and Adam, of all parameters of a model."""
    trainable, _ = build_cell(Cell(tiny_model(moe=True), ParallelConfig(), BF16))
    for chunk in trainable.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1e-3)
    with Waits() as waits:
        clip_and_step(trainable.optimizer, gradient_norm(trainable.optimizer), max_norm=1.0)
    trainable.release()
    return waits.counts.total()


def test_an_update_waits_once(pool: GlooPool) -> None:
    """For the gradient norm, which decides whether there is one."""
    assert pool.run(1, waits_of_an_update) == [1]


def test_documents_are_one_call_on_a_gpu() -> None:
    """torch's kernel for them is used, whichever of its versions this is."""
    assert attention_segments._VARLEN_IS_COMPLETE
    heads = torch.empty(64, 4, 16, dtype=torch.bfloat16, device=META)
    with meta_is_a_gpu((9, 0)):
        assert attention_segments._has_kernel(heads, heads)
        assert not attention_segments._has_kernel(heads.float(), heads.float())
    with meta_is_a_gpu((7, 5)):
        assert not attention_segments._has_kernel(heads, heads)
