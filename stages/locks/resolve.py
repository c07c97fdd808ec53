"""Resolve the lock files anew with uv: `make lock`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Declared by vLLM's CPU build, imported by no text model; torchvision beside a CPU torch does not
# even import.
# The embedded weights are packed as a plugin of the command-line tool `llm`; only the file is used,
# and llama-cpp-python alone would compile for minutes.
ALONE = "trl"
"""Tried by a test as another trainer; what it depends on is stage two's, in other versions."""
LLM = ("llm", "llama-cpp-python")
UNUSED = ("torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless", *LLM)


def compile_lock(
    name: str, inputs: list[str], *, overrides: list[str], constraint: str = ""
) -> None:
    """Write `name` from the inputs."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(overrides))
        file.flush()
        command = [
            str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--upgrade",
            *inputs, "--override", file.name, "--output-file", name,
            "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28",
            "--no-header", "--no-annotate", "--no-emit-index-url",
        ]  # fmt: skip
        if constraint:
            command += ["--constraint", constraint]
        subprocess.run(command, cwd=HERE, check=True)
    print(name)


def add(name: str, package: str) -> None:
    """Append the newest version of a package, without what it depends on."""
    uv = str(Path(sys.executable).with_name("uv"))
    pinned = subprocess.run(
        [uv, "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate",
         "--no-emit-index-url", "-"],
        cwd=HERE, check=True, input=package, capture_output=True, text=True,
    ).stdout  # fmt: skip
    with (HERE / name).open("a", encoding="utf-8") as lock:
        lock.write(pinned)


def drop(name: str, prefixes: tuple[str, ...]) -> None:
    """Take out the packages that the CPU build of torch does not need."""
    path = HERE / name
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(prefixes)]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> None:
    """Resolve all of them."""
    never = [f"{name} ; sys_platform == 'never'" for name in UNUSED]
    no_llm = [f"{name} ; sys_platform == 'never'" for name in LLM]
    compile_lock(
        "cpu.lock", ["teacher.in", "student.in", "cpu.in"], overrides=[*never, "torch==2.13.0"]
    )
    drop("cpu.lock", ("torch==", "nvidia-", "cuda-", "triton=="))
    compile_lock("dev.lock", ["dev.in"], overrides=[], constraint="cpu.lock")
    add("dev.lock", ALONE)
    compile_lock("teacher-gpu.lock", ["teacher.in", "teacher-gpu.in"], overrides=no_llm)
    compile_lock("student-gpu.lock", ["student.in", "student-gpu.in"], overrides=no_llm)


if __name__ == "__main__":
    main()
