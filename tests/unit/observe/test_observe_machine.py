"""Memory, disk and hardware as the system tells them, from recorded files where it matters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.observe import (
    available_memory_bytes,
    describe_environment,
    free_disk_bytes,
    gpu_peak_bytes,
    peak_rss_bytes,
    total_memory_bytes,
)
from pipeline.observe.devices import DEVICES, device_of_driver
from pipeline.observe.hardware import git_commit, package_versions

_GIB = 1 << 30


def _machine(root: Path, *, own: str) -> tuple[Path, Path]:
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal:  67108864 kB\nMemAvailable:  33554432 kB\n")
    (proc / "self" / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\n")
    (proc / "self" / "cgroup").write_text(f"0::{own}\n")
    return proc, cgroup


def test_peak_is_read_from_the_process_and_falls_back(tmp_path: Path) -> None:
    proc, _ = _machine(tmp_path, own="/")
    assert peak_rss_bytes(proc=proc) == 2048 * 1024
    assert peak_rss_bytes(proc=tmp_path / "absent") > 1 << 20
    assert peak_rss_bytes() > 1 << 20


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    proc, cgroup = _machine(tmp_path, own="/")
    assert available_memory_bytes(proc=proc, cgroup=cgroup) == 32 * _GIB
    assert total_memory_bytes(proc=proc, cgroup=cgroup) == 64 * _GIB


def test_the_tightest_cgroup_level_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    proc, cgroup = _machine(tmp_path, own="/pod/container")
    leaf = cgroup / "pod" / "container"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    (leaf / "memory.current").write_text(f"{3 * _GIB}\n")
    (leaf.parent / "memory.max").write_text(f"{8 * _GIB}\n")
    (leaf.parent / "memory.current").write_text(f"{6 * _GIB}\n")
    (leaf.parent / "memory.stat").write_text(f"anon 1\ninactive_file {2 * _GIB}\n")
    assert available_memory_bytes(proc=proc, cgroup=cgroup) == 4 * _GIB
    assert total_memory_bytes(proc=proc, cgroup=cgroup) == 8 * _GIB


def test_a_container_whose_cgroup_path_is_the_hosts_uses_its_root(tmp_path: Path) -> None:
    proc, cgroup = _machine(tmp_path, own="/../kubepods/x")
    (cgroup / "memory.max").write_text(f"{2 * _GIB}")
    (cgroup / "memory.current").write_text(f"{_GIB}")
    assert available_memory_bytes(proc=proc, cgroup=cgroup) == _GIB


def test_a_system_that_hides_everything_gives_none(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert available_memory_bytes(proc=absent, cgroup=absent) is None
    assert total_memory_bytes(proc=absent, cgroup=absent) is None


def test_free_disk_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


def test_gpu_peak_never_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert gpu_peak_bytes() is None
    assert "torch" not in sys.modules


def test_the_environment_is_json_and_names_what_can_change_a_result() -> None:
    facts = describe_environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"].startswith("3.")
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert "pyarrow" in package_versions()


def test_observe_imports_no_heavy_package() -> None:
    program = (
        "import sys, pipeline.observe as o\n"
        "o.describe_environment()\n"
        "heavy = {'torch', 'transformers', 'tqdm', 'tensorboard', 'matplotlib', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_commit_of_a_checkout_a_change_and_a_foreign_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTILL_COMMIT", raising=False)
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    assert git_commit(package) is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "c"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = git_commit(package)
    assert commit is not None
    assert len(commit) == 40
    (package / "a.py").write_text("x = 2\n")
    assert git_commit(package) == f"{commit}-dirty"
    inner = package / "site-packages" / "pipeline"
    inner.mkdir(parents=True)
    assert git_commit(inner) is None
    monkeypatch.setenv("DISTILL_COMMIT", "abc")
    assert git_commit(inner) == "abc"


def test_a_device_is_known_by_the_drivers_name_or_not_at_all() -> None:
    """A card whose peak may differ has no name here: a wrong utilisation is worse than none."""
    assert device_of_driver("NVIDIA H100 80GB HBM3") == DEVICES["h100"]
    assert device_of_driver("NVIDIA A100-SXM4-80GB") == DEVICES["a100-80gb"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "Tesla T4", ""):
        assert device_of_driver(other) is None
