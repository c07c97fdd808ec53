"""The only file that runs kubectl."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from k8s.cluster.objects import ROOT, Object, load_documents
from pipeline.errors import ConfigError, DistillError

__all__ = ["Kubectl", "overlay_folder", "render_kustomization"]


class Kubectl:
    """Runs kubectl against the current context; `KUBECTL` names another program."""

    def __init__(self) -> None:
        """Find the program.

        Raises:
            DistillError: it is not installed.
        """
        wanted = os.environ.get("KUBECTL", "kubectl")
        program = shutil.which(wanted)
        if program is None:
            raise DistillError(
                f"{wanted}: no such program",
                expected="kubectl 1.27 or newer on the path",
                do="install it (https://kubernetes.io/docs/tasks/tools), or set KUBECTL=PATH",
            )
        self.program = program

    def run(
        self, *arguments: str, stdin: str | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; the caller checks the exit code.

        Raises:
            DistillError: no answer in time.
        """
        try:
            return subprocess.run(
                [self.program, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise DistillError(
                f"kubectl {arguments[0]} gave no answer within {timeout_s:g} s",
                do="check that the cluster can be reached: kubectl get nodes",
            ) from None

    def ask(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        """Run a command that must succeed; return its output.

        Raises:
            DistillError: it failed, with kubectl's message.
        """
        return _output(arguments, self.run(*arguments, stdin=stdin, timeout_s=timeout_s))

    def items(self, namespace: str, resource: str, labels: str) -> list[Object]:
        """Return the objects of a kind with these labels; none where the cluster has no such kind.

        Raises:
            DistillError: they cannot be read.
        """
        words = ("-n", namespace, "get", resource, "-l", labels, "-o", "json")
        done = self.run(*words)
        if "the server doesn't have a resource type" in done.stderr:
            return []
        found: list[Object] = json.loads(_output(words, done))["items"]
        return found

    def follow(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command whose lines go to this process's output."""
        return subprocess.Popen(
            [self.program, *arguments], stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )


def _output(arguments: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise DistillError(
            f"kubectl {' '.join(arguments[:2])} failed: {_first_lines(done.stderr)}",
            do="check the cluster and your rights (kubectl auth can-i create pytorchjobs)",
        )
    return done.stdout


def overlay_folder(overlay: str) -> Path:
    """Return the folder of an overlay: a name below k8s/overlays, or any folder.

    Raises:
        ConfigError: there is no kustomization of that name.
    """
    for folder in (ROOT / "overlays" / overlay, Path(overlay)):
        if overlay and (folder / "kustomization.yaml").is_file():
            return folder
    known = sorted(file.parent.name for file in (ROOT / "overlays").glob("*/kustomization.yaml"))
    raise ConfigError(
        f"overlay {overlay!r}: no such overlay",
        expected=f"one of {', '.join(known)}, or a folder with a kustomization.yaml",
    )


def render_kustomization(folder: Path) -> list[Object]:
    """Return the objects that `kubectl kustomize` makes of a folder.

    Raises:
        ConfigError: Kustomize rejects it.
        DistillError: kubectl is not installed.
    """
    done = Kubectl().run("kustomize", str(folder))
    if done.returncode:
        raise ConfigError(
            f"{folder}: Kustomize rejects it: {_first_lines(done.stderr)}",
            expected="a kustomization that `kubectl kustomize` renders",
        )
    return load_documents(done.stdout, source=str(folder))


def _first_lines(text: str) -> str:
    # kubectl wraps long reasons in a line of its log: E1124 11:55:04 ... err=< ... >
    lines = [
        re.sub(r'^[EWI]\d{4} .*?\] ("command failed" err=<)?', "", line.strip())
        for line in text.strip().splitlines()
    ]
    lines = [line for line in lines if line not in ("", ">")]
    said = " ".join(lines[:3]).removeprefix("error: ").removeprefix("Error: ")
    return said[:600] or "no reason"
