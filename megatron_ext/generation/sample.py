"""Continues prompts with a Hugging Face model or a Megatron checkpoint."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ext.conversion.convert import convert
from megatron_ext.conversion.logits import load_hugging_face
from megatron_ext.conversion.sources import is_hugging_face
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import DataError


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

    A Megatron checkpoint is exported to a temporary directory first: the exported model's logits are the
    checkpoint's (tools/verify.py), and transformers generates with a cache.
    """
    if not is_hugging_face(checkpoint):
        with tempfile.TemporaryDirectory(prefix="megatron-ext-") as directory:
            exported = Path(directory) / "export"
            convert(checkpoint, exported)
            return generate(
                exported, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
            )
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    network = load_hugging_face(checkpoint, trust_remote_code=trust_remote_code)
    torch.manual_seed(seed)
    sampling = (
        # transformers would otherwise sample among the 50 likeliest tokens only.
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    continuations = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if tokens["input_ids"].shape[1] == 0:
            raise DataError(f"the prompt {prompt!r} has no tokens to start from")
        output = network.generate(**tokens, max_new_tokens=max_new_tokens, **sampling)
        continuations.append(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return continuations
