"""Data sets of a hub on this machine: listed, read by range, and committed to, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from tests.json_server import JsonHandler, serving

__all__ = ["HubDatasets", "serve_datasets", "use_hub"]

_LARGE = ".parquet"
"""Files that the hub keeps as large ones: it tells their SHA-256."""


@dataclass
class HubDatasets:
    """What is there, and what goes wrong."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name, by `owner/name`."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    """Message and names of each commit, in order."""
    failing: list[int] = field(default_factory=list)
    """Answers to the next commits, instead of taking them; each is used up."""
    reading: list[int] = field(default_factory=list)
    """Answers to the next reads of files."""
    keep_wrong: str = ""
    """A name whose content is kept with a flipped byte, once."""
    reads: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


@contextmanager
def serve_datasets() -> Iterator[HubDatasets]:
    """Serve a hub on a free port."""
    hub = HubDatasets()

    class Handler(JsonHandler):
        def _missing(self, what: str) -> None:
            self.answer({"error": "not found"}, 404, X_Error_Code=what)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path):
                if found[1] not in hub.repositories:
                    return self._missing("RepoNotFound")
                return self.answer({"id": found[1], "sha": "0" * 40, "private": False})
            if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
                return self._tree(found[1], (found[2] or "").strip("/"))
            if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
                return self._file(hub.repositories.get(found[1], {}), found[2])
            return self._missing("RepoNotFound")

        def _tree(self, repository: str, folder: str) -> None:
            if repository not in hub.repositories:
                return self._missing("RepoNotFound")
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            prefix = f"{folder}/" if folder else ""
            names = [n for n in hub.repositories[repository] if n.startswith(prefix)]
            if folder and not names:
                return self._missing("EntryNotFound")
            listed: dict[str, Any] = {}
            for name in names:
                head, slash, _ = name.removeprefix(prefix).partition("/")
                if slash:
                    listed[prefix + head] = {"type": "directory", "path": prefix + head}
                if not slash or deep:
                    listed[name] = self._entry(name, hub.repositories[repository][name])
            for item in listed.values():
                item.setdefault("oid", "1" * 40)
                item.setdefault("size", 0)
            return self.answer(list(listed.values()))

        def _entry(self, name: str, data: bytes) -> dict[str, Any]:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
            if name.endswith(_LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry |= {"oid": "2" * 40}
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            return entry

        def _file(self, files: dict[str, bytes], name: str) -> None:
            hub.reads.append(name)
            if hub.reading:
                return self.answer({"error": "no"}, hub.reading.pop(0))
            if name not in files:
                return self._missing("EntryNotFound")
            data = files[name]
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                data = data[int(wanted[1]) : int(wanted[2]) + 1]
            return self.send(206 if wanted else 200, data, ETag='"x"')

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body = self.body()
            if self.path.startswith("/api/repos/create"):
                asked = json.loads(body)
                name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                hub.repositories.setdefault(name, {".gitattributes": b"*.parquet lfs\n"})
                hub.private[name] = "private" in (asked.get("visibility"), *asked)
                return self.answer({"url": f"{hub.url}/datasets/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if "/paths-info/" in self.path:
                return self.answer([])
            if found := re.match(r"/api/datasets/([^/]+/[^/]+)/commit/", self.path):
                return self._commit(found[1], body)
            return self._missing("RepoNotFound")

        def _commit(self, repository: str, body: bytes) -> None:
            if hub.failing:
                return self.answer({"error": "no"}, hub.failing.pop(0), Retry_After="0")
            lines = [json.loads(line) for line in body.splitlines() if line]
            (header,) = [line["value"] for line in lines if line["key"] == "header"]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            if hub.keep_wrong in added:
                data = added[hub.keep_wrong]
                added[hub.keep_wrong] = bytes([data[0] ^ 1]) + data[1:]
                hub.keep_wrong = ""
            hub.repositories[repository] |= added
            hub.commits.append((header["summary"], sorted(added)))
            address = f"{hub.url}/datasets/{repository}/commit/{'0' * 40}"
            return self.answer({"commitUrl": address, "commitOid": "0" * 40})

    with serving(Handler) as hub.url:
        yield hub


def use_hub(patch: pytest.MonkeyPatch, hub: HubDatasets, *, token: str | None = "hf_test") -> None:
    """Send the hub's client of this process to a server; its constants are read at import."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.hf_file_system import HfFileSystem

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        patch.setattr(constants, name, True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub, "get_token", lambda: token)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("no_proxy", "127.0.0.1")
    if token:
        patch.setenv("HF_TOKEN", token)
    HfFileSystem.clear_instance_cache()
