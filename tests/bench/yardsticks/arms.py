"""The arms of the yardsticks: what is trained, from which start, by which rule and teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.teacher.sparsify.device import SparseScheme
from tests.bench.fidelity_cache import Cached, through_the_cache
from tests.bench.fidelity_run import GRID, sampled
from tests.bench.peers.rebuilt import drawn_renormalised, random_sampling, truncated
from tests.bench.quality import LEARNING_RATE
from tests.bench.yardsticks.targets import (
    Rule,
    chosen_positions,
    cross_entropy,
    dense,
    from_cache,
    from_peer,
    jensen_shannon,
    reverse_kl,
)
from tests.bench.yardsticks.training import Select, TeacherRows

__all__ = ["ARMS", "CE", "DENSE", "NEAR", "SPARSE", "Arm", "Rules", "Start", "Teacher", "selected"]

Start = Literal["reconstructed", "depth", "width", "near"]
"""`near`: the teacher without two of its thirty layers; the others have six, or as few weights."""
Teacher = Literal["plain", "adapted"]
SHARE = 0.2
"""Of the positions of a sequence, in the arms that select them."""
NEAR, NEAR_RATE = "near: ", 1e-4
CE, DENSE, BUCKET, SAMPLED = "cross-entropy alone", "dense", "top-64 + bucket", "sampled"
DRAWS = ("12 draws", "50 draws", "256 draws renormalised")
SPARSE = ("top-12 truncated", "top-50 truncated", BUCKET, *DRAWS, SAMPLED)
_SCHEMES = {BUCKET: SparseScheme(64, GRID), SAMPLED: sampled(1 / 28)}
_EXACT: dict[str, Rule] = {
    CE: cross_entropy, DENSE: dense, "reverse KL": reverse_kl, "Jensen-Shannon": jensen_shannon,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train a student; arms of one section share start, order and steps."""

    name: str
    section: int
    target: str = DENSE
    select: Literal["", "student", "teacher", "random"] = ""
    start: Start = "reconstructed"
    teacher: Teacher = "plain"
    learn_head: bool = False
    """The embedding that is also the head. Where channels are cut it has to; the arms compared
    with that do the same."""
    learning_rate: float = LEARNING_RATE


ARMS = (
    *(Arm(name, 1, name) for name in (CE, DENSE, *SPARSE)),
    Arm("20 % by student entropy", 2, select="student"),
    Arm("20 % by teacher entropy", 2, select="teacher"),
    Arm("20 % at random", 2, select="random"),
    Arm("depth", 3, start="depth", learn_head=True),
    Arm("width", 3, start="width", learn_head=True),
    Arm("depth, reconstructed", 3, start="reconstructed", learn_head=True),
    Arm("depth, adapted teacher", 3, start="depth", teacher="adapted", learn_head=True),
    Arm("width, adapted teacher", 3, start="width", teacher="adapted", learn_head=True),
    Arm("reverse KL", 4, "reverse KL"),
    Arm("Jensen-Shannon", 4, "Jensen-Shannon"),
    *(
        Arm(f"{NEAR}{name}", 5, name, start="near", learning_rate=NEAR_RATE)
        for name in (CE, DENSE, SPARSE[0], SPARSE[1], BUCKET, DRAWS[1], SAMPLED)
    ),
)


class Rules:
    """The rules of one teacher's sequences; caches are made when they are first asked for."""

    def __init__(self, teacher: TeacherRows) -> None:
        self.teacher = teacher
        self._cached: dict[str, Cached] = {}

    def of(self, target: str, seed: int) -> Rule:
        """Return the rule of a target; `seed` decides what is drawn from a teacher's rows."""
        if target in _EXACT:
            return _EXACT[target]
        if target in _SCHEMES:
            return from_cache(self._of_cache(target).batch(1.0), _SCHEMES[target])
        count = int(target.split()[0].removeprefix("top-"))
        if target.startswith("top-"):
            return from_peer(truncated(count))
        make = drawn_renormalised if target.endswith("renormalised") else random_sampling
        return from_peer(make(count, seed=seed))

    def entries(self, target: str) -> float:
        """Return the different ids that a token's target keeps, on average."""
        if target in _SCHEMES:
            return self._of_cache(target).entries
        count = int(target.split()[0].removeprefix("top-"))
        if target.startswith("top-"):
            return float(count)
        peer = random_sampling(count)
        some_NV = self.teacher.log_p_NV[: 32 * 64]
        ids = [peer.store(part_RV).ids_RK.sort(-1).values for part_RV in some_NV.split(64)]
        return float(np.mean([(i[:, 1:] != i[:, :-1]).sum() / len(i) + 1 for i in ids]))

    def _of_cache(self, target: str) -> Cached:
        if target not in self._cached:
            data = self.teacher.data
            weight_VD = torch.from_numpy(data.weight_VD)
            self._cached[target] = through_the_cache(data, weight_VD, _SCHEMES[target])
        return self._cached[target]


def selected(arm: Arm) -> Select | None:
    """Return how the arm chooses positions; None: it learns from all."""
    by: dict[str, Callable[[Tensor, Tensor, np.random.Generator], Tensor]] = {
        "student": lambda student_N, _teacher_N, _random: student_N,
        "teacher": lambda _student_N, teacher_N, _random: teacher_N,
        "random": lambda _s, teacher_N, random: torch.from_numpy(random.random(len(teacher_N))),
    }
    if not arm.select:
        return None
    score = by[arm.select]
    return lambda student_N, teacher_N, random: chosen_positions(
        score(student_N, teacher_N, random), SHARE
    )
