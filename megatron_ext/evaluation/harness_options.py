"""What an evaluation by lm-evaluation-harness is asked for.

No torch here, nor in what this imports: `--help` answers at once.
"""

from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config


@config
class HarnessOptions:
    """Options of this command."""

    model: PathName
    """Hugging Face directory or Megatron checkpoint (also one of adapters), of a run's directory the newest."""
    tasks: list[str] = Field(min_length=1)
    """YAML files of tasks as lm-evaluation-harness has them, folders of such, or names of its own tasks."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question. Unset: as each task says."""
    documents: int | None = Field(default=None, ge=1)
    """So many documents of each task, the first ones. Unset: all."""
    chat: bool = False
    """Ask through the model's chat template."""
    batch_size: int = Field(default=8, ge=1)
    """Requests at once."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of drawn examples and sampled answers."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute, in fp32: scores depend on the dtype."""
    verify: bool = True
    """Compare the export of a Megatron checkpoint with it, weights and logits, before it is evaluated."""
    online: bool = False
    """Data sets of tasks may be fetched from the Hugging Face hub. Unset: from this machine alone."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    output: PathName | None = None
    """JSON file that keeps the scores. Default: lm_eval.json in evaluation/ITER of the checkpoint directory, where
    reports and `choose` find it; of a Hugging Face directory DIR, DIR.lm_eval.json."""
