"""Proof that two checkpoints are the same model: their weights bit for bit, their logits on given text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.stored import unstacked
from megatron_ext.checkpoint.safetensors import HuggingFaceSource
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.tensors import MegatronSource, TensorSource
from megatron_ext.config import ModelConfig
from megatron_ext.conversion.checkpoint_model import read_model
from megatron_ext.conversion.convert import check_hugging_face, is_hugging_face, read_hugging_face_model
from megatron_ext.conversion.engine import MEGATRON, check_source, tasks_to_megatron
from megatron_ext.conversion.logits import hugging_face_logits, megatron_logits
from megatron_ext.errors import ConversionError


@dataclass(frozen=True)
class WeightComparison:
    """Bitwise comparison after both sides were brought to canonical names."""

    tensors: int
    different: tuple[str, ...]
    """Names of tensors that are not equal bit for bit."""
    largest_difference: float


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models are apart over the same tokens."""

    tokens: int
    max_abs_difference: float
    scale: float
    """Largest absolute logit of the first model."""
    argmax_agreement: float
    """Share of positions where both models predict the same token."""
    mean_kl: float
    """Mean KL divergence from the first model's distribution, in nats."""

    @property
    def relative(self) -> float:
        """Largest difference over the logits' scale."""
        if self.max_abs_difference == 0:
            return 0.0
        if self.scale == 0 or math.isinf(self.max_abs_difference):
            return math.inf
        return self.max_abs_difference / self.scale


def compare_weights(a: str | Path, b: str | Path) -> WeightComparison:
    """Compare two checkpoints, Megatron or Hugging Face, without their vocabulary padding."""
    left, right = _Canonical(a), _Canonical(b)
    if left.names != right.names:
        only = sorted(left.names ^ right.names)
        raise ConversionError(f"{a} and {b} hold different tensors: {', '.join(only[:10])}")
    different, largest = [], 0.0
    for name in sorted(left.names):
        x, y = left.read(name), right.read(name)
        if x.shape != y.shape:
            raise ConversionError(f"{name}: {list(x.shape)} in {a}, {list(y.shape)} in {b}")
        if x.dtype != y.dtype or not torch.equal(x, y):
            different.append(name)
            largest = max(largest, _largest_difference(x.double(), y.double()))
    return WeightComparison(len(left.names), tuple(different), largest)


class _Canonical:
    """A checkpoint of either kind as canonical Megatron tensors without vocabulary padding."""

    def __init__(self, path: str | Path) -> None:
        self._tasks = {}
        self._source: TensorSource
        self.model: ModelConfig
        if is_hugging_face(path):
            architecture: Architecture
            architecture, self.model = read_hugging_face_model(path)
            self._source = unstacked(HuggingFaceSource(path), architecture, self.model)
            check_hugging_face(self._source, architecture, self.model, where=str(path))
            self._tasks = {task.writes[MEGATRON]: task for task in tasks_to_megatron(architecture.weights, self.model)}
            self.names = frozenset(self._tasks)
        else:
            self.model = read_model(path)
            self._source = MegatronSource(path)
            check_source(self._source, model_shapes(self.model), where=str(path))
            self.names = frozenset(self._source.specs)

    def read(self, name: str) -> Tensor:
        if self._tasks:
            task = self._tasks[name]
            tensor = task.make({role: self._source.read(part) for role, part in task.reads.items()})[MEGATRON]
        else:
            tensor = self._source.read(name)
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        return tensor[: self.model.vocab_size] if is_vocabulary else tensor


def _largest_difference(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number, since NaN compares as neither more nor less."""
    largest = float((x - y).abs().max())
    return math.inf if math.isnan(largest) else largest


def checkpoint_logits(path: str | Path, batches: Sequence[Tensor], *, trust_remote_code: bool = False) -> list[Tensor]:
    """fp32 logits of a checkpoint of either kind."""
    if is_hugging_face(path):
        return hugging_face_logits(path, batches, trust_remote_code=trust_remote_code)
    return megatron_logits(path, batches)


def compare_logits(a: Sequence[Tensor], b: Sequence[Tensor]) -> LogitComparison:
    """Compare logits [B, S, vocab] of two models on the same batches."""
    largest = scale = agree = divergence = 0.0
    tokens = 0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            raise ConversionError(f"logits are {list(x.shape)} and {list(y.shape)}: not the same vocabulary")
        tokens += x.shape[:-1].numel()
        largest = max(largest, _largest_difference(x, y))
        scale = max(scale, float(x.abs().max()))
        agree += float((x.argmax(-1) == y.argmax(-1)).sum())
        log_p, log_q = F.log_softmax(x.double(), -1), F.log_softmax(y.double(), -1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return LogitComparison(tokens, largest, scale, agree / tokens, divergence / tokens)
