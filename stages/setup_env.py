"""Make the environments of both stages: once, pinned, with the torch build that fits the machine.

Standard library only: this runs before anything is installed. One environment (`.venv`) where
there is no GPU, because the pins of both stages agree there; `.venv-teacher` and `.venv-student`
where there is one, because vLLM and DeepSpeed then want different builds of torch.

usage: python3 stages/setup_env.py [--print-python ROLE] ROLE...     (ROLE: teacher student dev)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "stages" / "locks"
ROLES = ("teacher", "student", "dev")
UV = "uv==0.13.9"
TORCH_CPU = "torch==2.13.0"
"""On a GPU machine torch comes with the lock files, as the user's index serves it."""


def on_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU; DISTILL_DEVICE=cpu or =gpu overrules."""
    wanted = os.environ.get("DISTILL_DEVICE", "")
    if wanted in ("cpu", "gpu"):
        return wanted == "gpu"
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def environment(role: str) -> Path:
    """Return the folder of a role's environment; the checks live in the student's."""
    if not on_gpu():
        return ROOT / ".venv"
    return ROOT / (".venv-teacher" if role == "teacher" else ".venv-student")


def python_of(role: str) -> Path:
    """Return the interpreter of a role's environment."""
    return environment(role) / "bin" / "python"


def lock_files(role: str) -> list[Path]:
    """Return the pinned requirements of a role on this machine."""
    if role == "dev":
        # The checks read and run both stages' code, as far as it runs here.
        return [*lock_files("student"), LOCKS / "dev.lock"]
    return [LOCKS / (f"{role}-gpu.lock" if on_gpu() else "cpu.lock")]


def stamp(lock: Path) -> Path:
    """Return the marker that says this very lock is installed."""
    role = "teacher" if lock.name.startswith("teacher") else "student"
    digest = hashlib.sha256(lock.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    return environment(role) / f".{lock.stem}-{digest}"


def run(*command: str | Path, quiet: bool = False) -> bool:
    """Run a command; return whether it succeeded."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL if quiet else sys.stderr,
        stderr=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    return result.returncode == 0


def fail(found: str, do: str) -> None:
    """Print one message and stop."""
    print(f"error: {found}; {do}.", file=sys.stderr)
    raise SystemExit(1)


def create(folder: Path) -> None:
    """Create an environment with uv in it."""
    if not (folder / "bin" / "python").exists():
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(folder, ignore_errors=True)
            fail("this Python cannot make environments", "install python3-venv and run it again")
    if not (folder / "bin" / "uv").exists() and not run(
        folder / "bin" / "python", "-m", "pip", "install", "--quiet", UV
    ):
        fail(
            "uv cannot be installed from the package index", "check the network and pip's settings"
        )


def install_torch_cpu(folder: Path) -> None:
    """Install the CPU build of torch: from pip's own sources, else from PyTorch's CPU index.

    The package index at large serves CUDA builds under the plain version; only the local version
    `+cpu` is sure to be the small one.
    """
    python = folder / "bin" / "python"
    check = "import torch, sys; sys.exit(not torch.__version__.endswith('+cpu'))"
    if run(python, "-c", check, quiet=True):
        return
    print("installing torch (CPU build)", file=sys.stderr)
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", f"{TORCH_CPU}+cpu")
    if run(*pip, quiet=True):
        return
    if not run(
        folder / "bin" / "uv", "pip", "install", "--python", python, "--no-deps",
        "--torch-backend", "cpu", TORCH_CPU,
    ):  # fmt: skip
        fail("no CPU build of torch can be installed", "check the network and pip's settings")


def install(lock: Path, role: str) -> bool:
    """Install one lock file where it is not installed yet; return whether it did."""
    mark = stamp(lock)
    if mark.exists():
        return False
    folder = environment(role)
    create(folder)
    if lock.name == "cpu.lock":
        install_torch_cpu(folder)
    print(f"installing {lock.relative_to(ROOT)} into {folder.name}", file=sys.stderr)
    python = folder / "bin" / "python"
    # Compiled once here: where nothing may be written beside the sources (PYTHONDONTWRITEBYTECODE,
    # a read-only root), each start would compile what it imports: 3 s of 6 of a short training run.
    uv = (
        folder / "bin" / "uv", "pip", "install", "--quiet", "--compile-bytecode",
        "--python", python, "--no-deps",
    )  # fmt: skip
    if not run(*uv, "-r", lock) or not run(*uv, "--editable", ROOT):
        fail(f"{lock.name} cannot be installed", "read the lines above, then run it again")
    mark.touch()
    return True


def main() -> int:
    """Install the roles asked for, or print an interpreter's path."""
    args = sys.argv[1:]
    if args[:1] == ["--print-python"]:
        print(python_of(args[1]))
        return 0
    unknown = [role for role in args if role not in ROLES]
    if unknown or not args:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before requires-python is read
        found = ".".join(map(str, sys.version_info[:2]))
        fail(f"Python {found}", "use 3.11 or newer, for example `make PYTHON=python3.12 ...`")
    changed = [
        install(lock, "student" if role == "dev" else role)
        for role in dict.fromkeys(args)
        for lock in lock_files(role)
    ]
    if not any(changed):
        names = sorted({environment(role).name for role in args})
        print(f"environment ready ({', '.join(names)}): nothing to install", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
