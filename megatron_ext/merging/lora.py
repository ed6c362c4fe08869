"""Merges adapters into the weights beside which they were trained: once, exactly, and with what rounding has lost."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.checkpoint.examine import check_checksums
from megatron_ext.checkpoint.streams import TensorSource
from megatron_ext.errors import ConversionError
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.adapters import Adapters, WithAdapters, open_adapters, require_base
from megatron_ext.model_io.engine import copies
from megatron_ext.model_io.open import Checkpoint, differing_fields, open_checkpoint, with_padding
from megatron_ext.model_io.write import (
    DTYPES,
    Output,
    Progress,
    Written,
    require_place,
    write_hugging_face,
    write_megatron,
)

MUCH = 0.2
"""A share of the differences that is worth a warning when it is lost."""
RECORD = "merged_adapters"
"""Under this the run beside merged weights says what was merged into them."""

Bar = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def silent(name: str) -> Iterator[Progress]:
    """A bar that nobody sees."""
    yield lambda done, total: None


@dataclass(frozen=True)
class MergedLora:
    """What was merged."""

    written: Written
    base: Path
    pairs: int
    losses: dict[str, float]
    """The share of what the adapters change that the stored numbers do not hold, by the kind of weight."""

    @property
    def worst(self) -> float:
        """The largest of these shares."""
        return max(self.losses.values(), default=0.0)


def merge_lora(options: MergeLoraOptions, bar: Bar) -> MergedLora:
    """Write the base of `options.adapters` with the adapters added.

    Raises:
        ConversionError, CheckpointError: the base is not theirs, or they are in it already; nothing that looks complete
            is left behind.
    """
    adapters = open_adapters(options.adapters)
    base, own = open_checkpoint(options.base or adapters.base), adapters.fingerprint
    dtype = DTYPES.get(options.dtype or "")
    output = Output(Path(options.target), dtype, workers=options.workers, force=options.force)
    inputs = [base.directory, adapters.directory]
    require_place(options.to, output, inputs)
    stream = base_stream(adapters, base, bar)
    merged = WithAdapters(stream, adapters, dtype)
    content = replace(
        base.content,
        model=adapters.model,
        tasks=list(copies(merged)),
        specs=merged.specs,
        stream=merged,
        inputs=inputs,
        tokenizer=adapters.tokenizer or base.tokenizer,
        run={**base.run, RECORD: [*base.run.get(RECORD, ()), _record(adapters, own)]},
        made_of=f"{base.directory.name} with the adapters of {adapters.directory.parent.name}",
    )
    with bar("merging") as progress:
        output = replace(output, progress=progress)
        if options.to == "megatron":
            written = write_megatron(content, output, _nothing_to_examine)
        else:
            architecture, why = _class_of(options, base, adapters)
            written = write_hugging_face(content, architecture, why, output, _nothing_to_examine)
    return MergedLora(written, base.directory, len(adapters.pairs), merged.losses.shares())


def base_stream(adapters: Adapters, base: Checkpoint, bar: Bar) -> TensorSource:
    """The weights of `base` with the adapters' vocabulary padding, once they are found to be the adapters' own.

    Raises:
        ConversionError: they are those of another model, or have these adapters merged into them already.
    """
    own = adapters.fingerprint
    for name, theirs, wanted in differing_fields(base.model, adapters.model):
        raise ConversionError(
            f"{base.directory}: another model than the adapters': {name} is {theirs!r}, not {wanted!r}"
        )
    if any(one.get("fingerprint") == own for one in base.run.get(RECORD, ())):
        raise ConversionError(f"{base.directory}: has these adapters merged into it already; give their base, --base")
    for directory in (adapters.directory, base.directory):
        check_checksums(directory, ConversionError)  # the result gets sums of its own: damage would look whole
    stream = with_padding(base, adapters.model.padded_vocab_size)
    with bar("comparing the base with the adapters' own") as progress:
        require_base(adapters, stream, base.directory, progress)
    return stream


def _nothing_to_examine(partial: Path) -> None:
    """The sums are exact, and what rounding loses is reported."""


def _class_of(options: MergeLoraOptions, base: Checkpoint, adapters: Adapters) -> tuple[Architecture, str]:
    if base.architecture is not None and options.hf_class is None:
        return base.architecture, f"{base.architecture.hf_class}, as before"
    return architecture_for(adapters.model, options.hf_class)


def _record(adapters: Adapters, own: str) -> dict[str, object]:
    return {"adapters": str(adapters.directory), "fingerprint": own, "step": adapters.state.iteration}
