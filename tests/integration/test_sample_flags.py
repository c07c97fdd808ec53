"""Every flag of the public sample works under its own name, and configurations come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import Settings, dump_yaml, parse_command
from stages.distill import DistillRun
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import ROOT, run_python

ONE: list[tuple[list[str], str, Any]] = [
    (["--dataset_name", "mlabonne/FineTome-100k"], "corpus.dataset_name", "mlabonne/FineTome-100k"),
    (["--dataset_split", "test"], "corpus.dataset_split", "test"),
    (["--num_samples", "12"], "corpus.num_samples", 12),
    (["--seed", "7"], "seed", 7),
    (["--teacher_model", "arcee-ai/Arcee-Spark"], "teacher.model", "arcee-ai/Arcee-Spark"),
    (["--use_flash_attention"], "teacher.use_flash_attention", True),
    (["--no-use_flash_attention"], "teacher.use_flash_attention", False),
    (["--max_length", "512"], "corpus.max_length", 512),
    (["--chat_template", "{{ messages }}"], "corpus.chat_template", "{{ messages }}"),
    (["--bf16"], "teacher.bf16", True),
    (["--no-bf16"], "teacher.bf16", False),
    (["--bf16", "none"], "teacher.bf16", None),
    (["--fp16"], "teacher.fp16", True),
    (["--project_name", "mine"], "observe.project_name", "mine"),
]
TWO: list[tuple[list[str], str, Any]] = [
    (["--project_name", "mine"], "observe.project_name", "mine"),
    (["--seed", "7"], "seed", 7),
    (["--student_model", "Qwen/Qwen2-1.5B"], "student.model", "Qwen/Qwen2-1.5B"),
    (["--use_flash_attention"], "student.use_flash_attention", True),
    (["--output_dir", "results"], "output.output_dir", "results"),
    (["--save_location", "fsx"], "output.save_location", "fsx"),
    (["--save_location", "hub", "--hub_location", "a/b"], "output.save_location", "hub"),
    (["--save_location", "both", "--hub_location", "a/b"], "output.hub_location", "a/b"),
    (["--num_train_epochs", "2"], "train.num_train_epochs", 2),
    (["--max_steps", "9"], "train.max_steps", 9),
    (["--per_device_train_batch_size", "2"], "train.per_device_train_batch_size", 2),
    (["--gradient_accumulation_steps", "4"], "train.gradient_accumulation_steps", 4),
    (["--learning_rate", "2e-5"], "train.learning_rate", 2e-5),
    (["--weight_decay", "0.1"], "train.weight_decay", 0.1),
    (["--warmup_ratio", "0.2"], "train.warmup_ratio", 0.2),
    (["--lr_scheduler_type", "linear"], "train.lr_scheduler_type", "linear"),
    (["--save_steps", "10"], "train.save_steps", 10),
    (["--logging_steps", "5"], "train.logging_steps", 5),
    (["--resume_from_checkpoint", "out/s-1"], "train.resume_from_checkpoint", "out/s-1"),
    (["--bf16"], "train.bf16", True),
    (["--no-bf16"], "train.bf16", False),
    (["--fp16"], "train.fp16", True),
    (["--temperature", "3"], "loss.temperature", 3),
    (["--alpha", "0.3"], "loss.alpha", 0.3),
    (["--layers_to_unfreeze", "spectrum.yaml"], "student.layers_to_unfreeze", "spectrum.yaml"),
]  # fmt: skip
DEFAULTS = {
    "num_train_epochs": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "learning_rate": 2e-5, "weight_decay": 0.05, "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine", "save_steps": 1000, "logging_steps": 1,
}  # fmt: skip


def _parse(model: type[Settings], argv: list[str]) -> Any:
    return parse_command(model, argv, prog="p", description="").settings


def _get(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize(
    ("model", "flags", "dotted", "value"),
    [(TeacherRun, *row) for row in ONE] + [(StudentRun, *row) for row in TWO],
)
def test_the_flag_lands_where_it_belongs(
    model: type[Settings], flags: list[str], dotted: str, value: Any, tmp_path: Path
) -> None:
    settings = _parse(model, flags)
    assert _get(settings, dotted) == value
    # With `-`, with `=`, dotted, and as a key of a file: the same.
    if len(flags) == 2 and not flags[1].startswith("--"):
        name = flags[0][2:]
        assert _parse(model, [f"--{name.replace('_', '-')}={flags[1]}"]) == settings
        assert _parse(model, [f"--{dotted}", flags[1]]) == settings
        file = tmp_path / "config.json"
        file.write_text(json.dumps({name: value}))
        assert _parse(model, ["--config_file", str(file)]) == settings


def test_the_samples_defaults() -> None:
    run = _parse(StudentRun, [])
    for name, value in DEFAULTS.items():
        assert getattr(run.train, name) == value, name
    assert (run.loss.temperature, run.loss.alpha, run.seed) == (2.0, 0.5, 42)
    # 4,096, where the teacher has as many positions.
    assert _parse(TeacherRun, []).corpus.longest == 4096
    # Nothing goes to a stranger's repository unasked.
    assert run.output.save_location == "local"
    assert run.output.hub_location is None


def test_the_file_is_below_the_flags_and_above_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("temperature: 3\nloss:\n  alpha: 0.1\ntrain:\n  learning_rate: 1.0e-3\n")
    run = _parse(StudentRun, ["--config", str(file), "--alpha", "0.9"])
    assert (run.loss.temperature, run.loss.alpha) == (3.0, 0.9)
    assert run.train.learning_rate == 1e-3
    assert run.train.save_steps == 1000


@pytest.mark.parametrize("model", [TeacherRun, StudentRun, DistillRun])
def test_a_saved_configuration_is_accepted_back(model: type[Settings], tmp_path: Path) -> None:
    settings = _parse(model, [])
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(settings))
    assert _parse(model, ["--config", str(file)]) == settings
    as_json = tmp_path / "config.json"
    as_json.write_text(json.dumps(settings.model_dump(mode="json")))
    assert _parse(model, ["--config", str(as_json)]) == settings


@pytest.mark.slow
def test_the_configurations_that_runs_saved_name_the_same_runs(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage
) -> None:
    before = digests(tiny_cache), digests(tiny_run)
    saved = tiny_cache / "_meta/config.yaml"
    result = stage("cache_teacher", ["--config", saved], hook=("forbid_loading",)).ok()
    assert "is complete" in result.err
    result = stage("train_student", ["--config", tiny_run / "config.yaml"]).ok()
    assert "nothing to train" in result.err
    assert (digests(tiny_cache), digests(tiny_run)) == before


def test_help_is_complete_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy\n"
        "STAGE, sys.argv[1:] = sys.argv[1], ['--help']\n"
        "try:\n"
        "    runpy.run_module(STAGE, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'deepspeed', 'datasets', 'pandas', 'pyarrow',\n"
        "         'fsspec', 'wandb', 'mlflow', 'accelerate', 'huggingface_hub'}\n"
        "print('IMPORTED', sorted(heavy & set(sys.modules)))\n"
    )
    for stage, flags in (
        ("cache_teacher", [row[0][0] for row in ONE]),
        ("train_student", [row[0][0] for row in TWO]),
        ("distill", ["--run_dir", "--student_config"]),
        *((path.stem, []) for path in (ROOT / "stages").glob("push_student.py")),
        *((path.stem, []) for path in (ROOT / "stages").glob("report.py")),
    ):
        page = run_python(["-c", code, f"stages.{stage}"], timeout=60).ok().out
        assert page.splitlines()[-1] == "IMPORTED []", f"{stage}: {page.splitlines()[-1]}"
        for flag in flags:
            assert flag.replace("--no-", "--") in page, f"{stage} --help does not mention {flag}"
        assert "--config" in page
        assert f"usage: python -m stages.{stage}" in page
