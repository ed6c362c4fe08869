"""Keeps out what libraries say on every run and nobody could act on; everything else that they say is shown."""

import contextlib
import logging
from collections.abc import Iterator

_SAYS_NOTHING = {
    # transformers, of a tokenizer whose model is of a class that comes with its code.
    "transformers.configuration_utils": "You are using a model of type `megatron_ext` to instantiate a model of type ",
}
"""How a message begins, by the logger that it comes from."""


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SAYS_NOTHING[record.name])


def quieten_loggers() -> None:
    """Leave out the known messages, and only those; libraries may be imported before or after."""
    for name in _SAYS_NOTHING:
        logging.getLogger(name).addFilter(_is_news)


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """While inside, transformers shows no bar for each file and weight that it loads."""
    from transformers.utils import logging as transformers_logging  # slow to import

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
