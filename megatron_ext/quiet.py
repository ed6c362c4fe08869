"""Keeps out what libraries say on every run and nobody could act on; everything else that they say is shown."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

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


def quieten_interrupts() -> None:
    """Let a command of this package that gets Ctrl-C while it still imports say a word, not each rank a page."""
    script, tools = Path(sys.argv[0] if sys.argv else ""), Path(__file__).resolve().parent.parent / "tools"
    is_command = script.resolve().parent == tools or any(name.startswith("megatron_ext.") for name in sys.orig_argv)
    if is_command and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_interrupted


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr)


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
