"""Pods as processes: the manifest's command, args, environment, mounts and hostname.

Where the user may make namespaces, each pod has its own network, hostname, processes and a
read-only root file system with the manifest's volumes at their places (`Isolation.NAMESPACES`).
Elsewhere the paths of the mounts are rewritten to folders, and the rendezvous goes over a port of
the loopback (`Isolation.LOOPBACK`).
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k8s.cluster.objects import Object, find, main_container, pod_spec
from tests.stage_runner import ROOT

NETWORK = "10.77.0"
_CODE = sorted({str(ROOT), str(Path(sys.prefix).resolve()), str(Path(sys.base_prefix).resolve())})


class Isolation(enum.Enum):
    """How far pods are apart."""

    NAMESPACES = "namespaces"
    LOOPBACK = "loopback"


def best_isolation() -> Isolation:
    """Return namespaces where this user may make them."""
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip", "mount", "chroot")):
        return Isolation.LOOPBACK
    probe = [*_unshare(), "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
    script = "ip link add b0 type bridge && ip link add v0 type veth peer name v1"
    done = subprocess.run([*probe, "sh", "-c", script], capture_output=True, check=False)
    return Isolation.LOOPBACK if done.returncode else Isolation.NAMESPACES


def _unshare() -> list[str]:
    return ["unshare"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]


@dataclass
class Node:
    """Where pods run: a bridge of their own, a volume, a folder for logs and mounts."""

    work: Path
    volume: Path
    isolation: Isolation
    addresses: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    _anchor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Node:
        self.work.mkdir(parents=True, exist_ok=True)
        if self.isolation is Isolation.NAMESPACES:
            script = "ip link add pods type bridge && ip link set pods up && echo up && exec cat"
            self._anchor = subprocess.Popen(
                [*_unshare(), "--net", "--mount", "sh", "-c", script],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self._anchor.stdout is not None
            assert self._anchor.stdout.readline() == b"up\n"
        return self

    def __exit__(self, *_: object) -> None:
        if self._anchor is not None:
            assert self._anchor.stdin is not None
            self._anchor.stdin.close()
            self._anchor.wait(10)

    def entered(self) -> list[str]:
        """Return the command prefix that enters this node's namespaces."""
        assert self._anchor is not None
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self._anchor.pid), *user, "--net", "--mount"]

    def address(self, pod: str) -> str:
        """Return the pod's address; it keeps it over restarts."""
        return self.addresses.setdefault(pod, f"{NETWORK}.{len(self.addresses) + 2}")

    def port(self, endpoint: str) -> int:
        """Return the loopback port that replaces an endpoint."""
        if endpoint not in self.ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.ports[endpoint] = int(probe.getsockname()[1])
        return self.ports[endpoint]


@dataclass
class PodProcess:
    """One pod, started and restarted as the kubelet does."""

    node: Node
    pod: Object
    documents: list[Object]
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def pid(self) -> int:
        """The process that was started, as this machine counts."""
        assert self.process is not None
        return self.process.pid

    @property
    def index(self) -> int:
        return int(self.pod["metadata"]["labels"].get("training.kubeflow.org/replica-index", 0))

    @property
    def log(self) -> str:
        """The output of all attempts."""
        files = sorted(self.node.work.glob(f"{self.name}.*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def start(self) -> None:
        """Start the container."""
        container = main_container(self.pod)
        command = [*container["command"], *container.get("args", [])]
        environment = {**_outside(), **self._environment()}
        mounts = self._mounts()
        if self.node.isolation is Isolation.LOOPBACK:
            command = [_moved(word, mounts) for word in command]
            environment = {
                name: value if name in _outside() else _moved(value, mounts)
                for name, value in environment.items()
            }
            endpoint = environment.get("PET_RDZV_ENDPOINT")
            if endpoint:
                environment["PET_RDZV_ENDPOINT"] = f"127.0.0.1:{self.node.port(endpoint)}"
            program: list[str] = command
            folder = Path(_moved(container.get("workingDir", "/"), mounts))
        else:
            program = self._in_namespaces(command, mounts, str(container.get("workingDir", "/")))
            folder = self.node.work
        log = (self.node.work / f"{self.name}.{self.restarts}.log").open("wb")
        self.process = subprocess.Popen(
            program, env=environment, cwd=folder, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the container; SIGKILL takes everything in it along."""
        assert self.process is not None
        if number != signal.SIGKILL:
            main = self._main_pid()
            if main is not None:  # else it has just ended by itself
                with contextlib.suppress(ProcessLookupError):
                    os.kill(main, number)
            return
        victims = [self.process.pid, *_descendants(self.process.pid)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def exit_code(self) -> int | None:
        """Return the container's exit code, None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def restart(self) -> None:
        """Start the container again in the same pod."""
        self.restarts += 1
        self.start()

    def _main_pid(self) -> int | None:
        """The container's first process, behind nsenter and unshare where those precede it."""
        assert self.process is not None
        if self.node.isolation is Isolation.LOOPBACK:
            return self.process.pid
        # launcher -> unshare -> the container's PID 1
        below = _descendants(self.process.pid)
        return next((pid for pid in below if _namespace_pid(pid) == 1), None)

    def _environment(self) -> dict[str, str]:
        found = {}
        metadata = self.pod["metadata"]
        for variable in main_container(self.pod)["env"]:
            if "value" in variable:
                found[variable["name"]] = str(variable["value"])
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                if path == "spec.nodeName":
                    found[variable["name"]] = "node-0"
                    continue
                match = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
                assert match, path
                found[variable["name"]] = metadata[match[1]].get(match[2], "")
        return found

    def _mounts(self) -> dict[str, Path]:
        """Make the pod's volumes and return where each of its mounts is on this machine."""
        folder = self.node.work / self.name
        volumes = {volume["name"]: volume for volume in pod_spec(self.pod)["volumes"]}
        mounts = {}
        for mount in main_container(self.pod)["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                place = self.node.volume / mount.get("subPath", "")
            else:
                place = folder / mount["name"]
            place.mkdir(parents=True, exist_ok=True)
            mounts[mount["mountPath"]] = place
        for mount in main_container(self.pod)["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" not in volume:
                continue
            source = find(self.documents, "ConfigMap", volume["configMap"]["name"])
            assert source is not None, volume
            for name, text in source["data"].items():
                if self.node.isolation is Isolation.LOOPBACK:
                    text = _moved(text, mounts)
                (mounts[mount["mountPath"]] / name).write_text(text, encoding="utf-8")
        return mounts

    def _in_namespaces(
        self, command: list[str], mounts: dict[str, Path], working_dir: str
    ) -> list[str]:
        """Write the scripts that make the pod's sandbox; return the launcher's command."""
        folder = self.node.work / self.name
        inside, launch = folder / "pod.sh", folder / "launch.sh"
        address = self.node.address(self.name)
        volumes = {volume["name"]: volume for volume in pod_spec(self.pod)["volumes"]}
        memory = {
            mount["mountPath"]
            for mount in main_container(self.pod)["volumeMounts"]
            if (volumes[mount["name"]].get("emptyDir") or {}).get("medium") == "Memory"
        }
        root = folder / "root"
        root.mkdir(exist_ok=True)
        binds = []
        for path in sorted(mounts, key=len):
            target = f"{root}{path}"
            binds.append(f"mkdir -p {shlex.quote(target)}")
            if path in memory:
                binds.append(f"mount -t tmpfs memory {shlex.quote(target)}")
            else:
                binds.append(f"mount --bind {shlex.quote(str(mounts[path]))} {shlex.quote(target)}")
        for mount in main_container(self.pod)["volumeMounts"]:
            if mount.get("readOnly"):
                target = shlex.quote(f"{root}{mount['mountPath']}")
                binds.append(f"mount -o remount,bind,ro {target}")
        for path in _CODE:  # what the image would hold
            target = shlex.quote(f"{root}{path}")
            binds.append(f"mkdir -p {target} && mount --bind {shlex.quote(path)} {target}")
            binds.append(f"mount -o remount,bind,ro {target}")
        inside.write_text(
            _POD.format(
                root=shlex.quote(str(root)), name=self.name, address=address,
                binds="\n".join(binds), hosts=self._hosts(), directory=shlex.quote(working_dir),
                command=shlex.join(command), python=shlex.quote(sys.executable),
            )
        )  # fmt: skip
        launch.write_text(_LAUNCH.format(inside=shlex.quote(str(inside)), link=f"p{address[8:]}"))
        return [*self.node.entered(), "sh", str(launch)]

    def _hosts(self) -> str:
        """All pods by name, as the headless services of the operator would resolve them."""
        lines = ["127.0.0.1 localhost"]
        prefix = self.name.rsplit("-", 1)[0]
        for index in range(8):
            pod = f"{prefix}-{index}"
            if index == self.index or pod in self.node.addresses:
                lines.append(f"{self.node.address(pod)} {pod}")
        return "\n".join(lines)


# The interface appears in the pod's namespace once the pod's first process is there.
_LAUNCH = """set -e
ip link delete {link} 2>/dev/null || true
unshare --net --uts --mount --pid --fork --kill-child sh {inside} &
child=$!
own=$(readlink /proc/self/ns/net)
while [ "$(readlink /proc/$child/ns/net)" = "$own" ]; do sleep 0.01; done
ip link add {link} type veth peer name eth0 netns /proc/$child/ns/net
ip link set {link} master pods up
wait $child
"""

# A root of our own: this machine's folders, read-only, and the manifest's mounts at their places.
_POD = """set -e
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
{python} -I -S -c 'import socket; socket.sethostname("{name}")'
root={root}
mount -t tmpfs pod $root
for entry in /*; do
  name=${{entry#/}}
  if [ -L "$entry" ]; then ln -s "$(readlink "$entry")" "$root/$name"
  elif [ -d "$entry" ]; then
    mkdir -p "$root/$name"
    case $name in
      tmp|etc|proc|mnt|media|lost+found) ;;
      *) mount --rbind "$entry" "$root/$name" ;;
    esac
  fi
done
mkdir $root/.etc && mount --bind /etc $root/.etc
for entry in /etc/*; do
  name=${{entry#/etc/}}
  case $name in hosts|nsswitch.conf|resolv.conf) ;; *) ln -s "/.etc/$name" $root/etc/ ;; esac
done
cat > $root/etc/hosts <<'END'
{hosts}
END
echo 'hosts: files' > $root/etc/nsswitch.conf
: > $root/etc/resolv.conf
{binds}
mount -t proc proc $root/proc
for name in usr opt root home var srv work; do
  if [ -d $root/$name ] && [ ! -L $root/$name ]; then
    mount -o remount,bind,ro $root/$name 2>/dev/null || true
  fi
done
mount -o remount,bind,ro $root
exec chroot $root /bin/sh -c 'cd "$1" && shift && exec "$@"' pod {directory} {command}
"""


def _outside() -> dict[str, str]:
    """What the image would set: the places of its programs and modules."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        "DS_ACCELERATOR": "cpu",
    }


def _moved(text: str, mounts: dict[str, Path]) -> str:
    """Rewrite the mounts' paths in a text, all in one pass."""
    paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({paths})(?=/|\b)", lambda found: str(mounts[found[1]]), text)


def _descendants(pid: int) -> list[int]:
    """Return the processes below one, its children first."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = parents.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _namespace_pid(pid: int) -> int:
    """Return a process's number in its innermost namespace."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0


def wait_until(condition: Any, *, timeout_s: float, what: str) -> None:
    """Poll closely until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.005)
