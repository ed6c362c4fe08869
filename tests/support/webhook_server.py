"""An HTTP server that takes what Slack's webhooks take, and may refuse it, be slow or be away."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebhookServer:
    """Runs in a thread. `texts` holds what it took, `tries` how often it was asked.

    Args:
        answers: HTTP statuses of the first requests; 200 after them.
        port: 0 takes a free one.
    """

    def __init__(self, answers: list[int] | None = None, port: int = 0) -> None:
        self.texts: list[str] = []
        self.tries = 0
        self.hangs = threading.Event()
        """Set: it answers."""
        self.hangs.set()
        owner, statuses = self, list(answers or [])

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.tries += 1
                owner.hangs.wait(10)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = statuses.pop(0) if statuses else 200
                if status == 200:
                    owner.texts.append(body["text"])
                self.send_response(status)
                if status // 100 == 3:
                    self.send_header("Location", "/sign-in")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                """A page, as whoever signs people in has one."""
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_port)
        self.url = f"http://127.0.0.1:{self.port}/services/T0/B0/secret-token"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
