"""Continues prompts with a Hugging Face model or a Megatron checkpoint."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import holds_adapters
from megatron_ext.checkpoint.tokenizer_files import SETTINGS_FILE
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.foreign import reading
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.checkpoint_model import tokenizer_directory
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.finite import describe, is_finite
from megatron_ext.model_io.logits import A_MODEL, SETTLE, load_hugging_face
from megatron_ext.model_io.open import is_hugging_face

log = logging.getLogger(__name__)

# What transformers' models call the table of learned positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float
    """0 takes the likeliest token each time."""
    top_p: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of transformers' `generate`, which would otherwise sample among the 50 likeliest tokens only."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    trust_remote_code: bool = False,
) -> list[str]:
    """Return the continuation of each prompt; `temperature` 0 takes the likeliest token each time.

    A Megatron checkpoint (where it holds adapters, with their base) is exported to a temporary directory first: the
    exported model's logits are the checkpoint's (tools/verify.py), and transformers generates with a cache. A
    continuation ends at the last learned position of a model that has such, which is said.

    Raises:
        DataError: there is no tokenizer for the prompts, or one of them is empty or longer than learned positions.
        CheckpointError: the weights or what they compute are no numbers.
    """
    sampling = Sampling(temperature, top_p, seed)
    if is_hugging_face(checkpoint):
        return _continue(checkpoint, checkpoint, prompts, max_new_tokens, sampling, trust_remote_code)
    if tokenizer_directory(checkpoint) is None:
        raise DataError(
            f"{checkpoint}: carries no tokenizer to read prompts with; tools/convert.py {checkpoint} HF_DIRECTORY "
            "--tokenizer DIR makes a model that has one"
        )
    with tempfile.TemporaryDirectory(prefix="megatron-ext-") as directory:
        exported = Path(directory) / "export"
        if holds_adapters(require_checkpoint(checkpoint)):
            merge_lora(MergeLoraOptions(adapters=str(checkpoint), target=str(exported), to="hf"), silent)
        else:
            convert(checkpoint, exported)
        return _continue(exported, checkpoint, prompts, max_new_tokens, sampling, trust_remote_code)


def _continue(
    directory: str | Path,
    name: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    trust_remote_code: bool,
) -> list[str]:
    """The continuations by the Hugging Face model in `directory`, which messages call `name`."""
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    network = load_hugging_face(directory, trust_remote_code=trust_remote_code)
    weights = network.state_dict()
    if broken := [key for key, weight in weights.items() if not is_finite(weight)]:
        raise CheckpointError(
            f"{name}: {describe(broken, len(weights))}, so that nothing can be generated; take a checkpoint from before"
        )
    torch.manual_seed(sampling.seed)
    positions, rows = learned_positions(network), network.get_input_embeddings().weight.shape[0]
    continuations = []
    for prompt in prompts:
        with reading(name, DataError, kind="a tokenizer", advice=f"{SETTINGS_FILE} may say what it cannot"):
            tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        length = tokens["input_ids"].shape[1]
        if length == 0:
            raise DataError(f"the prompt {prompt!r} has no tokens to start from")
        if (largest := int(tokens["input_ids"].max())) >= rows:
            raise DataError(_beyond_the_model(prompt, tokenizer, largest, name, rows))
        if positions is not None and length >= positions:
            raise DataError(
                f"the prompt {_shortened(prompt)} has {length:,} tokens, but {name} has learned {positions:,} "
                f"positions only (max_position_embeddings); give at most {positions - 1:,} tokens"
            )
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - length)
        with reading(name, CheckpointError, kind=A_MODEL, advice=SETTLE):
            output = network.generate(
                **tokens, max_new_tokens=room, logits_processor=[_numbers_only(name)], **sampling.settings
            )
        if room < max_new_tokens and output.shape[1] == positions:
            log.warning(
                "the continuation of %s ends after %d tokens: %s has learned %d positions (max_position_embeddings)",
                _shortened(prompt),
                room,
                name,
                positions,
            )
        continuations.append(tokenizer.decode(output[0, length:], skip_special_tokens=True))
    return continuations


def _beyond_the_model(prompt: str, tokenizer: Any, largest: int, name: str | Path, rows: int) -> str:
    return (
        f"the prompt {_shortened(prompt)} has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but "
        f"{name} embeds {rows} tokens only: its tokenizer is larger than the model"
    )


def learned_positions(network: nn.Module) -> int | None:
    """How many positions `network` has learned; None where they are computed, and so have no end."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            configuration: Any = network.config
            return min(module.num_embeddings, int(configuration.max_position_embeddings))
    return None


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:37]}...")


def _numbers_only(name: str | Path) -> Any:
    """A step of transformers' `generate` that ends it where the logits are NaN or infinite."""

    def check(input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity is how a token is excluded.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise CheckpointError(
                f"{name}: the logits after {input_ids.shape[1]:,} tokens are NaN or infinite, though its weights are "
                "numbers; they are too large to compute with"
            )
        return scores

    return check
