"""Exact expected squared error of the weight gradient, by the share of the control variate.

`make bench-control`. A sample's error is sum_j (p_j - kappa q_j) (d_j / pi_j - 1), where d_j says
whether entry j is sampled, so the expectation of its square is
sum_j (p_j - kappa q_j)^2 (1 / pi_j - 1), over the whole vocabulary (treating the entries of a
position as independent). This includes rare entries, which no feasible number of samples would
show. Rows are weighted by |h|^2, as in the head's
gradient.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.loss.sampled_divergence import row_share
from tests.bench.fidelity import sampled
from tests.bench.fidelity_data import Hidden, hidden_states
from tests.bench.quality import with_pruned_student

CHUNK = 64
CASES = (
    ("inclusion rule of T = 1 (tau 1/28), T = 1", sampled(1 / 28), 1.0),
    ("inclusion rule of T = 1, 2 (1/9, 1/23.5), T = 1", sampled(1 / 9, 1 / 23.5), 1.0),
    ("inclusion rule of T = 1, 2 (1/9, 1/23.5), T = 2", sampled(1 / 9, 1 / 23.5), 2.0),
)
CONSTANT = (0.15, 0.3, 0.7)


def quadratics(hidden: Hidden, weight_VD: Tensor) -> list[NDArray[np.float64]]:
    """Return for each case [5, N]: a, b, c of a row's error a - 2 b s + c s^2, D and v."""
    found: list[list[Tensor]] = [[] for _ in CASES]
    for start in range(0, len(hidden.label_N), CHUNK):
        rows = slice(start, start + CHUNK)
        h_RD = torch.from_numpy(hidden.student_ND[rows]).float()
        teacher_RV = (torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()).double()
        student_RV = (h_RD @ weight_VD.t()).double()
        label_R1 = torch.from_numpy(hidden.label_N[rows].astype(np.int64))[:, None]
        norm_R = h_RD.double().square().sum(-1)
        for (_, scheme, temperature), parts in zip(CASES, found, strict=True):
            assert scheme.rule is not None
            taus = zip(scheme.temperatures, scheme.rule.taus, strict=True)
            terms = [(torch.softmax(teacher_RV / t, -1) / tau).square() for t, tau in taus]
            pi_RV = torch.stack(terms).sum(0).sqrt()
            tail_RV = (pi_RV < 1).scatter_(1, label_R1, False)
            odds_RV = torch.where(tail_RV, 1 / pi_RV - 1, 0.0)
            log_p_RV = torch.log_softmax(teacher_RV / temperature, -1)
            log_q_RV = torch.log_softmax(student_RV / temperature, -1)
            p_RV, q_RV = log_p_RV.exp(), log_q_RV.exp()
            p_R, q_R = (p_RV * tail_RV).sum(-1), (q_RV * tail_RV).sum(-1)
            ratio_R = torch.where(q_R > 0, p_R / q_R, 0.0)
            ratio_RV = log_p_RV - log_q_RV
            apart_R = (p_RV * ratio_RV * ~tail_RV).sum(-1)
            spread_R = (p_RV * ratio_RV.square() * ~tail_RV).sum(-1) / (p_RV * ~tail_RV).sum(-1)
            apart_R += torch.where(p_R > 0, p_R * ratio_R.log(), 0.0)
            parts.append(
                torch.stack([
                    (p_RV.square() * odds_RV).sum(-1) * norm_R,
                    (p_RV * q_RV * odds_RV).sum(-1) * ratio_R * norm_R,
                    (q_RV.square() * odds_RV).sum(-1) * ratio_R.square() * norm_R,
                    apart_R,
                    spread_R,
                ])
            )  # fmt: skip
    return [torch.cat(parts, dim=1).numpy() for parts in found]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dropped", default="12,20", help="layers removed from the student")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pruned", action="store_true", help="the pruned student of bench-quality")
    arguments = parser.parse_args()
    dropped = tuple(map(int, arguments.dropped.split(",")))
    hidden = hidden_states(arguments.tokens, model=arguments.model, dropped=dropped)
    hidden = hidden.head(arguments.tokens)
    if arguments.pruned:
        hidden = with_pruned_student(hidden)
    cases = quadratics(hidden, torch.from_numpy(hidden.weight_VD))
    print(f"{len(hidden.label_N)} tokens; expected squared error over that without control variate")
    names = (*(f"{share:g}" for share in CONSTANT), "best one", "by row", "oracle")
    print(f"{'':<38} " + " ".join(f"{name:>8}" for name in names))
    ours = []
    for (name, scheme, temperature), case in zip(CASES, cases, strict=True):
        assert scheme.rule is not None
        a_N, b_N, c_N, *seen = case
        apart_N, spread_N = map(torch.from_numpy, seen)
        by_row_N = row_share(apart_N, spread_N, temperature, scheme.rule.highest).numpy()
        oracle_N = np.divide(b_N, c_N, out=np.zeros_like(b_N), where=c_N > 0)
        shares = (*CONSTANT, b_N.sum() / c_N.sum(), by_row_N, oracle_N)
        errors = [np.sum(a_N - 2 * b_N * s + c_N * s * s) / a_N.sum() for s in shares]
        print(f"{name:<38} " + " ".join(f"{error:8.3f}" for error in errors))
        ours.append(errors[-2])
    print(f"FIGURE control_variate_squared_error_t1 {ours[0]:.3f}")
    print(f"FIGURE control_variate_squared_error_t2 {ours[-1]:.3f}")


if __name__ == "__main__":
    main()
