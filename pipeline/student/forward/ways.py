"""How the sequences of a micro-batch go through the body: in one row, or one after the other.

Legend: T tokens of a flattened micro-batch, S sequences, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["BodyForward", "BodyOutput", "Way", "boundaries"]

Way = Literal["boundaries", "positions", "alone"]
"""`positions`: one packed row in which position ids restart, which is all that separates its
sequences. `boundaries`: besides, the kernels get where sequences begin. `alone`: a pass each."""


@dataclass(frozen=True, slots=True)
class BodyOutput:
    """What the body makes of a micro-batch."""

    hidden_TD: Tensor
    router_logits: tuple[Tensor, ...] = ()
    """Of each layer of experts, [T, experts]; none unless asked for."""


class BodyForward:
    """The body of a student and the way in which micro-batches go through it."""

    def __init__(self, body: Any, way: Way = "positions", *, router_logits: bool = False) -> None:
        """Keep the parts.

        Args:
            body: as `text_body` finds it.
            way: changed by assignment, once a trial has found which is right.
            router_logits: also return those of a mixture of experts.
        """
        self.body = body
        self.way: Way = way
        self._options: dict[str, Any] = {"use_cache": False}
        if router_logits:
            self._options["output_router_logits"] = True

    def __call__(
        self, input_ids_1T: Tensor, position_ids_1T: Tensor, lengths: Sequence[int]
    ) -> BodyOutput:
        """Return the last hidden states of all tokens, in their order.

        Under ZeRO 3 all ranks have to call it at once; with `alone` they make the same number of
        passes, because each of them gathers weights from all.

        Args:
            input_ids_1T: int64, sequences one after the other.
            position_ids_1T: int64, starting at 0 with each sequence.
            lengths: tokens of each sequence, on the host; their sum is T.
        """
        if self.way != "alone":
            extra = boundaries(lengths, input_ids_1T.device) if self.way == "boundaries" else {}
            return self._pass(input_ids_1T, position_ids_1T, extra)
        ids = torch.split(input_ids_1T, list(lengths), 1)
        positions = torch.split(position_ids_1T, list(lengths), 1)
        # Agreed first: between passes, one rank's sum would meet another's gathered weights.
        most = _most_passes(self.body, len(ids), input_ids_1T.device)
        outputs = [self._pass(*row, {}) for row in zip(ids, positions, strict=True)]
        hidden_TD = torch.cat([output.hidden_TD for output in outputs])
        for _ in range(most - len(ids)):
            idle = self._pass(input_ids_1T[:, :1], position_ids_1T[:, :1], {})
            # In the graph, so that the backward gathers what the other ranks' gathers.
            hidden_TD = hidden_TD + 0.0 * idle.hidden_TD.sum()
        layers = zip(*(output.router_logits for output in outputs), strict=True)
        return BodyOutput(hidden_TD, tuple(torch.cat(layer) for layer in layers))

    def _pass(
        self, input_ids_1L: Tensor, position_ids_1L: Tensor, extra: dict[str, Any]
    ) -> BodyOutput:
        output = self.body(
            input_ids=input_ids_1L, position_ids=position_ids_1L, **self._options, **extra
        )
        logits = getattr(output, "router_logits", None) or ()
        return BodyOutput(
            output.last_hidden_state[0],
            tuple(layer.reshape(-1, layer.shape[-1]) for layer in logits if layer is not None),
        )


def boundaries(lengths: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Return where sequences begin, under the names by which transformers hands it to kernels.

    `cu_seq_lens_q` and `_k`: int32 [S + 1]; `max_length_q` and `_k`: tokens of the longest, on the
    host, so that no kernel has to wait for the device; `seq_idx`: int32 [1, T], each token's
    sequence.
    """
    counts = torch.tensor([0, *lengths], dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts[1:])
    longest = max(lengths)
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
        "max_length_q": longest, "max_length_k": longest,
        "seq_idx": index[None].to(device, non_blocking=True),
    }  # fmt: skip


def _most_passes(body: Any, passes: int, device: torch.device) -> int:
    """Return the passes of the rank with the most sequences, where passes gather weights."""
    import torch.distributed as dist

    partitioned = any(hasattr(parameter, "ds_id") for parameter in body.parameters())
    if not partitioned or not dist.is_initialized() or dist.get_world_size() == 1:
        return passes
    most = torch.tensor(passes, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
