"""Which rank all others wait for, and what a main thread is at."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.runtime.main_thread import MainThread, Standing, _place, late_rank
from tests.support import waiting

WAITS = Standing(waiting=50, still=50, in_step=False, steps=7, place="")
HANGS = replace(WAITS, waiting=0)
WORKS = replace(HANGS, still=0)


@pytest.mark.parametrize(
    ("standings", "late"),
    [
        ([WAITS, HANGS, WAITS], 1),
        ([WAITS, WAITS, replace(WORKS, in_step=True)], 2),
        ([WAITS, WORKS], None),  # saving, or validating
        ([replace(WAITS, waiting=30), HANGS], None),  # not yet
        ([WAITS, HANGS, HANGS], None),  # nobody can say for which of the two
        ([WAITS, WAITS], None),
        ([HANGS], None),
        ([replace(WAITS, steps=0), replace(HANGS, steps=0)], None),  # compiling
        ([replace(WAITS, steps=0), replace(HANGS, steps=0, still=500)], 1),
    ],
)
def test_the_rank_for_which_all_others_wait(standings: list[Standing], late: int | None) -> None:
    assert late_rank(standings, patience=40) == late


def test_what_the_main_thread_is_at() -> None:
    main, seen, go_on = MainThread(), [], threading.Event()

    def look() -> None:
        while not (first := main.look()).place.endswith("in wait: waiter.acquire(True, timeout)"):
            time.sleep(0.01)  # it has not come there yet
        seen.extend([first, main.look()])
        go_on.set()

    threading.Thread(target=look, daemon=True).start()
    assert go_on.wait(waiting.HANGS), main.look()
    first, second = seen
    assert "threading.py" in first.place
    assert first.waiting == first.still == 0
    assert second.still > 0
    assert second.waiting == 0  # for another thread, and not for a rank


def test_an_instruction_that_is_of_no_line_is_looked_at_too() -> None:
    """A look comes at any instruction; an error would end the thread that looks, and with it the run."""

    code = SimpleNamespace(co_filename="f.py", co_name="leave", co_positions=lambda: iter([(None, None, None, None)]))
    frame: Any = SimpleNamespace(f_code=code, f_lasti=0, f_lineno=None)
    assert _place(frame) == (False, "f.py, line None, in leave: no line of its source")
