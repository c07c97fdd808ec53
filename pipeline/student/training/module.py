"""The module DeepSpeed wraps: the student's body, then the fused head with the loss inside.

Legend: T tokens of a flattened micro-batch, N supervised tokens, K entries, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.data.collate import Batch
from pipeline.loss.targets import HeadTargets, LossTerms
from pipeline.student.forward.body import text_body
from pipeline.student.forward.router import RouterLoss
from pipeline.student.forward.ways import BodyForward

__all__ = ["StudentModule", "module_inputs"]


class StudentModule(nn.Module):
    """Hidden states of packed sequences, picked where a supervised token is predicted, to the loss.

    The loss is computed inside the head module, so that ZeRO 3 gathers its weight in time.
    """

    def __init__(self, model: Any, router: RouterLoss | None = None) -> None:
        """Wrap a model whose head `install_distill_head` has replaced.

        `router`: an auxiliary loss that is trained beside; evaluation leaves it out.
        """
        super().__init__()
        self.model = model
        self.body = BodyForward(text_body(model), router_logits=router is not None)
        self.router = router

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        lengths: tuple[int, ...],
        label_index_N: torch.Tensor,
        ids_NK: torch.Tensor,
        logprobs_NK: torch.Tensor,
        inclusion_NK: torch.Tensor | None,
        log_z_N: torch.Tensor,
        entropy_N: torch.Tensor,
        label_N: torch.Tensor,
        scale: float,
        predictions: bool = False,
        temperature: float | None = None,
        label_logprob_N: torch.Tensor | None = None,
        written_logprob_N: torch.Tensor | None = None,
        weight_N: torch.Tensor | None = None,
        top_k_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LossTerms]:
        """Return the loss times `scale`, and its terms; plus the router's loss of the micro-batch.

        The latter is not scaled: it is a mean already, and DeepSpeed's division by accumulation and
        average over ranks make it that of all micro-batches.

        Args:
            input_ids_1T: int64, sequences one after the other.
            position_ids_1T: int64, starting at 0 with each sequence; what else separates them is
                up to the way in which `body` runs them.
            lengths: tokens of each sequence, on the host.
            label_index_N: int64, for each supervised token the place t whose hidden state predicts
                it.
            ids_NK: see `HeadTargets`, as the next five.
            logprobs_NK: float32.
            inclusion_NK: float32 or None.
            log_z_N: float32.
            entropy_N: float32.
            label_N: int64.
            scale: world_size * accumulation / supervised tokens of the global batch, which makes
                the sum of all micro-batches' losses the mean over supervised tokens after DeepSpeed
                has divided by accumulation and averaged over ranks.
            predictions: also return the student's top token and its log-probability.
            temperature: measure the forward KL at this one, instead of the loss; see `DistillHead`.
            label_logprob_N: float32 or None; see `HeadTargets`, as the next.
            written_logprob_N: float32 or None.
            weight_N: see `HeadTargets`, as the next.
            top_k_N: bool or None.
        """
        output = self.body(input_ids_1T, position_ids_1T, lengths)
        hidden_ND = output.hidden_TD.index_select(0, label_index_N)
        targets = HeadTargets(
            ids_NK, logprobs_NK, inclusion_NK, log_z_N, entropy_N, label_N, label_logprob_N,
            written_logprob_N, weight_N, top_k_N,
        )  # fmt: skip
        head = self.model.get_output_embeddings()
        terms: LossTerms = head(
            hidden_ND, targets, predictions=predictions, temperature=temperature
        )
        loss = terms.loss * scale
        if self.router is not None and torch.is_grad_enabled():
            # A rank without work runs a dummy token, whose routing is not to be learned from.
            share = 0.0 if label_index_N.numel() == 0 else 1.0
            loss = loss + share * self.router(output.router_logits)
        return loss, terms


def module_inputs(
    batch: Batch, scale: float, weight_N: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return what `StudentModule` is called with for a batch.

    Args:
        batch: a micro-batch, or a slice of one.
        scale: of its loss.
        weight_N: of its targets; None: their share of a position alone.
    """
    return {
        "input_ids_1T": batch.input_ids_1T,
        "position_ids_1T": batch.position_ids_1T,
        "lengths": batch.lengths,
        "label_index_N": batch.label_index_N,
        "ids_NK": batch.ids_NK,
        "logprobs_NK": batch.logprobs_NK,
        "inclusion_NK": batch.inclusion_NK,
        "log_z_N": batch.log_z_N,
        "entropy_N": batch.entropy_N,
        "label_N": batch.label_ids_N,
        "label_logprob_N": batch.label_logprob_N,
        "written_logprob_N": batch.written_logprob_N,
        "scale": scale,
        "weight_N": batch.share_N if weight_N is None else weight_N,
        "top_k_N": batch.top_k_N,
    }
