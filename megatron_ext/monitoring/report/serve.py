"""Serves the page of runs that are still going on: it asks for what is new, and draws it."""

import json
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.monitoring.report.page import report_page, section_names, tables
from megatron_ext.monitoring.report.phases import Phase, RunFiles
from megatron_ext.monitoring.report.plots import plot_data

_HERE = "127.0.0.1"


class ReportServer:
    """Answers on this machine alone, on `port`; 0 takes a free one.

    Raises:
        ConfigError: the port is taken.
        DataError: a metrics file cannot be read.
    """

    def __init__(self, entries: Sequence[str], title: str, port: int) -> None:
        self._title, self._files = title, RunFiles(entries)
        self._files.update()
        self._lock = threading.Lock()
        self._number = 1
        """Of what was read; it grows with every update."""
        self._page = self._data = b""
        """What answers, and of which number."""
        self._made = 0
        try:
            self._server = ThreadingHTTPServer((_HERE, port), self._handler())
        except OSError as error:
            raise ConfigError(f"--serve {port}: {error.strerror}; choose another port") from error
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{_HERE}:{self._server.server_port}/"

    def serve(self) -> None:
        """Answer until `close`, or Ctrl-C."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def page(self) -> bytes:
        """The page as it is now."""
        with self._lock:
            self._look()
            return self._page

    def news(self, seen: int) -> bytes | None:
        """All that is drawn, ready for JSON; None where number `seen` is the newest."""
        with self._lock:
            self._look()
            return None if seen == self._number else self._data

    def _look(self) -> None:
        """Read what is new, and make of it what is sent."""
        if self._files.update():
            self._number += 1
        if self._made == self._number:
            return
        phases: list[Phase] = [phase for phase in self._files.phases() if phase.steps]
        names = section_names(phases)
        self._page = report_page(self._title, phases, live=self._number).encode(errors="replace")
        news = {"number": self._number, "sections": names, "tables": tables(phases), "data": plot_data(phases)}
        self._data = json.dumps(news, allow_nan=False).encode()
        self._made = self._number

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host = (self.headers.get("Host") or "").partition(":")[0]  # without its port, which is left out for 80
                if host not in (_HERE, "localhost"):
                    # A page of elsewhere, whose name was made to mean this machine, reads nothing here.
                    self._send(HTTPStatus.FORBIDDEN, b"", "text/plain")
                    return
                place = urlsplit(self.path)
                try:
                    if place.path == "/":
                        self._send(HTTPStatus.OK, owner.page(), "text/html; charset=utf-8")
                    elif place.path == "/news":
                        seen = (parse_qs(place.query).get("seen") or [""])[0]
                        news = owner.news(int(seen) if seen.isdecimal() else 0)
                        status = HTTPStatus.OK if news is not None else HTTPStatus.NO_CONTENT
                        self._send(status, news or b"", "application/json")
                    else:
                        self._send(HTTPStatus.NOT_FOUND, b"", "text/plain")
                except MegatronExtError as error:  # the file went away
                    self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain; charset=utf-8")
                except ConnectionError:
                    pass  # the reader went away

            def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        return Handler
