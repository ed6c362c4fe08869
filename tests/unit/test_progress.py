"""Amounts of bytes that were done: always three digits, however small."""

import time

import pytest

from megatron_ext.progress import amount_of_bytes, byte_progress, counted


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (812.4, "812 bytes"),
        (81_200, "81.2 kB"),
        (999_600, "1 MB"),
        (3.21e9, "3.21 GB"),
        (2e15, "2,000 TB"),
    ],
)
def test_amounts(count: float, text: str) -> None:
    assert amount_of_bytes(count) == text


def test_short_work_has_a_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)  # it took no time that the clock can tell
    with byte_progress("reading") as progress:
        progress(300, 300)
    assert capsys.readouterr().err.startswith("reading: 300 bytes in 0.001 s (300 kB/s)")


def test_counting_changes_nothing_and_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(iter(range(250)), "documents read")) == list(range(250))
    assert capsys.readouterr().err.strip() == ""
