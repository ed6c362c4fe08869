"""What a merge is asked for.

No torch here, nor in what this imports: `--help` answers at once.
"""

from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config
from megatron_ext.merging.merge import AnyMerge, Linear
from megatron_ext.model_io.options import default_workers


@config
class AverageOptions:
    """Options of this command."""

    sources: list[PathName] = Field(min_length=1)
    """Models of one shape: Megatron checkpoints or Hugging Face directories; with --last one folder of checkpoints."""
    target: PathName
    """Directory to write."""
    to: Literal["megatron", "hf"] = "megatron"
    """Format of the target."""
    last: int | None = Field(default=None, ge=2)
    """Average the last n checkpoints of the one directory that is given."""
    method: AnyMerge = Field(default_factory=Linear)
    """How the models are merged."""
    base: PathName | None = None
    """The model that task vectors are differences to; for task_arithmetic, ties and dare."""
    hf_class: str | None = None
    """Hugging Face class to write; refused where it would compute something else. Default: the first source's own."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of what dare drops. Default: 1234."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Convert the weights. Default: what they are, or what the base's are."""
    text: PathName | None = None
    """Text or prepared dataset to measure the perplexity on. Default: built-in sentences."""
    tokenizer: PathName | None = None
    """Tokenizer for the text. Default: the first source's."""
    logits: bool = True
    """Measure the perplexity of every source and of the result; each is loaded in fp32. --no-logits leaves that out."""
    trust_remote_code: bool = False
    """Run modelling code inside Hugging Face directories to measure perplexities."""
    workers: int = Field(default_factory=default_workers, ge=1)
    """Threads. The result does not depend on them. Default: one for each core, up to 4."""
    force: bool = False
    """Replace an existing target."""
