"""The models that benchmarks/train_step.py compares: ours, megatron-core's own layers, and Transformers' Qwen2-MoE."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from interleaving import Step

Weights = Literal["fp32", "bf16", "amp"]
"""fp32; bf16 weights, gradients and optimizer; fp32 weights computed in bf16 under autocast."""


@dataclass(frozen=True)
class Size:
    """Shape of the model and of one global batch."""

    hidden: int = 256
    layers: int = 8
    heads: int = 8
    query_groups: int = 4
    experts: int = 16
    topk: int = 2
    expert_width: int = 256
    shared_width: int = 256
    vocabulary: int = 8192
    length: int = 512
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.length * self.batch

    def products(self) -> list[tuple[int, int, int, int]]:
        """The matrix products of one forward pass: (rows, columns, inner width, how many)."""
        heads_width = self.hidden + 2 * self.hidden * self.query_groups // self.heads
        rows = self.tokens * self.topk // self.experts
        return [
            (self.tokens, heads_width, self.hidden, self.layers),
            (self.tokens, self.hidden, self.hidden, self.layers),
            (self.tokens, 2 * self.shared_width, self.hidden, self.layers),
            (self.tokens, self.hidden, self.shared_width, self.layers),
            (rows, 2 * self.expert_width, self.hidden, self.layers * self.experts),
            (rows, self.hidden, self.expert_width, self.layers * self.experts),
            (self.tokens, self.vocabulary, self.hidden, 1),
        ]


TINY = Size(
    hidden=64, layers=2, heads=4, query_groups=2, experts=4, expert_width=32, shared_width=32, vocabulary=256, length=32
)


def megatron_ext(size: Size, precision: Literal["fp32", "bf16"], threads: int) -> Step:
    """One training step of our torch backend, as the training loop runs it."""
    return _megatron(size, precision, threads, core=False)


def megatron_core(size: Size, precision: Literal["fp32", "bf16"], threads: int) -> Step:
    """The same step with the layers of megatron-core's local spec (SequentialMLP), let run on CPU by our cpu_compat."""
    return _megatron(size, precision, threads, core=True)


def _megatron(size: Size, precision: Literal["fp32", "bf16"], threads: int, *, core: bool) -> Step:
    import torch
    from core_local_spec import build_core_trainable

    from megatron_ext.config import ParallelConfig, RuntimeConfig
    from megatron_ext.config.training import Bf16Precision, Fp32Precision
    from megatron_ext.mcore.build import build_trainable
    from megatron_ext.mcore.optimizer import set_learning_rate
    from megatron_ext.proving.parity import Cell
    from megatron_ext.runtime.cpu_memory import keep_freed_memory
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.runtime.process_groups import split_process_group, start_process_group
    from megatron_ext.testing.tiny import random_batch
    from megatron_ext.training.step import train_step
    from megatron_ext.training.tasks.pretrain import Pretrain

    runtime, parallel = RuntimeConfig(device="cpu", threads=threads), ParallelConfig()
    device = choose_device(runtime)
    keep_freed_memory()
    start_process_group(runtime, device, alone=True)
    groups = split_process_group(parallel, runtime)
    kind = Fp32Precision(kind="fp32") if precision == "fp32" else Bf16Precision(kind="bf16")
    cell = Cell(_model_config(size), parallel, kind, seed=0, lr=1e-4)
    build = partial(build_core_trainable, length=size.length) if core else build_trainable
    trainable = build(cell, groups, device)
    _check_size(size, sum(p.numel() for p in trainable.chunks[0].parameters()))
    set_learning_rate(trainable.optimizer, cell.lr)
    batch = random_batch(
        0,
        samples=size.batch,
        micro_batch=size.batch,
        dp_rank=0,
        dp_size=1,
        vocabulary=size.vocabulary,
        length=size.length,
    )
    batch[0].loss_mask.fill_(1.0)
    assert torch.get_num_threads() == threads
    return lambda: float(train_step(trainable, Pretrain(), batch, groups, max_norm=1.0).loss)


def _model_config(size: Size) -> Any:
    from megatron_ext.config import ModelConfig

    return ModelConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.expert_width,
        num_attention_heads=size.heads,
        num_query_groups=size.query_groups,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        num_moe_experts=size.experts,
        moe_router_topk=size.topk,
        moe_ffn_hidden_size=size.expert_width,
        moe_shared_expert_intermediate_size=size.shared_width,
        moe_router_load_balancing_type="none",
    )


def transformers_qwen2_moe(size: Size, experts: str, weights: Weights, threads: int) -> Step:
    """A plain loop over Transformers' Qwen2-MoE: loss, backward, gradient clipping, torch's fused AdamW."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.query_groups,
        num_experts=size.experts,
        num_experts_per_tok=size.topk,
        moe_intermediate_size=size.expert_width,
        shared_expert_intermediate_size=size.shared_width,
        norm_topk_prob=True,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        qkv_bias=False,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    model = Qwen2MoeForCausalLM(config)
    for block in (m for m in model.modules() if isinstance(m, Qwen2MoeSparseMoeBlock)):
        del block.shared_expert_gate
        block.forward = _ungated.__get__(block)  # type: ignore[method-assign]
    _check_size(size, sum(p.numel() for p in model.parameters()))
    model.to(torch.bfloat16 if weights == "bf16" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, size.vocabulary, (size.batch, size.length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == "amp"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _ungated(block: Any, hidden: Any) -> Any:
    """Qwen2-MoE's block without the sigmoid gate on its shared expert: less work for the peer, and the same for all."""
    tokens = hidden.view(-1, hidden.shape[-1])
    _, weights, selected = block.gate(tokens)
    output = block.experts(tokens, selected, weights) + block.shared_expert(tokens)
    return output.view_as(hidden)


def _check_size(size: Size, parameters: int) -> None:
    """Every peer trains a model with exactly these parameters."""
    attention = 2 * size.hidden**2 * (1 + size.query_groups / size.heads)
    feed_forward = 3 * size.hidden * (size.experts * size.expert_width + size.shared_width)
    layer = attention + feed_forward + size.experts * size.hidden + 2 * size.hidden
    expected = size.layers * layer + 2 * size.vocabulary * size.hidden + size.hidden
    assert parameters == expected, f"{parameters} parameters, not {expected}"
