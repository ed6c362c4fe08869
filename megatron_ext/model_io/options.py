"""Options of tools/convert.py, and of the other tools that write a model with new tokens."""

import os
from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError

_MOST_WORKERS = 4


def default_workers() -> int:
    """A thread for each core, up to 4: more make a disk no faster."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


@config
class ConvertOptions:
    """What to convert, to what, and what to do with it then."""

    source: PathName
    """Megatron checkpoint (or a directory of them: the newest is taken), or Hugging Face directory."""
    target: PathName | None = None
    """Directory to write; required but with --refresh-code."""
    to: Literal["megatron", "hf"] | None = None
    """Format to write. Default: the other one. The source's own format too, for another dtype or class."""
    hf_class: str | None = None
    """Hugging Face class to export as, such as MixtralForCausalLM; refused where it would compute something else.
    Default: the source's own, or else the first class that computes exactly this model."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Convert the weights. Default: keep them as they are."""
    tokenizer: PathName | None = None
    """Tokenizer to put into a Hugging Face export. Default: the one of the training run."""
    data: PathName | None = None
    """Prepared dataset (what tools/preprocess.py wrote) that the training configuration beside a Megatron target trains
    on: of conversations it becomes a fine-tuning run, ready to start. Default: what the source's run read."""
    untie: bool = False
    """Give a model whose embedding is its output layer too an output layer of its own, equal to it: the same function,
    in which either may have adapters or be trained alone."""
    shard_size: float | None = Field(default=None, gt=0)
    """Largest safetensors file of a Hugging Face export, in GB. Default: 5."""
    workers: int = Field(default_factory=default_workers, ge=1)
    """Threads. The result does not depend on them. Default: one for each core, up to 4."""
    force: bool = False
    """Replace an existing target."""
    refresh_code: bool = False
    """Put this version's modelling code into SOURCE, a Hugging Face directory of our own class that another version
    wrote. The weights stay the same files, and no target is written."""
    verify: bool = False
    """Compare weights and logits with the source, and give the target its name only if they are the same model."""
    logits: bool = True
    """Compare logits and generated tokens too: the model is loaded in fp32. --no-logits compares weights alone."""
    text: PathName | None = None
    """Text for the logits (.jsonl, .json, .txt, a folder) or the prefix of a prepared dataset. Default: built-in."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest difference of logits that counts as equal, as a share of the largest logit. Default: 1e-5."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    push_to_hub: str | None = None
    """Upload a verified export to this repository (USER/NAME) of the Hugging Face Hub; needs --verify. The token is
    taken from HF_TOKEN, or from the login of the hub's own command line."""
    private: bool = True
    """Create the repository as a private one, where it is not there yet."""


@config
class ExtendOptions:
    """Options of `tools/tokenizer.py extend`."""

    source: PathName
    """What gets more tokens: a Megatron checkpoint (of a directory of them the newest), a Hugging Face directory, or a
    tokenizer alone."""
    target: PathName
    """Directory to write, in the source's format."""
    tokens: list[str] = Field(default_factory=list)
    """Tokens to add, such as <|im_start|> <|im_end|>. They get the ids behind those that are there."""
    tokens_file: PathName | None = None
    """File of more tokens, one a line."""
    special: bool = False
    """They are control tokens, which no text is read as, though it spells them; chat templates write them."""
    tokenizer: PathName | None = None
    """Tokenizer to extend. Default: the model's own."""
    logits: bool = True
    """Compare the logits of the tokens that were there, before and after; the model is loaded in fp32. --no-logits
    compares weights alone."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory for that."""
    workers: int = Field(default_factory=default_workers, ge=1)
    """Threads. The result does not depend on them. Default: one for each core, up to 4."""
    force: bool = False
    """Replace an existing target."""


def refuse_unused(o: ConvertOptions, *, to_hugging_face: bool) -> None:
    """Raise ConfigError where an option was given that nothing would come of; it names what the option needs."""
    if o.refresh_code:
        _refuse_beside_refresh(o)
    elif o.target is None:
        raise ConfigError("target: a directory to write is required (SOURCE TARGET), but with --refresh-code")
    compares_logits = "--verify without --no-logits: it is for the comparison of logits"
    needs = [
        ("--no-logits", not o.logits, o.verify, "--verify: it is for the comparison with the source"),
        ("--text", o.text is not None, o.verify and o.logits, compares_logits),
        ("--tolerance", o.tolerance is not None, o.verify and o.logits, compares_logits),
        ("--trust-remote-code", o.trust_remote_code, o.verify and o.logits, compares_logits),
        ("--data", o.data is not None, not to_hugging_face, "a Megatron target, which has a training configuration"),
        ("--shard-size", o.shard_size is not None, to_hugging_face, "a Hugging Face target, not a Megatron checkpoint"),
        ("--no-private", not o.private, o.push_to_hub is not None, "--push-to-hub"),
        (
            "--push-to-hub",
            o.push_to_hub is not None,
            to_hugging_face,
            "a Hugging Face target, not a Megatron checkpoint",
        ),
        ("--push-to-hub", o.push_to_hub is not None, o.verify, "--verify: only verified exports are uploaded"),
    ]
    for option, given, useful, what in needs:
        if given and not useful:
            raise ConfigError(f"{option} needs {what}")


def _refuse_beside_refresh(o: ConvertOptions) -> None:
    """Raise ConfigError for what says how a target is to be written, beside --refresh-code, which writes none."""
    defaults = ConvertOptions(source=o.source)
    for name in ("target", "to", "hf_class", "dtype", "tokenizer", "data", "untie", "shard_size", "workers", "force"):
        if getattr(o, name) != getattr(defaults, name):
            option = name if name == "target" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is not for --refresh-code, which replaces the code in SOURCE and nothing else")
