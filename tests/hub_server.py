"""A stand-in for the Hugging Face hub on this machine: repositories are made, committed to, listed and read by its own client."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

COMMIT = "c" * 40
Repositories = dict[str, dict[str, bytes]]


def handler(repositories: Repositories) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = self.path.strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                repositories.setdefault(name, {})
                self.answer({"url": f"{self.base}/{name}", "id": name})
            elif "validate-yaml" in parts:
                self.answer({"errors": [], "warnings": []})
            elif "preupload" in parts:
                how = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": each["path"], **how} for each in json.loads(body)["files"]]})
            elif "commit" in parts:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repositories["/".join(parts[2:4])][line["value"]["path"]] = content
                url = f"{self.base}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
                self.answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
            else:
                self.send_error(404)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            files = repositories.get(name)
            if files is None:
                self.send_error(404)
            elif parts[0] != "api":
                self.file(files.get("/".join(parts[4:])))
            elif "tree" in parts:
                self.answer([{"type": "file", "path": p, "size": len(f), "oid": digest(f)} for p, f in files.items()])
            else:
                self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

        do_HEAD = do_GET

        @property
        def base(self) -> str:
            return f"http://{self.headers['Host']}"

        def file(self, content: bytes | None) -> None:
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
            else:
                self.send(content, ETag=f'"{digest(content)}"', **{"X-Repo-Commit": COMMIT})

        def answer(self, value: Any) -> None:
            self.send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

        def send(self, content: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Repositories]:
    """The hub of this process, empty, with a token and a cache of its own."""
    repositories: Repositories = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(repositories))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    try:
        yield repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
