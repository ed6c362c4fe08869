"""A port for processes of this machine that will meet at it."""

import random
import socket

_BELOW_EPHEMERAL = range(15_000, 32_768)
"""Linux gives outgoing connections ports from 32768 on (ip_local_port_range): one of these may be taken between
choosing it and listening at it, seconds later in another process."""


def free_port() -> int:
    """A port that nobody listens at now, and that no outgoing connection will be given."""
    while True:
        with socket.socket() as probe:
            port = random.SystemRandom().choice(_BELOW_EPHEMERAL)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
