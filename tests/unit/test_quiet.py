"""Of what libraries say, the known lines that help nobody are left out, and no others."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from megatron_ext.quiet import without_loading_bars
from tests.support.workspace import ROOT


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


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted\n"), ("1", "")])
def test_ctrl_c_while_a_command_imports_is_said_in_a_word_by_one_rank(rank: str, said: str) -> None:
    interrupt = "import sys; sys.argv = ['tools/train.py']; import megatron_ext; raise KeyboardInterrupt"
    process = subprocess.run(
        [sys.executable, "-c", interrupt],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGINT
    assert process.stderr == said
