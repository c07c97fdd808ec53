"""A small loopback stand-in of the Kubernetes API server, for the real kubectl.

Discovery, create, read, list, watch, patch, delete and pod logs of the kinds this project uses.
What happens to a job is a script that the test gives.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from k8s.checks.schema import schema_mistakes
from tests.cluster.api_discovery import api_version, discovery, route

Object = dict[str, Any]


Script = Callable[["ApiStub", Object], None]


class ApiStub:
    """The objects, what was requested, and what happens to a job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.logs: dict[str, str] = {}
        self.created: list[str] = []
        """`Kind/name` of everything that was created, in order."""
        self.reject: Callable[[Object], str | None] = lambda _item: None
        self.scripts: dict[str, Script] = {}
        """By kind: runs in a thread after an object of that kind was created."""
        self._version = 0
        self._changed = threading.Condition()
        stub = self

        class Handler(_Handler):
            api = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> ApiStub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What kubectl needs to find this server and nothing else."""
        port = self._server.server_address[1]
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stub", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "stub", "user": {}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub"}}],
            "current-context": "stub",
        }
        file = self.folder / "kubeconfig.json"
        file.write_text(json.dumps(config))
        return {"KUBECONFIG": str(file), "HOME": str(self.folder), "NO_PROXY": "127.0.0.1"}

    def put(self, item: Object) -> None:
        """Store an object and wake the watches."""
        with self._changed:
            self._version += 1
            item["metadata"]["resourceVersion"] = str(self._version)
            item["metadata"].setdefault("uid", f"uid-{self._version}")
            item["metadata"].setdefault("creationTimestamp", "2026-11-24T12:00:00Z")
            self.objects[_key(item)] = item
            self._changed.notify_all()

    def remove(self, key: tuple[str, str, str]) -> Object | None:
        """Delete an object and its pods."""
        with self._changed:
            item = self.objects.pop(key, None)
            self._version += 1
            self._changed.notify_all()
            return item

    def get(self, kind: str, name: str) -> Object | None:
        """Return an object of any namespace."""
        for (found_kind, _, found_name), item in list(self.objects.items()):
            if (found_kind, found_name) == (kind, name):
                return item
        return None

    def create(self, item: Object) -> None:
        """Store a new object and start its script."""
        if item["kind"] == "Job":
            label = {"job-name": item["metadata"]["name"]}
            item["spec"]["selector"] = {"matchLabels": label}
            item["spec"]["template"]["metadata"].setdefault("labels", {}).update(label)
        self.created.append(f"{item['kind']}/{item['metadata']['name']}")
        self.put(item)
        script = self.scripts.get(item["kind"])
        if script is not None:
            threading.Thread(target=script, args=(self, item), daemon=True).start()

    def set_status(self, item: Object, status: Object) -> None:
        """Write an object's status, as its controller does; nothing where it was deleted."""
        current = self.objects.get(_key(item))
        if current is not None:
            changed = copy.deepcopy(current)
            changed["status"] = {**(changed.get("status") or {}), **status}
            self.put(changed)

    def end_job(self, item: Object, kind: str, *, reason: str = "", completed: bool = True) -> None:
        """Set the final condition of a job."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": reason}
        status: Object = {"conditions": [condition]}
        if completed:
            status["completionTime"] = "2026-11-24T12:30:00Z"
        self.set_status(item, status)

    def add_pod(
        self,
        job: Object,
        *,
        log: str,
        phase: str = "Running",
        waiting: str = "",
        ended: Object | None = None,
    ) -> None:
        """Add the pod of a job: worker-0 of a PyTorchJob, the only one of a Job.

        Args:
            waiting: why its container does not run.
            ended: how its container ended last (`lastState.terminated`).
        """
        name = job["metadata"]["name"]
        trainer = job["kind"] == "PyTorchJob"
        template = (job["spec"]["pytorchReplicaSpecs"]["Worker"] if trainer else job["spec"])[
            "template"
        ]
        labels = dict(template["metadata"].get("labels") or {})
        labels |= {"training.kubeflow.org/job-name" if trainer else "job-name": name}
        pod_name = f"{name}-worker-0" if trainer else f"{name}-abcde"
        container = template["spec"]["containers"][0]["name"]
        state = (
            {"waiting": {"reason": waiting, "message": "it is not there"}}
            if waiting
            else {"running": {"startedAt": "2026-11-24T12:00:00Z"}}
        )
        last = {} if ended is None else {"lastState": {"terminated": ended}}
        restarts = 0 if ended is None else 1
        self.logs[pod_name] = log
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": pod_name,
                    "namespace": job["metadata"]["namespace"],
                    "labels": labels,
                },
                "spec": copy.deepcopy(template["spec"]),
                "status": {
                    "phase": phase,
                    "containerStatuses": [
                        {"name": container, "state": state, "restartCount": restarts, **last}
                    ],
                },
            }
        )

    def wait_for_change(self, version: int, seconds: float) -> int:
        """Return the newest version, at once when it is newer than the one given."""
        with self._changed:
            if self._version <= version:
                self._changed.wait(seconds)
            return self._version


def _key(item: Object) -> tuple[str, str, str]:
    metadata = item["metadata"]
    return item["kind"], metadata.get("namespace", ""), metadata["name"]


class _Handler(BaseHTTPRequestHandler):
    api: ApiStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = [part for part in url.path.split("/") if part]
        if found := discovery(parts):
            self._answer(200, found)
            return
        kind, namespace, name, rest = route(parts)
        if kind is None:
            self._error(404, "NotFound", f"no such path: {url.path}")
        elif rest == ["log"]:
            self._text(self.api.logs.get(name or "", ""))
        elif name is not None:
            item = self.api.objects.get((kind, namespace, name))
            if item is None:
                self._error(404, "NotFound", f'{kind} "{name}" not found')
            else:
                self._answer(200, item)
        elif query.get("watch") in ("1", "true"):
            self._watch(kind, namespace, query)
        else:
            items = self._selected(kind, namespace, query)
            version = str(self.api.wait_for_change(-1, 0))
            head = {"apiVersion": api_version(kind), "kind": f"{kind}List"}
            self._answer(200, {**head, "metadata": {"resourceVersion": version}, "items": items})

    def do_POST(self) -> None:
        item = self._body()
        parts = [part for part in urlparse(self.path).path.split("/") if part]
        kind, namespace, _, _ = route(parts)
        assert kind == item["kind"], (kind, item["kind"])
        if namespace:
            item["metadata"]["namespace"] = namespace
        reason = self.api.reject(item)
        if "fieldValidation=Strict" in self.path and reason is None:
            reason = "; ".join(schema_mistakes(item)) or None
        if reason is not None:
            self._error(422, "Invalid", reason)
            return
        self.api.create(item)
        self._answer(201, item)

    def do_PATCH(self) -> None:
        patch = self._body()
        kind, namespace, name, _ = route([p for p in urlparse(self.path).path.split("/") if p])
        item = self.api.objects.get((str(kind), namespace, str(name)))
        if item is None:
            self._error(404, "NotFound", f'{kind} "{name}" not found')
            return
        changed = _merged(copy.deepcopy(item), patch)
        self.api.put(changed)
        self._answer(200, changed)

    def do_DELETE(self) -> None:
        self._body()
        kind, namespace, name, _ = route([p for p in urlparse(self.path).path.split("/") if p])
        item = self.api.remove((str(kind), namespace, str(name)))
        if item is None:
            self._error(404, "NotFound", f'{kind} "{name}" not found')
            return
        self._answer(200, {"apiVersion": "v1", "kind": "Status", "status": "Success"})

    def _selected(self, kind: str, namespace: str, query: dict[str, str]) -> list[Object]:
        found = []
        for (item_kind, item_namespace, name), item in sorted(self.api.objects.items()):
            if item_kind != kind or (namespace and item_namespace != namespace):
                continue
            wanted = query.get("fieldSelector", "").removeprefix("metadata.name=")
            if wanted and wanted != name:
                continue
            labels = item["metadata"].get("labels") or {}
            selector = [part.split("=", 1) for part in query.get("labelSelector", "").split(",")]
            if all(len(part) < 2 or labels.get(part[0]) == part[1] for part in selector):
                found.append(item)
        return found

    def _watch(self, kind: str, namespace: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        end = time.monotonic() + float(query.get("timeoutSeconds", 30))
        # What changed between a list and its watch is an event of the watch.
        listed = int(query.get("resourceVersion") or 0)
        seen = {
            _key(item): item["metadata"]["resourceVersion"]
            for item in self._selected(kind, namespace, query)
            if int(item["metadata"]["resourceVersion"]) <= listed
        }
        version = -1
        try:
            while time.monotonic() < end:
                current = {_key(item): item for item in self._selected(kind, namespace, query)}
                for key, item in current.items():
                    if seen.get(key) != item["metadata"]["resourceVersion"]:
                        self._event("MODIFIED" if key in seen else "ADDED", item)
                        seen[key] = item["metadata"]["resourceVersion"]
                for key in set(seen) - set(current):
                    del seen[key]
                    gone = {"name": key[2], "namespace": key[1]}
                    head = {"apiVersion": api_version(kind), "kind": kind}
                    self._event("DELETED", {**head, "metadata": gone})
                version = self.api.wait_for_change(version, 0.5)
        except OSError:
            return  # kubectl has closed the connection

    def _event(self, kind: str, item: Object) -> None:
        self.wfile.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
        self.wfile.flush()

    def _body(self) -> Object:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body: Object = json.loads(data) if data else {}
        return body

    def _answer(self, code: int, item: Object) -> None:
        data = json.dumps(item).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _text(self, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, code: int, reason: str, message: str) -> None:
        head = {"apiVersion": "v1", "kind": "Status", "status": "Failure"}
        self._answer(code, {**head, "code": code, "reason": reason, "message": message})


def _merged(base: Any, patch: Any) -> Any:
    """A merge patch (RFC 7386)."""
    if not isinstance(patch, dict) or not isinstance(base, dict):
        return patch
    for name, value in patch.items():
        if value is None:
            base.pop(name, None)
        else:
            base[name] = _merged(base.get(name), value)
    return base
