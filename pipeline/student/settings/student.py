"""Settings of the student and its output; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pipeline.config import Settings, option, rule

__all__ = [
    "WAY_FILE",
    "LoraSettings",
    "OutputSettings",
    "StudentSettings",
    "is_repository",
]

WAY_FILE = "forward.json"
"""In `output_dir`: how sequences go through the student. Each start of a run writes it, when the
student is made and nothing refuses it any more."""

# As the hub has it: no two dots or dashes in a row, and none at an end.
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_NAME}/)?{_NAME}")


def is_repository(name: str) -> bool:
    """Return whether the hub allows a repository of this name."""
    return _REPOSITORY.fullmatch(name) is not None


class LoraSettings(Settings):
    """Low-rank adapters instead of full weights (peft)."""

    rank: int | None = option(
        None, "rank of the adapters (none: no LoRA, all weights are trained)", ge=1
    )
    alpha: float = option(16, "the adapters' output is scaled by alpha / rank", gt=0)
    dropout: float = option(0.0, "dropout before the adapters", ge=0, lt=1)
    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "linear layers that get one: last parts of their names (q_proj), full names, or all-linear",
    )
    save_adapter: bool = option(
        False, "also write the adapter alone, to output_dir/adapter; the student is merged anyhow"
    )

    @rule
    def _an_adapter_to_save(self) -> Iterator[str]:
        if self.save_adapter and self.rank is None:
            yield (
                "student.lora.save_adapter: found true without student.lora.rank, expected a rank"
            )

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.rank is not None


class StudentSettings(Settings):
    """Where the student's weights come from and which of them are trained."""

    model: str = option(
        "embedded",
        "student: a hub id, a model folder, or `embedded` (SmolLM2-135M-Instruct, to be pruned)",
        flag="student_model",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    keep_layers: tuple[int, ...] | None = option(
        None, "prune the model to these decoder layers, in this order (none: keep all)"
    )
    reconstruct: Literal["none", "least_squares"] = option(
        "none",
        "layer reconstruction after pruning: refit each kept layer's MLP output to what the "
        "unpruned model feeds into the next kept layer (seconds; the student starts far nearer to "
        "the teacher)",
    )
    reconstruct_tokens: int = option(
        12_000, "tokens of the cache used by the reconstruction, about", ge=256
    )
    layers_to_unfreeze: str | None = option(
        None,
        "YAML file with `unfrozen_parameters`: substrings or regular expressions of the parameter "
        "names that are trained (Spectrum); all others are frozen",
        flag="layers_to_unfreeze",
    )
    freeze: tuple[str, ...] = option(
        (), "substrings or regular expressions of parameter names that are not trained"
    )
    lora: LoraSettings = LoraSettings()
    attention: Literal["auto", "varlen", "flash", "flex", "sdpa", "eager"] = option(
        "auto",
        "kernels of attention: torch's `varlen` (CUDA, 16 bit), `flash` (the package flash-attn), "
        "`flex`, `sdpa`, `eager`; auto: varlen where it is there and serves the model, else sdpa, "
        "else eager",
    )
    use_flash_attention: bool = option(
        False,
        "flash_attention_2 (needs a GPU and flash-attn): the same as --student.attention flash",
        flag="use_flash_attention",
    )
    forward: Literal["auto", "packed", "alone"] = option(
        "auto",
        "how the sequences of a micro-batch go through the student: `packed` in one row, `alone` "
        "one after the other; auto: packed where a trial before the first step finds that this "
        "changes nothing",
    )
    kernels: Literal["none", "liger", "hub"] = option(
        "none",
        "kernels for norms, rotary positions and MLPs: of `liger` (the package liger-kernel) or of "
        "the `hub` (the package kernels); both need a GPU",
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    router_aux_loss: Literal["none", "config"] = option(
        "none",
        "a mixture of experts: `config` adds the auxiliary loss that keeps its router from "
        "preferring a few experts, as transformers computes it",
    )
    router_aux_coefficient: float | None = option(
        None, "weight of that loss (none: router_aux_loss_coef of the student's config)", gt=0
    )
    trust_remote_code: bool = option(False, "run model code that the hub repository brings")

    @property
    def chosen_attention(self) -> str:
        """What `attention` and `use_flash_attention` amount to."""
        return "flash" if self.use_flash_attention else self.attention

    @rule
    def _one_attention(self) -> Iterator[str]:
        if self.use_flash_attention and self.attention not in ("auto", "flash"):
            yield (
                f"student.attention: found {self.attention} with use_flash_attention, expected "
                "flash, or one of the two settings"
            )

    @rule
    def _a_router_to_weigh(self) -> Iterator[str]:
        if self.router_aux_coefficient is not None and self.router_aux_loss == "none":
            yield (
                "student.router_aux_coefficient: found a weight with student.router_aux_loss none, "
                "expected config"
            )

    @rule
    def _sane_layers(self) -> Iterator[str]:
        if self.keep_layers is not None and not self.keep_layers:
            yield "student.keep_layers: found an empty list, expected layers"
        if min(self.keep_layers or (0,)) < 0:
            yield "student.keep_layers: expected layer numbers from 0"
        if self.reconstruct != "none" and self.keep_layers is None:
            yield (
                f"student.reconstruct: found {self.reconstruct} without student.keep_layers, "
                "expected a pruned model to reconstruct"
            )
        if self.reconstruct != "none" and self.keep_layers and 0 in self.keep_layers[1:]:
            yield (
                f"student.keep_layers: found {list(self.keep_layers)} with student.reconstruct, "
                "expected layer 0 first or not at all: no layer comes before it to be refitted"
            )
        if self.layers_to_unfreeze and self.freeze:
            yield ("student.layers_to_unfreeze and student.freeze: expected at most one")
        if self.lora.enabled and (self.layers_to_unfreeze or self.freeze):
            yield (
                "student.lora.rank: found together with student.layers_to_unfreeze or "
                "student.freeze, expected one of them: with LoRA only the adapters are trained"
            )


class OutputSettings(Settings):
    """Where the student goes."""

    output_dir: str = option(
        "runs/default/student", "folder of checkpoints, metrics and the student", flag="output_dir"
    )
    save_location: Literal["local", "fsx", "hub", "both"] = option(
        "local",
        "`local` (or `fsx`): output_dir; `hub` and `both`: also pushed to hub_location",
        flag="save_location",
    )
    hub_location: str | None = option(None, "repository on the hub to push to", flag="hub_location")
    push_checkpoints: bool = option(
        False,
        "push the weights with each checkpoint as well, in the background (with save_location hub "
        "or both)",
    )
    weights_dtype: Literal["as_trained", "float32", "bfloat16", "float16"] = option(
        "as_trained", "type of the student's weights in its safetensors file"
    )

    @rule
    def _on_a_file_system(self) -> Iterator[str]:
        if "://" in self.output_dir:
            yield (
                f"output.output_dir: found {self.output_dir}, expected a folder of a mounted file "
                "system (DeepSpeed writes its checkpoints there itself)"
            )

    @rule
    def _hub_named(self) -> Iterator[str]:
        if self.save_location in ("hub", "both") and not self.hub_location:
            yield (
                f"save_location is {self.save_location}, but hub_location names no repository; "
                "expected for example --hub_location your-name/your-student"
            )
        if self.hub_location is not None and not is_repository(self.hub_location):
            yield (
                f"output.hub_location: found {self.hub_location!r}, expected a repository such as "
                "your-name/your-student"
            )
        if self.push_checkpoints and not self.push:
            yield (
                f"output.push_checkpoints: found true with save_location {self.save_location}, "
                "expected hub or both"
            )

    @property
    def push(self) -> bool:
        """Whether the student is pushed to the hub at the end."""
        return self.save_location in ("hub", "both")
