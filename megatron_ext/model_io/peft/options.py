"""What is asked for of adapters in PEFT's form.

No torch here, nor in what this imports: `--help` answers at once.
"""

from typing import Literal

from megatron_ext.config.base import PathName, config


@config
class PeftOptions:
    """Options of this command."""

    source: PathName
    """Checkpoint of a run with adapters (of a directory of them the newest), or a PEFT directory."""
    target: PathName
    """Directory to write: a PEFT directory, or one of checkpoints for checkpoint.directory of a run."""
    base: PathName
    """The base model as a Hugging Face directory. An export takes its class, and tells PEFT its path."""
    layout: Literal["stacked", "experts"] | None = None
    """Of an export with routed experts: stacked, as PEFT 0.19 and newer with transformers 5 read them; experts, one
    module each, for older ones. Default: stacked."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of an import: in which the run will hold the base (fp8 runs: bf16). Default: bf16."""
    force: bool = False
    """Replace an existing target."""
