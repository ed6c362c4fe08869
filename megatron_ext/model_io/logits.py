"""Logits of a checkpoint on given tokens: megatron-core's own forward pass, and transformers', each in one process."""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.architectures.registry import ARCHITECTURES
from megatron_ext.checkpoint.streams import TensorSource
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.files import read_json_object
from megatron_ext.foreign import is_fault, reading
from megatron_ext.model_io.huggingface.companion_files import shipped_code
from megatron_ext.model_io.network import megatron_network
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.quiet import without_loading_bars

A_MODEL = "a model that transformers computes with"
SETTLE = "a value in config.json or generation_config.json may not be what its field means"
"""The way out where transformers meets what it cannot compute with."""


def megatron_logits(
    checkpoint: str | Path, batches: Sequence[Tensor], *, weights_as: torch.dtype | None = None
) -> list[Tensor]:
    """fp32 logits [B, S, vocab] that Megatron's model computes for each batch of token ids [B, S], on the CPU.

    Of a Hugging Face directory too, its weights converted as they are read.

    With `weights_as` its weights are rounded to that dtype before, and then computed with in fp32 all the same.
    Starts a process group of one and leaves it again; call it where none is running.
    """
    opened = open_checkpoint(checkpoint)
    return stream_logits(opened.model, opened.tensors, batches, weights_as=weights_as)


@torch.no_grad()
def stream_logits(
    model: ModelConfig, tensors: TensorSource, batches: Sequence[Tensor], *, weights_as: torch.dtype | None = None
) -> list[Tensor]:
    """The same of a model that is not on disk: `model` with the canonical `tensors`."""
    with megatron_network(model, tensors) as network:
        _round_weights(network, weights_as)
        results = []
        for tokens in batches:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            results.append(network(tokens, positions, None)[..., : model.vocab_size].float())
        return results


@torch.no_grad()
def network_logits(network: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """fp32 logits [B, S, vocab] that transformers' `network` computes for each batch of token ids [B, S].

    Raises:
        ConversionError: it cannot compute with what its config.json says.
    """
    with reading(network.config.name_or_path, ConversionError, kind=A_MODEL, advice=SETTLE):
        return [network(tokens, use_cache=False).logits.float() for tokens in batches]


@torch.no_grad()
def _round_weights(network: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Round weights to `dtype` and keep them in fp32. Buffers, such as an expert bias, keep their precision."""
    if dtype is not None:
        for weight in network.parameters():
            weight.copy_(weight.to(dtype))


def load_hugging_face(
    directory: str | Path, *, trust_remote_code: bool = False, weights_as: torch.dtype | None = None
) -> Any:
    """Transformers' model of `directory`, in fp32, with its weights rounded to `weights_as` before.

    Modelling code inside the directory is run if the caller trusts it, or if it is byte for byte what this framework
    ships.

    Raises:
        ConversionError: its code may not be run, or transformers does not accept its config.json or weights.
    """
    from transformers import AutoModelForCausalLM  # slow to import
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: Any = AutoModelForCausalLM
    trusted = may_run_code(directory, trust_remote_code=trust_remote_code)
    named = read_json_object(Path(directory) / "config.json", ConversionError).get("auto_map") or {}
    if trusted and is_ours(directory) and "AutoModelForCausalLM" in named:
        # In a process that has read such a model before, AutoModel takes that one's code, whatever `directory` holds.
        kind = get_class_from_dynamic_module(named["AutoModelForCausalLM"], directory)
    try:
        with without_loading_bars():
            network, found = kind.from_pretrained(
                directory,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=trusted,
                # Expert after expert: transformers' grouped kernels refuse rows that are no multiple of 16 bytes.
                experts_implementation="eager",
            )
    except BaseException as error:  # of config.json, of weights, of code: there is no end of kinds
        if not is_fault(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(
            f"{directory}: transformers does not load it: {reason[:1000]}{_of_byte_order_mark(Path(directory))}"
        ) from error
    _require_every_weight(Path(directory), found)
    _round_weights(network, weights_as)
    return network.eval()


def _require_every_weight(directory: Path, found: Mapping[str, Any]) -> None:
    """Raise where `found`, what transformers says of its loading, names a fault: it fills gaps with random numbers."""
    kinds = {"lacks": "missing_keys", "has unknown": "unexpected_keys", "has misshapen": "mismatched_keys"}
    faults = [
        f"{what} {', '.join(sorted(map(str, names))[:5])}" for what, key in kinds.items() if (names := found.get(key))
    ]
    if faults:
        raise ConversionError(
            f"{directory}: does not hold the model that its config.json describes: it {'; '.join(faults)}"
        )


def _of_byte_order_mark(directory: Path) -> str:
    """What to do where config.json begins with a byte order mark, which is read here but not by transformers."""
    config = directory / "config.json"
    if not (config.is_file() and config.read_bytes().startswith(codecs.BOM_UTF8)):
        return ""
    return f" (it begins with a byte order mark; take that away: sed -i '1s/^\\xef\\xbb\\xbf//' {config})"


def may_run_code(directory: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Whether modelling code inside `directory` may be run; ConversionError where it would have to be and may not."""
    trusted = trust_remote_code or carries_our_code(directory)
    if not trusted and "auto_map" in read_json_object(Path(directory) / "config.json", ConversionError):
        refresh = (
            "; or, as it is an export of ours, with code of another version or folders of yours in it: "
            f"tools/convert.py {directory} --refresh-code puts this version's code there"
        )
        raise ConversionError(
            f"{directory}: brings its own modelling code; pass --trust-remote-code to run it"
            f"{refresh if is_ours(directory) else ''}"
        )
    return trusted


def is_ours(directory: str | Path) -> bool:
    """Whether config.json names a class whose code this framework ships, of whatever version."""
    named = read_json_object(Path(directory) / "config.json", ConversionError).get("architectures")
    return any(a.code and named == [a.hf_class] for a in ARCHITECTURES)


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
    files = sorted(path.name for path in directory.glob("*.py") if path.is_file())
    return files == sorted(ours.code) and all(
        (directory / name).read_text(encoding="utf-8", errors="replace") == shipped_code(name) for name in files
    )
