"""The leaves of a settings tree: dotted names, short names, types, help and suggestions."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.nearest import nearest

__all__ = ["Leaf", "leaves", "names_of", "suggestion", "usual_name"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of the configuration that a file or a flag can set."""

    path: tuple[str, ...]
    annotation: Any
    default: Any
    required: bool
    help: str
    flag: str | None
    """Second, short name (that of the public sample), or None."""

    @property
    def dotted(self) -> str:
        """The name used in messages and on the command line, as in `teacher.model`."""
        return ".".join(self.path)

    @property
    def is_bool(self) -> bool:
        """Whether the flag needs no value (`--bf16`) and can be negated (`--no-bf16`)."""
        return bool in _members(self.annotation)

    @property
    def takes_text(self) -> bool:
        """Whether the flag's value is kept as typed instead of read as YAML."""
        members = _members(self.annotation)
        return str in members and not ({int, float, bool} & set(members))

    @property
    def takes_none(self) -> bool:
        """Whether `none` means no value, not a choice or a text of that name."""
        return type(None) in _members(self.annotation)

    @property
    def is_list(self) -> bool:
        """Whether the flag's value is a list: `[a, b]` or `a,b`."""
        return any(get_origin(member) in (list, tuple) for member in _members(self.annotation))

    @property
    def kind(self) -> str:
        """The type as `--help` shows it."""
        return " | ".join(_name(member) for member in _members(self.annotation))


def leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield the leaves of `model`, depth first, in the order of declaration."""
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from leaves(nested, (*prefix, name))
        else:
            yield _leaf((*prefix, name), info)


def names_of(all_leaves: Sequence[Leaf]) -> dict[str, Leaf]:
    """Return the leaf of each name: dotted, short, or a last part that only one leaf has."""
    names = {leaf.dotted: leaf for leaf in all_leaves}
    for leaf in all_leaves:
        if leaf.flag:
            assert leaf.flag not in names, f"two fields share the short name {leaf.flag}"
            names[leaf.flag] = leaf
    times = Counter(leaf.path[-1] for leaf in all_leaves)
    sections = {part for leaf in all_leaves for part in leaf.path[:-1]}
    for leaf in all_leaves:
        last = leaf.path[-1]
        if times[last] == 1 and last not in sections:
            names.setdefault(last, leaf)
    return names


def suggestion(name: str, known: Sequence[str], *, before: str = "") -> str:
    """Return "; did you mean X?" for the nearest known names, or an empty string.

    The last part of dotted names counts as well: `teacher.modle` and `modle` both find
    `teacher.model`. A last part that several fields have finds all of them, and a name that other
    trainers use finds ours.

    Args:
        name: what was found.
        known: what could be meant.
        before: stands before each name, as `--`.
    """
    section, _, last = name.rpartition(".")
    wanted = usual_name(last)
    lasts = _by_last_part(known)
    if section:  # the same section first: `train.lr` is no misspelt `train`
        inside = [item for item in known if item.startswith(f"{section}.")]
        near = nearest(wanted, _by_last_part(inside))
        found = _by_last_part(inside)[near] if near else []
        found = found or ([] if inside else _whole(name, known))
        found = found or lasts.get(nearest(wanted, lasts), [])
    else:
        found = lasts.get(wanted) or lasts.get(nearest(wanted, lasts), [])
    return f"; did you mean {' or '.join(before + item for item in found)}?" if found else ""


def _by_last_part(known: Sequence[str]) -> dict[str, list[str]]:
    """Return the names by their last part in lower case; a short name hides the dotted ones."""
    parts: dict[str, list[str]] = {}
    for item in dict.fromkeys(known):
        parts.setdefault(item.rsplit(".", 1)[-1].lower(), []).append(item)
    return {
        last: [item for item in items if "." not in item][:1] or items
        for last, items in parts.items()
    }


def _whole(name: str, known: Sequence[str]) -> list[str]:
    """Return the nearest name of all, its section included: `teachr.model`, `trian.lr`."""
    near = nearest(name, known)
    return [near] if "." in near else []


def usual_name(name: str) -> str:
    """Return our name for a field that other trainers call otherwise; else the name itself."""
    key = name.replace("-", "_").lower()
    return _HABITS.get(key, key)


_HABITS = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "steps": "max_steps", "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps", "grad_acc_steps": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps", "wd": "weight_decay",
    "scheduler": "lr_scheduler_type", "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_ratio", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "seq_len": "max_length", "seq_length": "max_length", "sequence_length": "max_length",
    "cutoff_len": "max_length", "max_model_len": "max_length", "block_size": "max_length",
    "dataset": "dataset_name", "data": "dataset_name", "dataset_path": "dataset_name",
    "data_path": "dataset_name", "train_file": "dataset_name", "split": "dataset_split",
    "max_samples": "num_samples", "limit": "num_samples", "val_size": "heldout_fraction",
    "test_size": "heldout_fraction", "teacher_model_name_or_path": "teacher_model",
    "teacher": "teacher_model", "student": "student_model", "output": "output_dir",
    "out": "output_dir", "cache": "cache_dir", "temp": "temperature", "k": "top_k",
    "logits_top_k": "top_k", "system": "system_prompt", "tp": "tensor_parallel_size",
    "tensor_parallel": "tensor_parallel_size", "deepspeed": "zero_stage", "zero": "zero_stage",
    "lora_r": "rank", "lora_rank": "rank", "fp16": "bf16", "kd_ratio": "alpha",
    "kd_weight": "alpha", "kl_weight": "alpha", "distill_weight": "alpha", "ce_weight": "alpha",
    "lambda": "alpha", "save_every": "save_steps", "eval_every": "eval_steps",
    "evaluation_steps": "eval_steps", "log_every": "logging_steps", "log_steps": "logging_steps",
    "subset": "dataset_config", "config_name": "dataset_config",
}  # fmt: skip
"""Names of other trainers and of haste, to ours."""


def _leaf(path: tuple[str, ...], info: FieldInfo) -> Leaf:
    extra = info.json_schema_extra
    flag = extra.get("flag") if isinstance(extra, dict) else None
    return Leaf(
        path=path,
        annotation=info.annotation,
        default=None if info.is_required() else info.get_default(call_default_factory=True),
        required=info.is_required(),
        help=info.description or "",
        flag=str(flag) if flag else None,
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return tuple(m for arg in get_args(annotation) for m in _members(arg))
    if origin is Literal:
        return get_args(annotation)
    return (annotation,)


def _name(member: Any) -> str:
    if member is type(None):
        return "none"
    if isinstance(member, type) and get_origin(member) is None:
        return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}.get(
            member.__name__, member.__name__
        )
    if get_origin(member) is not None:
        return "list" if get_origin(member) in (list, tuple) else "mapping"
    return str(member)
