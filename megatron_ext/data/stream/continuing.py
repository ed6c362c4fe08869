"""Whether the stages of a configuration can follow what a run has read, and where they go on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_ext.config.data import Stage
from megatron_ext.data.stream.pattern import shares_of
from megatron_ext.data.stream.progress import Part, Progress, definition, definition_hash


@dataclass
class Continued:
    """How a run goes on."""

    current: Stage | None = None
    """The stage under way, as the configuration has it now; None where all that was begun is over."""
    coming: Sequence[Stage] = ()
    """Stages that have not begun."""
    faults: list[str] = field(default_factory=list)
    """What is not as it was read."""


def continue_stages(config: Sequence[Stage], progress: Progress, length_of: Callable[[Stage], int]) -> Continued:
    """Compare the stages of the configuration with those that were read.

    Args:
        length_of: the sequence length of a stage.
    """
    read: dict[str, list[Part]] = {}
    for part in progress.parts:
        read.setdefault(part.stage.name, []).append(part)
    *finished, last = read
    rest, faults = list(config), list[str]()
    for name in finished:
        parts = read[name]
        if not parts[-1].complete:  # it was ended early, by a configuration without it
            faults += _none_of_that_name(rest, name)
        elif rest and rest[0].name == name:
            faults += changed(rest.pop(0), parts[-1], length_of)
        else:
            faults.append(_missing(parts[-1], rest))
            rest = [stage for stage in rest if stage.name != name]
    if rest and rest[0].name == last:
        return Continued(rest[0], rest[1:], faults)
    if read[last][-1].complete:
        faults.append(_missing(read[last][-1], rest))
    else:  # ended now
        faults += _none_of_that_name(rest, last)
    return Continued(None, rest, faults)


def same_pattern(stage: Stage, sequence_length: int, part: Part) -> bool:
    """Whether `stage` goes on with the pattern that `part` began, however long it is."""
    if sequence_length != part.sequence_length or stage.take != part.stage.take:
        return False
    then, now = part.stage.mix, stage.mix
    if set(then) != set(now):
        return False
    return shares_of([then[name] for name in then]) == shares_of([now[name] for name in then])


def changed(stage: Stage, part: Part, length_of: Callable[[Stage], int]) -> list[str]:
    """The fault of a stage that is over and is not what `part` was read by; none where it is."""
    if definition_hash(stage, length_of(stage)) == definition_hash(part.stage, part.sequence_length):
        return []
    return [
        f"stage {stage.name!r} is over, and was not what it is now: a finished stage stays as it was; what is to be "
        f"read from here on is a new stage\n  in the checkpoint: {_shown(part.stage, part.sequence_length)}\n"
        f"  in this run:       {_shown(stage, length_of(stage))}"
    ]


def _missing(part: Part, rest: Sequence[Stage]) -> str:
    name = part.stage.name
    where = "stands elsewhere" if any(stage.name == name for stage in rest) else "is missing"
    return (
        f"stage {name!r} is over, and {where} in this run: finished stages stay where they were\n"
        f"  in the checkpoint: {_shown(part.stage, part.sequence_length)}\n"
        f"  in this run:       {', '.join(stage.name for stage in rest) or 'nothing'} at its place"
    )


def _none_of_that_name(rest: Sequence[Stage], name: str) -> list[str]:
    if any(stage.name == name for stage in rest):
        return [f"stage {name!r} was ended before its end, and is over; what comes later needs another name"]
    return []


def _shown(stage: Stage, sequence_length: int) -> str:
    return json.dumps(definition(stage, sequence_length), ensure_ascii=False)
