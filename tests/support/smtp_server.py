"""A mail server on this machine, as far as a client needs one: HELO, STARTTLS, AUTH, MAIL, RCPT, DATA."""

import base64
import socketserver
import ssl
import threading
from typing import Any


class SmtpServer:
    """Runs in a thread. `mails` holds the text of each mail it took.

    Args:
        tls: offers STARTTLS, and takes no mail before it.
        password: takes no mail before somebody has logged in with it.
        refuses: the code with which it refuses recipients; 0 takes them.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, password: str | None = None, refuses: int = 0) -> None:
        self.tls, self.password, self.refuses = tls, password, refuses
        self.mails: list[str] = []
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Session)
        self._server.daemon_threads = True
        self._server.owner = self  # type: ignore[attr-defined]
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Session(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        owner: SmtpServer = self.server.owner  # type: ignore[attr-defined]
        is_safe, is_known = owner.tls is None, owner.password is None
        self._say("220 here")
        while line := self.rfile.readline().decode().strip():
            word, _, rest = line.partition(" ")
            word = word.upper()
            if word == "EHLO":
                offers = ["here", *(["STARTTLS"] if not is_safe else ["AUTH PLAIN"])]
                for number, offer in enumerate(offers):
                    self._say(f"250{' ' if number == len(offers) - 1 else '-'}{offer}")
            elif word == "STARTTLS" and owner.tls is not None:
                self._say("220 go on")
                self.request = owner.tls.wrap_socket(self.request, server_side=True)
                self.rfile, self.wfile = self.request.makefile("rb"), self.request.makefile("wb", 0)
                is_safe = True
            elif word == "AUTH" and is_safe:
                given = base64.b64decode(rest.split()[1]).split(b"\0")[2].decode()
                is_known = given == owner.password
                self._say("235 welcome" if is_known else f"535 wrong password {given}")
            elif word == "MAIL":
                self._say("250 ok" if is_safe and is_known else "530 log in first")
            elif word == "RCPT":
                self._say(f"{owner.refuses} not here" if owner.refuses else "250 ok")
            elif word == "DATA":
                self._say("354 go on")
                owner.mails.append(self._data())
                self._say("250 taken")
            elif word == "QUIT":
                self._say("221 bye")
                return
            else:
                self._say("250 ok" if word == "RSET" else "502 no such thing")

    def _data(self) -> str:
        lines: list[bytes] = []
        while (line := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(line)
        return b"".join(lines).decode()

    def _say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


def certificate_context(certificate: Any, key: Any) -> ssl.SSLContext:
    """What a server needs to show `certificate`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
