"""Logits of a checkpoint on given tokens: megatron-core's own forward pass, and transformers', each in one process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.architectures.registry import ARCHITECTURES
from megatron_ext.checkpoint.store import load_boxes, require_checkpoint
from megatron_ext.config import Fp32Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.conversion.checkpoint_model import read_model
from megatron_ext.conversion.export import shipped_code
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.files import read_json_object
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import model_boxes
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import end_process_groups, split_process_group, start_process_group
from megatron_ext.runtime.seeds import seed_everything


@torch.no_grad()
def megatron_logits(
    checkpoint: str | Path, batches: Sequence[Tensor], *, weights_as: torch.dtype | None = None
) -> list[Tensor]:
    """fp32 logits [B, S, vocab] of a Megatron checkpoint for each batch of token ids [B, S], on the CPU.

    With `weights_as` its weights are rounded to that dtype before, and then computed with in fp32 all the same.
    Starts a process group of one and leaves it again; call it where none is running.
    """
    model, parallel, runtime = read_model(checkpoint), ParallelConfig(), RuntimeConfig(device="cpu")
    # Overrides for training may ask for what one process cannot do, such as a first pipeline stage with fewer layers.
    model = replace(model, transformer_overrides=model.function_overrides)
    assert not dist.is_initialized(), "logits are computed in a process of their own"
    device = choose_device(runtime)
    start_process_group(runtime, device, alone=True)
    try:
        split_process_group(parallel, runtime)
        seed_everything(0)
        config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
        chunks = build_chunks(model, parallel, config, device)
        load_boxes(require_checkpoint(checkpoint), model_boxes(list(chunks)))
        (network,) = chunks
        _round_weights(network, weights_as)
        network.eval()
        results = []
        for tokens in batches:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            results.append(network(tokens, positions, None)[..., : model.vocab_size].float())
        return results
    finally:
        end_process_groups()


@torch.no_grad()
def hugging_face_logits(
    directory: str | Path,
    batches: Sequence[Tensor],
    *,
    trust_remote_code: bool = False,
    weights_as: torch.dtype | None = None,
) -> list[Tensor]:
    """fp32 logits of a Hugging Face directory, as transformers' AutoModelForCausalLM computes them."""
    network = load_hugging_face(directory, trust_remote_code=trust_remote_code)
    _round_weights(network, weights_as)
    return [network(tokens).logits.float() for tokens in batches]


def _round_weights(network: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Round weights to `dtype` and keep them in fp32. Buffers, such as an expert bias, keep their precision."""
    if dtype is not None:
        for weight in network.parameters():
            weight.copy_(weight.to(dtype))


def load_hugging_face(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' model of `directory`, in fp32.

    Modelling code inside the directory is run if the caller trusts it, or if it is byte for byte what this framework
    ships.
    """
    from transformers import AutoModelForCausalLM  # slow to import

    trusted = may_run_code(directory, trust_remote_code=trust_remote_code)
    network = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        trust_remote_code=trusted,
        # Expert after expert: transformers' grouped kernels refuse rows that are no multiple of 16 bytes.
        experts_implementation="eager",
    )
    return network.eval()


def may_run_code(directory: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Whether modelling code inside `directory` may be run; ConversionError where it would have to be and may not."""
    trusted = trust_remote_code or carries_our_code(directory)
    if not trusted and "auto_map" in read_json_object(Path(directory) / "config.json", ConversionError):
        raise ConversionError(f"{directory}: brings its own modelling code; pass --trust-remote-code to run it")
    return trusted


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' tokenizer of `directory`. An export of ours brings none of its own code, so none is run unasked.

    Raises:
        DataError: there is none that transformers can use.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{directory}: no tokenizer here that transformers can use ({reason})") from error


def carries_our_code(directory: str | Path) -> bool:
    """Whether the code that config.json names is what this framework ships, unchanged and with nothing beside it."""
    directory = Path(directory)
    named = read_json_object(directory / "config.json", ConversionError).get("auto_map")
    ours = next((a for a in ARCHITECTURES if a.code and named == dict(a.auto_map)), None)
    if ours is None:
        return False
    # transformers runs code of some subfolders unasked; an export has none. Hidden ones are download tools' own.
    if any(path.is_dir() and not path.name.startswith(".") for path in directory.iterdir()):
        return False
    files = sorted(path.name for path in directory.glob("*.py"))
    return files == sorted(ours.code) and all((directory / name).read_text() == shipped_code(name) for name in files)
