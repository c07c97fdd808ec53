"""Which recipes there are, on which devices they are meant to run, and what is assumed of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.observe.devices import DEVICES, Device
from tests.stage_runner import ROOT

__all__ = [
    "H100", "MODELS", "RECIPES", "SMALL", "STUDENTS", "SUPERVISED_READ", "SUPERVISED_WRITTEN",
    "TEACHERS", "TOKENIZERS", "TOKENS", "Student", "Teacher",
]  # fmt: skip

RECIPES = ROOT / "stages/configs/recipes"
MODELS = Path(__file__).with_name("models")

TOKENS = 100_000_000
"""Of a corpus; costs are for so many, and grow with them."""
SUPERVISED_READ = 0.75
"""Share of the tokens of chats that the assistant wrote."""
SUPERVISED_WRITTEN = 0.95
"""The same where the teacher writes long answers to short questions."""

H100, SMALL = DEVICES["h100"], DEVICES["rtx4090"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A configuration of stage one."""

    file: str
    device: Device = H100


@dataclass(frozen=True, slots=True)
class Student:
    """A configuration of stage two, and the cache that it reads."""

    file: str
    teacher: str
    gpus: int = 8
    device: Device = H100


TEACHERS = (
    Teacher("qwen3-32b/teacher-chat.yaml"),
    Teacher("qwen3-32b/teacher-reasoning.yaml"),
    Teacher("qwen3-235b-fp8/teacher-chat.yaml"),
    Teacher("qwen3-235b-fp8/teacher-reasoning.yaml"),
    Teacher("llama-3.3-70b/teacher-chat.yaml"),
    Teacher("llama-3.3-70b/teacher-writes.yaml"),
    Teacher("gemma-3-27b/teacher-chat.yaml"),
    Teacher("mistral-small-24b/teacher-chat.yaml"),
    Teacher("arcee-spark/teacher.yaml"),
    Teacher("arcee-spark/teacher-one-24gb.yaml", SMALL),
)
STUDENTS = (
    Student("qwen3-32b/student-4b.yaml", "qwen3-32b/teacher-chat.yaml"),
    Student("qwen3-32b/student-4b-reasoning.yaml", "qwen3-32b/teacher-reasoning.yaml"),
    Student("qwen3-32b/student-1.7b.yaml", "qwen3-32b/teacher-chat.yaml"),
    Student("qwen3-32b/student-1.7b-one-24gb.yaml", "qwen3-32b/teacher-chat.yaml", 1, SMALL),
    Student("qwen3-235b-fp8/student-8b.yaml", "qwen3-235b-fp8/teacher-chat.yaml"),
    Student("qwen3-235b-fp8/student-8b-64-gpus.yaml", "qwen3-235b-fp8/teacher-chat.yaml", 64),
    Student("llama-3.3-70b/student-3b.yaml", "llama-3.3-70b/teacher-chat.yaml"),
    Student("llama-3.3-70b/student-3b-one-24gb.yaml", "llama-3.3-70b/teacher-chat.yaml", 1, SMALL),
    Student("gemma-3-27b/student-4b.yaml", "gemma-3-27b/teacher-chat.yaml"),
    Student("gemma-3-27b/student-1b.yaml", "gemma-3-27b/teacher-chat.yaml"),
    Student("gemma-3-27b/student-1b-one-24gb.yaml", "gemma-3-27b/teacher-chat.yaml", 1, SMALL),
    Student("mistral-small-24b/student-half.yaml", "mistral-small-24b/teacher-chat.yaml"),
    Student(
        "mistral-small-24b/student-half-64-gpus.yaml", "mistral-small-24b/teacher-chat.yaml", 64
    ),
    Student("arcee-spark/student.yaml", "arcee-spark/teacher.yaml"),
    Student("arcee-spark/student-one-24gb.yaml", "arcee-spark/teacher-one-24gb.yaml", 1, SMALL),
)

TOKENIZERS = {
    # Qwen3 has Qwen2's pieces, and 23 special tokens above them.
    "Qwen3": ("qwen", 151_669),
    "Qwen2": ("qwen", 151_646),
    "Arcee-Spark": ("qwen", 151_646),
    "Llama-3": ("llama-3", 128_256),
    "gemma-3": ("gemma-3", 262_145),
    "Mistral-Small-24B": ("tekken", 131_072),
}
"""By the beginning of a model's name: family and pieces of its tokenizer."""
