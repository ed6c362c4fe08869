"""What an architecture is: a Hugging Face class, a table of its config fields and a table of its weights."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.architectures.fields import ConfigRule, unsaid
from megatron_ext.architectures.rules import Rule
from megatron_ext.architectures.stored import Alias, Drop, Stacked
from megatron_ext.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture and its correspondence with Megatron, for both directions."""

    name: str
    """Short name on command lines."""
    hf_class: str
    """Entry of `architectures` in config.json."""
    model_type: str
    """`model_type` in config.json."""
    config: tuple[ConfigRule, ...]
    weights: tuple[Rule, ...]
    other: Callable[[ModelConfig], str | None] = lambda model: None
    """A reason of its own why this class would not compute what the Megatron model computes."""
    code: tuple[str, ...] = ()
    """Modelling files shipped with an export because transformers does not have the class."""
    auto_map: tuple[tuple[str, str], ...] = ()
    """Auto classes of the shipped code, or of code in a public repository."""
    remote: str | None = None
    """The public repository with the code of a class that nobody else has. It is exported to on request only."""
    stacked: tuple[Stacked, ...] = ()
    """Tensors that hold the experts of a layer in one, in files of newer writers."""
    aliases: tuple[Alias, ...] = ()
    """Names that some files have for a tensor of the rules."""
    drops: tuple[Drop, ...] = ()
    """Tensors of some files that no logits depend on."""
    prefix: str = ""
    """What the names of all tensors but those of `heads` begin with; some files leave it out."""
    heads: tuple[str, ...] = ("lm_head.weight",)

    def unlike(self, model: ModelConfig) -> str | None:
        """Why this class would not compute what the Megatron model computes; None if it computes exactly that.

        Whatever the table of config fields does not carry must be at its default: a new field of ModelConfig is
        refused by every architecture until a table knows it.
        """
        if (reason := self.other(model)) is not None:
            return reason
        lost = self.lost(model)
        return f"it cannot say {', '.join(lost)}" if lost else None

    def lost(self, model: ModelConfig) -> list[str]:
        """The values of `model`, each as `field = value`, that the table of config fields cannot say."""
        return unsaid(self.config, model)
