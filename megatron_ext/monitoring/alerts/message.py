"""A message to people about what happened to a run."""

import time
from dataclasses import dataclass

from megatron_ext.monitoring.alerts.spool import Alert
from megatron_ext.monitoring.events import Severity

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


def message_of(alert: Alert, names: RunNames) -> Message:
    """What to tell of `alert`, and of those of its kind that came before it and were not told one by one."""
    event = alert.event
    lines = [f"step {event.iteration}: {_shortened(event.text)}"]
    if alert.before:
        lines.append(f"and {alert.before} more of this kind before it, since the last message")
    if alert.place is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(event.at))
        lines.append(f"it happened {when}, and could not be sent before that process ended")
    lines.append(alert.place or names.place)
    return Message(f"{names.run}: {event.kind.replace('_', ' ')}", "\n".join(lines), event.severity)


def _shortened(text: str) -> str:
    """`text`, without its middle where it is long: an error says most at both ends."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"
