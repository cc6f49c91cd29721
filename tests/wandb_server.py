"""A stand-in for W&B's server on this machine: as much of its protocol as runs, resuming and uploading need."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "project", "name": "qwen-image", "entity": {"id": "entity", "name": "me"}}


class WandBServer:
    """Keeps one run. History and summary are files of lines that the client writes from an offset on."""

    def __init__(self):
        self.files: dict[str, list[str]] = {}
        self.config: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        self.run_exists = False
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "WandBServer":
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def history(self) -> list[dict[str, Any]]:
        """Rows in the order of their upload."""
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]

    def summary(self) -> dict[str, Any]:
        """The run's summary."""
        return json.loads(self.files["wandb-summary.json"][-1])

    def stream(self, body: dict[str, Any]) -> dict[str, Any]:
        """Takes lines of files, and the run's end."""
        for name, part in (body.get("files") or {}).items():
            lines = self.files.setdefault(name, [])
            lines[part["offset"] :] = part["content"]
        if "exitcode" in body:
            self.exit_codes.append(body["exitcode"])
        return {"exitcode": None, "limits": {}}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """A GraphQL query's data; nothing for those that need not be answered."""
        if operation == "Viewer":
            return {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertBucket":
            self.config |= json.loads(variables.get("config") or "{}")
            inserted, self.run_exists = not self.run_exists, True
            return {"upsertBucket": {"bucket": self._run(variables) | {"project": PROJECT}, "inserted": inserted}}
        if operation == "RunResumeStatus":
            return {"model": PROJECT | {"bucket": self._run(variables) if self.run_exists else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        history, events = (self.files.get(f"wandb-{name}.jsonl", []) for name in ("history", "events"))
        return {
            "id": "run",
            "name": variables["name"],
            "displayName": "name",
            "config": json.dumps(self.config),
            "summaryMetrics": self.files.get("wandb-summary.json", ["{}"])[-1],
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events),
            "eventsTail": json.dumps(events[-1:]),
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }


def _handler(server: WandBServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self._body())
            if self.path.endswith("/file_stream"):
                self._reply(server.stream(body))
                return
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            assert operation
            self._reply({"data": server.answer(operation[1], body.get("variables") or {})})

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler
