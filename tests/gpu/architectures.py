"""Packed against alone for many families, and each attention against eager.

Legend: T tokens of the packed row, D hidden.
"""

from __future__ import annotations

import torch

from pipeline.errors import ConfigError
from pipeline.student.forward.attention import attention_order, make_known, require_attention
from pipeline.student.forward.body import text_body
from pipeline.student.forward.trial import relative_errors, run_packing_trial, trial_row
from pipeline.student.forward.ways import BodyForward
from tests.gpu.check import Figure, Place, at_least, at_most
from tests.tiny_families import FAMILIES, family_model

__all__ = ["attention_against_eager", "packed_against_alone"]

_FEW = ("Llama", "Mixtral", "Gemma 3", "Falcon-H1", "LFM2")
"""Enough to try the check itself; `make check-families` tries all of them on a CPU."""


def packed_against_alone(place: Place) -> list[Figure]:
    """Run the packing trial of each family, in float32 and in bfloat16 on a GPU."""
    figures = []
    for dtype in (torch.float32, *((torch.bfloat16,) if place.on_gpu else ())):
        packed, alone, worst = 0, 0, 0.0
        for name in FAMILIES if place.on_gpu else [n for n in FAMILIES if n in _FEW]:
            model = family_model(name).to(place.device, dtype)
            trial = run_packing_trial(BodyForward(text_body(model)), model, device=place.device)
            right = [tried for tried in trial.tried if tried.right]
            packed, alone = packed + bool(right), alone + (not right)
            if right:
                worst = max(worst, right[0].seen)
            how = right[0].way if right else "alone"
            print(f"{name}: {how}, differs by {trial.best.error:.2g}", flush=True)
        kind = str(dtype).removeprefix("torch.")
        figures += [
            Figure(f"families_packed_{kind}", packed),
            Figure(f"families_one_at_a_time_{kind}", alone),
            at_most(
                f"largest_change_by_neighbours_{kind}", worst, 1e-4 if kind == "float32" else 1e-2
            ),
        ]
    return figures


def attention_against_eager(place: Place) -> list[Figure]:
    """Compare hidden states of a packed row, with grouped queries and windows, for each kind."""
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    kind = str(dtype).removeprefix("torch.")
    figures = []
    for family in ("Llama", "Mistral"):
        torch.manual_seed(0)
        model = family_model(family).to(place.device, dtype).eval()
        forward = BodyForward(text_body(model), "boundaries")
        lengths = (11, 13, 6)
        row = trial_row(model, lengths, place.device)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            eager_TD = forward(*row, lengths).hidden_TD
        for wanted in ("varlen", "flash", "flex", "sdpa"):
            try:
                require_attention(wanted, kind, on_gpu=place.on_gpu)
            except ConfigError:
                continue
            order = attention_order(wanted, kind, on_gpu=place.on_gpu)
            make_known(order)
            model.set_attn_implementation(order[0])
            with torch.no_grad():
                error_T = relative_errors(forward(*row, lengths).hidden_TD, eager_TD)
            # 16 bit: the middle token. Another order of sums rounds differently.
            error = float(error_T.median() if place.on_gpu else error_T.max())
            figures.append(
                at_most(f"{wanted}_against_eager_{family}", error, 5e-2 if place.on_gpu else 1e-4)
            )
    return [at_least("attentions_tried", len(figures) / 2, 1), *figures]
