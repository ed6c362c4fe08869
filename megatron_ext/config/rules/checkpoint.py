"""Rules of what is saved and what stays."""

import os
import re

from megatron_ext.config.rules.registry import rule


@rule("checkpoint.keep_every", "checkpoint.keep_last")
@rule("checkpoint.keep_matching", "checkpoint.keep_last")
def _keeping_needs_removing(kept: object, keep_last: int | None) -> str | None:
    if kept is not None and keep_last is None:
        return "without keep_last every checkpoint stays; set it, such as 3, or leave this out"
    return None


@rule("checkpoint.keep_every", "checkpoint.save_interval")
def _kept_steps_are_saved(every: int | None, interval: int | None) -> str | None:
    if every is not None and (interval is None or every % interval):
        return "only steps of save_interval are saved; keep_every must be a multiple of it"
    return None


@rule("checkpoint.copy_to", "checkpoint.directory")
def _second_place_is_another(copy_to: str | None, directory: str) -> str | None:
    if copy_to is None or ("://" in copy_to and not copy_to.startswith("file://")):
        return None
    same = os.path.realpath(copy_to.removeprefix("file://")) == os.path.realpath(directory)
    return "both are one place" if same else None


@rule("checkpoint.keep_matching")
def _matching_is_an_expression(expression: str | None) -> str | None:
    try:
        re.compile(expression or "")
    except re.error as error:
        return f"is no regular expression: {error}"
    return None
