"""Of what libraries say, the known lines that help nobody are left out, and no others."""

import logging

import pytest

from megatron_ext.quiet import without_loading_bars


def test_known_lines_are_left_out_and_others_of_the_same_logger_shown(caplog: pytest.LogCaptureFixture) -> None:
    transformers = logging.getLogger("transformers.configuration_utils")
    transformers.warning("You are using a model of type `%s` to instantiate a model of type `%s`.", "megatron_ext", "")
    assert caplog.messages == []
    transformers.error("something else")
    assert caplog.messages == ["something else"]


def test_loading_bars_are_off_inside_only() -> None:
    from transformers.utils.logging import is_progress_bar_enabled

    assert is_progress_bar_enabled()
    with without_loading_bars():
        assert not is_progress_bar_enabled()
    assert is_progress_bar_enabled()
