"""The teacher's part of a batch: sparse targets and all that the loss must know of their cache.

Shapes: T tokens of all sequences in a row, N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.collate import Batch

__all__ = ["TeacherTargets", "targets_of"]


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """Targets of the N supervised tokens of a batch of T tokens."""

    index_N: Tensor
    """int64; the place in the batch, from 0 to T - 1, whose output PREDICTS the supervised token:
    the place of the token minus one."""
    entries: HeadTargets
    """Token ids and log-probabilities [N, K], inclusion probabilities, log Z, entropy, labels."""
    num_tokens: int
    """T."""
    temperature: float
    """Of `entries.log_z_N` and `entries.entropy_N`."""
    vocab_size: int
    """Tokens of the cache's tokenizer; rows of a head from here on are padding."""
    sampled_log_step: float = 0.0
    """Nats; see `LossSpec`."""
    rule: InclusionRule | None = None
    """How entries were sampled; none: all are always kept."""

    def __len__(self) -> int:
        """Return N."""
        return int(self.index_N.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TeacherTargets:
        """Return the targets with all tensors on a device."""
        moved = [
            None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for tensor in self.entries
        ]
        return replace(
            self,
            index_N=self.index_N.to(device, non_blocking=non_blocking),
            entries=HeadTargets(*moved),  # type: ignore[arg-type]
        )

    def pick(self, rows: Tensor) -> Tensor:
        """Return the N rows that predict supervised tokens.

        Args:
            rows: [T, any], [1, T, any], or the N rows already picked, as `[1, N, any]` or
                `[N, any]`. A supervised token has a token before it, so N is below T.

        Raises:
            ConfigError: neither T nor N rows.
        """
        flat = rows[0] if rows.ndim == 3 and rows.shape[0] == 1 else rows
        if flat.ndim == 2 and flat.shape[0] == self.num_tokens:
            return flat.index_select(0, self.index_N)
        if flat.ndim == 2 and flat.shape[0] == len(self):
            return flat
        raise ConfigError(
            f"hidden states or logits of shape {list(rows.shape)}",
            expected=f"[1, {self.num_tokens}, ...], or [{len(self)}, ...] with the supervised "
            "tokens alone",
            do="pass the output for the same batch as the targets",
        )


def targets_of(
    batch: Batch, *, vocab_size: int, sampled_log_step: float, rule: InclusionRule | None
) -> TeacherTargets:
    """Return the teacher's part of a batch of the stream."""
    return TeacherTargets(
        index_N=batch.label_index_N,
        entries=HeadTargets(
            batch.ids_NK,
            batch.logprobs_NK,
            batch.inclusion_NK,
            batch.log_z_N,
            batch.entropy_N,
            batch.label_ids_N,
            batch.label_logprob_N,
            batch.written_logprob_N,
        ),
        num_tokens=batch.input_ids_1T.shape[1],
        temperature=batch.temperature,
        vocab_size=vocab_size,
        sampled_log_step=sampled_log_step,
        rule=rule,
    )
