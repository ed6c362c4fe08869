"""One event of a kind in a while; those between are counted, and told of together with the last of them."""

from collections.abc import Iterator

from megatron_ext.monitoring.events import Event


class RateLimit:
    """Passes an event on at once where its kind has been quiet; otherwise holds it back until that time is over.

    Args:
        seconds: from one that passes to the next of its kind.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open_at: dict[str, float] = {}
        """When the next event of a kind may pass."""
        self._held: dict[str, tuple[Event, int]] = {}
        """By kind the last event held back, and how many came before it."""

    def admit(self, event: Event, now: float) -> bool:
        """Whether `event`, which came at `now`, may pass at once; if not, it is held back."""
        if event.kind not in self._held and now >= self._open_at.get(event.kind, now):
            self._open_at[event.kind] = now + self._seconds
            return True
        before = self._held.get(event.kind)
        self._held[event.kind] = event, 0 if before is None else before[1] + 1
        return False

    def due(self, now: float) -> Iterator[tuple[Event, int]]:
        """What was held back and may pass at `now`: the last event of each kind, and how many came before it."""
        for kind in [kind for kind in self._held if now >= self._open_at[kind]]:
            self._open_at[kind] = now + self._seconds
            yield self._held.pop(kind)

    def rest(self) -> Iterator[tuple[Event, int]]:
        """All that is held back, at the end of the run."""
        while self._held:
            yield self._held.pop(next(iter(self._held)))

    def held(self) -> list[tuple[Event, int]]:
        """All that is held back, which stays so."""
        return list(self._held.values())

    def next_due(self) -> float | None:
        """When the first of what is held back may pass; None where nothing is."""
        return min((self._open_at[kind] for kind in self._held), default=None)
