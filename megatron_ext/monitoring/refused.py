"""Alerts people of a restart that is refused: nobody watches it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.launcher import launched_rank


@contextmanager
def alerting_of_refusal(values: Callable[[], Mapping[str, Any]], *, is_asked: bool | None = None) -> Iterator[None]:
    """Where what is inside refuses a run that has reported before, tell its people why.

    Args:
        values: what is right in the run's configuration (`RunText.values`), which says whom to tell; with a ConfigError
            nobody knows.
        is_asked: whether this process tells; of all ranks the first one, if not said.
    """
    try:
        yield
    except MegatronExtError as error:
        if launched_rank() == 0 if is_asked is None else is_asked:
            from megatron_ext.monitoring.monitor import tell_of_failed_restart  # with torch, which takes seconds

            with suppress(ConfigError):
                tell_of_failed_restart(values(), error)
        raise
