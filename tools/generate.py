#!/usr/bin/env python
"""Continue prompts with a model: a Hugging Face directory or a Megatron checkpoint.

python tools/generate.py CHECKPOINT_OR_HF --prompts "Once upon a time"
"""

import json

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class GenerateOptions:
    """Options of this command."""

    checkpoint: PathName
    """Hugging Face directory or Megatron checkpoint."""
    prompts: list[str] = Field(min_length=1)
    """Texts to continue."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest continuation, in tokens. It ends earlier where the model has learned no more positions."""
    temperature: float = Field(default=0.8, ge=0)
    """Spread of the sampling; 0 takes the likeliest token each time."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sampling."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    output: PathName | None = None
    """JSON file for prompts and continuations."""


def main() -> None:
    """Parse the command line and generate."""
    o = parse_command(GenerateOptions, __doc__, positional=["checkpoint"])
    from megatron_ext.files import require_writable, write_text
    from megatron_ext.generation.sample import generate

    if o.output:
        require_writable(o.output)
    with ending_on_sigterm():  # which removes the temporary model
        texts = generate(
            o.checkpoint,
            o.prompts,
            max_new_tokens=o.max_new_tokens,
            temperature=o.temperature,
            top_p=o.top_p,
            seed=o.seed,
            trust_remote_code=o.trust_remote_code,
        )
    for prompt, text in zip(o.prompts, texts, strict=True):
        print(f"{prompt}>>>{text}\n")
    if o.output:
        rows = [{"prompt": prompt, "continuation": text} for prompt, text in zip(o.prompts, texts, strict=True)]
        write_text(o.output, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
