"""A hub on this machine: the few addresses that an upload of a folder asks for, over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Hub:
    """What was pushed, and what goes wrong."""

    url: str = ""
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Message and files of each commit, in order."""
    failing: list[int] = field(default_factory=list)
    """Answers to the next commits, instead of taking them; each is used up."""
    tokens: set[str] = field(default_factory=set)
    attempts: int = 0

    @property
    def files(self) -> dict[str, bytes]:
        """All files as they are now."""
        return {name: data for _, files in self.commits for name, data in files.items()}

    def env(self) -> dict[str, str]:
        """Variables that send the client here."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_a_test",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }  # fmt: skip


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def _answer(self, data: Any, code: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if code == 429:
                self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_GET(self) -> None:
            if "/tree/" in self.path:
                names = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in hub.files.items()
                ]
                return self._answer(names)
            return self._answer({"error": "not found"}, 404)

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body = self._body()
            if self.path.startswith("/api/repos/create"):
                asked = json.loads(body)
                name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                return self._answer({"url": f"{hub.url}/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                front = json.loads(body)["content"].split("---")[1]
                yaml.safe_load(front)
                return self._answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._answer({"files": files})
            if "/commit/" in self.path:
                hub.attempts += 1
                if hub.failing:
                    return self._answer({"error": "no"}, hub.failing.pop(0))
                lines = [json.loads(line) for line in body.splitlines() if line]
                (header,) = [line["value"] for line in lines if line["key"] == "header"]
                added = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                hub.commits.append((header["summary"], added))
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                address = f"{hub.url}/{name}/commit/{'0' * 40}"
                return self._answer({"commitUrl": address, "commitOid": "0" * 40})
            return self._answer({"error": "not found"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
