"""A message to people about what happened to a run."""

from dataclasses import dataclass

from megatron_ext.monitoring.events import Event, Severity

_MOST_CHARACTERS = 3000


@dataclass(frozen=True)
class Message:
    """One message."""

    title: str
    """Run and kind of event."""
    text: str
    """What happened, on one or several lines."""
    severity: Severity


@dataclass(frozen=True)
class RunNames:
    """How a run is called in messages."""

    run: str
    """Its checkpoint directory's name."""
    place: str
    """Where it runs: host, directory, Slurm's job."""


def message_of(event: Event, names: RunNames, held_back: int = 0) -> Message:
    """What to tell of `event`, and that `held_back` of its kind came before it and were not told one by one."""
    lines = [f"step {event.iteration}: {_shortened(event.text)}"]
    if held_back:
        lines.append(f"and {held_back} more of this kind before it, since the last message")
    lines.append(names.place)
    return Message(f"{names.run}: {event.kind.replace('_', ' ')}", "\n".join(lines), event.severity)


def _shortened(text: str) -> str:
    """`text`, without its middle where it is long: an error says most at both ends."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"
