"""What an architecture is: a Hugging Face class, a table of its config fields and a table of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.architectures.tables.fields import (
    QUANTIZED,
    ConfigRule,
    config_to_megatron,
    said,
    says_nothing,
    unknown_fields,
    unsaid,
)
from megatron_ext.architectures.tables.foreign_code import Reads, base_fields, reads_of, transformers_version
from megatron_ext.architectures.tables.rules import Rule
from megatron_ext.architectures.tables.storage_variants import Alias, Drop, Stacked
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
    extra_check: Callable[[ModelConfig], str | None] = lambda model: None
    """A reason of its own why this class would not compute what the Megatron model computes."""
    code: tuple[str, ...] = ()
    """Modelling files shipped with an export because transformers does not have the class."""
    auto_map: tuple[tuple[str, str], ...] = ()
    """Auto classes of the shipped code, or of code in a public repository."""
    remote: str | None = None
    """The public repository with the code of a class that nobody else has. It is exported to on request only."""
    reads: Literal["transformers", "table"] | None = "transformers"
    """Who reads fields of config.json beyond the table: transformers' code, nobody, or (None) nobody can say."""
    reads_like: str | None = None
    """The model type whose code in transformers reads what this class's does. Default: its own."""
    stacked: tuple[Stacked, ...] = ()
    """Tensors that hold the experts of a layer in one, in files of newer writers or of every one."""
    aliases: tuple[Alias, ...] = ()
    """Names that some files have for a tensor of the rules."""
    drops: tuple[Drop, ...] = ()
    """Tensors of some files that no logits depend on."""
    prefix: str = ""
    """What the names of all tensors but those of `heads` begin with; some files leave it out."""
    heads: tuple[str, ...] = ("lm_head.weight",)

    def why_unsupported(self, model: ModelConfig) -> str | None:
        """Why this class would not compute what the Megatron model computes; None if it computes exactly that.

        Whatever the table of config fields does not carry must be at its default: a new field of ModelConfig is
        refused by every architecture until a table knows it.
        """
        if (reason := self.extra_check(model)) is not None:
            return reason
        lost = self.unsupported_fields(model)
        return f"it cannot say {', '.join(lost)}" if lost else None

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        """The values of `model`, each as `field = value`, that the table of config fields cannot say."""
        return unsaid(self.config, model)

    def model_of(self, raw: Mapping[str, Any], *, source: str) -> ModelConfig:
        """The ModelConfig that a config.json of this class means; what no code of the class reads plays no part.

        Raises:
            ConversionError: listing every field that may change the model and that the table does not know, and every
                value that cannot be expressed.
        """
        return config_to_megatron(self.config, self._sorted(raw)[0], source=source)

    def unread(self, raw: Mapping[str, Any]) -> list[str]:
        """What a config.json says that no code of the class reads, as warnings; fields of every class not among it."""
        statements = self._sorted(raw)[1] + [statement for rule in self.config for statement in rule.unread(raw)]
        if not statements:
            return []
        listed = ", ".join(statements)
        if self.reads == "table":
            return [f"{listed}: read by nothing in the code of this class, so left out"]
        notes = [f"transformers {transformers_version()}"]
        if isinstance(written := raw.get("transformers_version"), str):
            notes.append(f"config.json was written by {written}")
        if "auto_map" in raw and not self.code:
            notes.append("code that auto_map names was not looked at")
        return [f"{listed}: read by nothing in {self.hf_class} ({', '.join(notes)}), so left out"]

    def _sorted(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The fields that mean something, under the names of the table, and those that nothing reads."""
        fields, unread = dict(raw), []
        for name in unknown_fields(self.config, raw):
            value = fields[name]
            reads = None if name in base_fields() else self._reads()
            canonical = None if reads is None else reads.aliases.get(name)
            if name in base_fields() or says_nothing(name, value):
                del fields[name]
            elif canonical is not None and fields.get(canonical) in (None, value):
                fields[canonical] = fields.pop(name)
            elif reads is not None and name not in reads.fields and name not in QUANTIZED:
                unread.append(said(name, fields.pop(name)))
        return fields, unread

    def _reads(self) -> Reads | None:
        if self.reads == "transformers":
            return reads_of(self.reads_like or self.model_type)
        return Reads(frozenset(), {}) if self.reads == "table" else None
