"""What a checkpoint holds, and whether two hold the same."""

from pathlib import Path

import torch

from megatron_ext.checkpoint.torch_dist import TorchDistReader


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key) for key in reader.tensors}


def assert_same_tensors(a: Path, b: Path) -> int:
    first, second = tensors_of(a), tensors_of(b)
    assert sorted(first) == sorted(second)
    different = [
        key for key in first if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])
    ]
    assert not different
    return len(first)
