"""Says in one message which rank is missing, to people and to those who are told, before this process ends."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from megatron_ext.runtime.hearts import Hearts

OWN_END = 5.0
"""Seconds in which a rank may meet the fault with which another one has ended."""
TELLING = 20.0
"""Seconds that those who are told of the end have for it."""
_FIRST = 3.0
"""Seconds by which others end after whoever speaks: a launcher ends all once one has ended."""

Told = Callable[[str, str, bool], None]
"""Takes the kind of an event that ends the run (`lost_rank`, `stall`), a line on it, and whether the process ends right
after, so that this is the last moment to finish records. Called on rank 0, by a thread of its own."""


def tell_nobody(kind: str, text: str, ends: bool) -> None:
    """For runs that nobody is told of."""


class LastWords:
    """What a rank says when the run ends because of another one.

    Args:
        way_out: what to do then; the end of the message.
        told: of what ends the run so; may be set to another meanwhile.
    """

    def __init__(self, hearts: Hearts, way_out: str, told: Told) -> None:
        self._hearts, self._way_out, self.told = hearts, way_out, told

    def say_lost(self, lost: int, silence: float, *, ends: bool = True) -> None:
        """Say who is missing, unless another rank has, or the missing one itself.

        Args:
            silence: seconds for which it has not been heard, where its process is not known to have ended.
            ends: this process ends right after.
        """
        why = self._hearts.why(lost)
        is_first, text = True, self._message(lost, why, silence)
        with contextlib.suppress(RuntimeError):
            self._hearts.give_up(lost)
            is_first = self._hearts.is_first_to_say()
        if why:
            is_first = self._hearts.speaks_for_its_host(lost)
        if is_first:
            self.speak(text, "" if why else self._way_out)
        if self._hearts.rank == 0:
            self.tell("lost_rank", text, ends=ends)
        elif not is_first:
            time.sleep(_FIRST)
        peer = self._hearts.near(lost)
        if peer is not None and why:
            self._let_speak(lost)
        if peer is not None and peer.is_alive:
            with contextlib.suppress(OSError):  # stopped, it would keep the launcher waiting
                os.kill(peer.pid, signal.SIGKILL)

    def _message(self, lost: int, why: str, silence: float) -> str:
        name = self._hearts.name(lost)
        if why:
            return f"{name} has ended: {why}"
        peer = self._hearts.near(lost)
        what = f"has not answered for {silence:.0f} s" if peer is None or peer.is_alive else "has ended"
        look = "Look for what ended or stopped it (memory, its host)"
        return f"{name} {what}, without which the others cannot go on. {look}"

    def _let_speak(self, ending: int) -> None:
        """Wait until a rank of this host that says itself why it ends has ended: a launcher would end it with this."""
        deadline, peer = time.monotonic() + TELLING + OWN_END, self._hearts.near(ending)
        while peer is not None and peer.is_alive and time.monotonic() < deadline:
            time.sleep(0.2)

    def speak(self, text: str, way_out: str | None = None) -> None:
        """Say it to people. The way out is that of all these messages, where none is given."""
        way_out = self._way_out if way_out is None else way_out
        with contextlib.suppress(OSError):
            os.write(2, f"error: {'; '.join(filter(None, (text, way_out)))}\n".encode())

    def tell(self, kind: str, text: str, *, ends: bool = True) -> None:
        """Tell those who are told why the run ends; they cannot hold it up."""
        at_most(TELLING, lambda: self.told(kind, text, ends))


def at_most(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` on a thread of its own and wait so long for it: what hangs there holds up nobody."""
    thread = threading.Thread(target=work, name=f"at most {seconds:g} s", daemon=True)
    thread.start()
    thread.join(seconds)
