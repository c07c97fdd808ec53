"""A hub on this machine: the few addresses that an upload of a folder asks for, over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import yaml

from tests.json_server import JsonHandler, serving


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

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            if "/tree/" in self.path:
                names = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in hub.files.items()
                ]
                return self.answer(names)
            return self.answer({"error": "not found"}, 404)

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body = self.body()
            if self.path.startswith("/api/repos/create"):
                asked = json.loads(body)
                name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                return self.answer({"url": f"{hub.url}/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                front = json.loads(body)["content"].split("---")[1]
                yaml.safe_load(front)
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if "/commit/" in self.path:
                hub.attempts += 1
                if hub.failing:
                    return self.answer({"error": "no"}, hub.failing.pop(0), Retry_After="1")
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
                return self.answer({"commitUrl": address, "commitOid": "0" * 40})
            return self.answer({"error": "not found"}, 404)

    with serving(Handler) as hub.url:
        yield hub
