"""A server that speaks as much of the Hugging Face Hub's API as one upload needs, and keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """What came."""

    address: str
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuse: bool = False
    """Answer every request as the hub answers a token without rights."""


@contextmanager
def hub_server() -> Iterator[Received]:
    """Serve on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"error": "not found"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.tokens.add(self.headers["Authorization"])
            if received.refuse:
                self._answer({"error": "You don't have the rights to create a model"}, 403)
            elif self.path == "/api/validate-yaml":  # the header of README.md
                self._answer({"errors": [], "warnings": []})
            elif self.path == "/api/repos/create":
                received.repositories.append(json.loads(body))
                name = json.loads(body)["name"]
                self._answer({"url": f"{received.address}/me/{name}", "id": name, "name": f"me/{name}"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._answer({"files": files})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        received.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._answer({"commitUrl": f"{received.address}/me/x/commit/1", "commitOid": "1"})
            else:
                self._answer({"error": f"not known here: {self.path}"}, 404)

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Received(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
