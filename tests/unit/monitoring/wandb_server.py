"""A server that answers Weights & Biases' client just enough to start a run, and can go away."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_USER = {
    "id": "1",
    "entity": "team",
    "username": "someone",
    "flags": "{}",
    "teams": {"edges": []},
    "apiKeys": {"edges": []},
}
_PROJECT = {"id": "p", "name": "megatron_ext", "entity": {"id": "e", "name": "team"}}


class WandbServer:
    """Runs in a thread. `started` holds the run ids it was asked to start, `history` what was logged to it, `alerts`
    what it should tell people.

    Args:
        only_start: go away as soon as a run has started.
    """

    def __init__(self, *, only_start: bool = False) -> None:
        self._only_start = only_start
        self.started: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def go_away(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.extend(map(json.loads, lines))
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        data: dict[str, Any] = {"viewer": _USER, "model": None, "serverInfo": {"cliVersionInfo": {}, "features": []}}
        if "RunResumeStatus" in request["query"] and self.started:
            data["model"] = {"id": "p", "name": "megatron_ext", "entity": _PROJECT["entity"], "bucket": self._resumed()}
        if "upsertBucket" in request["query"]:
            name = request["variables"]["name"]
            self.started.append(name)
            bucket = {
                "id": "b",
                "name": name,
                "displayName": name,
                "config": "{}",
                "project": _PROJECT,
                "historyLineCount": len(self.history),
            }
            data["upsertBucket"] = {"bucket": bucket, "inserted": True}
        if "notifyScriptableRunAlert" in request["query"]:
            self.alerts.append(request["variables"])
            data["notifyScriptableRunAlert"] = {"success": True}
        if "createRunFiles" in request["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in request["variables"]["files"]]
            data["createRunFiles"] = {"runID": "b", "uploadHeaders": [], "files": files}
        return {"data": data}

    def _resumed(self) -> dict[str, Any]:
        """What a client that goes on with the run is told of it."""
        tail = [json.dumps(line) for line in self.history[-1:]]
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return {"id": "b", "name": self.started[-1], "tags": [], "wandbConfig": '{"t": 1}', **counts, **tails}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                content = json.dumps(server._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                if server._only_start and server.started:
                    threading.Thread(target=server.go_away).start()

            do_GET = do_PUT = do_POST  # noqa: N815 - the base class's names

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        return Handler
