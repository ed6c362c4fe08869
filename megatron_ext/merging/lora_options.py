"""What a merge of adapters is asked for.

No torch here, nor in what this imports: `--help` answers at once.
"""

from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config
from megatron_ext.model_io.options import default_workers


@config
class MergeLoraOptions:
    """Options of this command."""

    adapters: PathName
    """Checkpoint of a run with adapters; of a directory of them the newest."""
    target: PathName
    """Directory to write."""
    base: PathName | None = None
    """The weights that they were trained beside. Default: where those were then."""
    to: Literal["megatron", "hf"] = "megatron"
    """Format of the target."""
    hf_class: str | None = None
    """Hugging Face class to write; refused where it would compute something else. Default: the base's own."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Convert the weights; fp32 where another stage of training follows: bf16 loses small changes. Default: the
    base's."""
    workers: int = Field(default_factory=default_workers, ge=1)
    """Threads. The result does not depend on them. Default: one for each core, up to 4."""
    force: bool = False
    """Replace an existing target."""
