"""Run what is missing of the yardsticks, then print the tables: `make bench-yardsticks`.

Comparisons that papers make at their size, in miniature: students of sparse targets (RS-KD), far
from the teacher and near it, of selected positions (SE-KD), pruned in width or in depth with the
teacher adapted or not (Minitron), of other divergences, and copying beside perplexity. Within a
comparison all students share start, sequences, order and steps; three seeds decide the order and
what is drawn. Each result is kept below `runs/bench/yardsticks`, so that a stopped bench goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError, run_command
from tests.bench.fidelity_data import Hidden, samples_of
from tests.bench.yardsticks.arms import ARMS, CE, SPARSE, Arm, Rules, selected
from tests.bench.yardsticks.copying import copying_scores, random_copies, text_copies
from tests.bench.yardsticks.data import loaded, short_texts, with_states
from tests.bench.yardsticks.gradients import Compared, compare_gradients
from tests.bench.yardsticks.students import (
    RESULTS,
    adapted_teacher,
    parameters_of,
    plain_teacher,
    start_folder,
)
from tests.bench.yardsticks.tables import (
    print_copying,
    print_figures,
    print_gradients,
    print_students,
)
from tests.bench.yardsticks.training import TeacherRows, heldout_scores, train

COPIES, COPY_LENGTH = 12, 32
GRADIENT_STEPS = 6
"""Steps whose gradients are compared, a trained student's as well as the start's."""
TRAINED = "trained, dense"


class Bench:
    """All runs of one size."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        train, heldout, per_step = arguments.train, arguments.heldout, arguments.per_step
        self.sizes = f"{train}-{per_step}-{heldout}-{arguments.length}"
        head_VD = loaded(plain_teacher()).get_output_embeddings().weight.detach().numpy()
        data = short_texts(samples_of(arguments.tokens), arguments.length, head_VD)
        wanted = 2 * train + heldout
        if len(data.input_ids) < wanted:
            raise ConfigError(
                f"--tokens {arguments.tokens} are {len(data.input_ids)} sequences of mostly "
                f"supervised beginnings of {arguments.length} tokens",
                expected=f"at least {wanted}: --train twice (students, adapted teacher), --heldout",
                do="give more tokens or smaller sizes",
            )
        self.train, self.heldout = data.part(0, train), data.part(train, train + heldout)
        self.text = data.part(train + heldout, wanted)
        self.copies = {
            "random": random_copies(COPIES, COPY_LENGTH, len(data.weight_VD)),
            "text": text_copies(COPIES, COPY_LENGTH, self.heldout.input_ids),
        }

    def results(self) -> dict[str, dict[str, np.ndarray]]:
        """Train what is missing; return all scores by arm and measure, seeds first."""
        arms = [arm for arm in ARMS if arm.name in self.arguments.arms]
        found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
        taught: dict[str, tuple[Rules, TeacherRows]] = {}
        for seed in range(self.arguments.seeds):
            for arm in arms:
                file = self._file(f"{arm.name}-{seed}")
                if not file.exists():
                    if arm.teacher not in taught:
                        rows = [self._rows(d, arm.teacher) for d in (self.train, self.heldout)]
                        taught[arm.teacher] = Rules(rows[0]), rows[1]
                    self._run(arm, seed, *taught[arm.teacher], file)
                found[arm.name].append(json.loads(file.read_text()))
        return {
            name: {key: np.array([run[key] for run in runs]) for key in runs[0]}
            for name, runs in found.items()
        }

    def before(self) -> dict[str, dict[str, Any]]:
        """Return the scores of the teachers and of the students before training."""
        folders = {"teacher": plain_teacher()}
        if any(arm.teacher == "adapted" for arm in ARMS if arm.name in self.arguments.arms):
            folders["teacher, adapted"] = adapted_teacher(self.text, self.arguments.per_step)
        starts = {arm.start for arm in ARMS if arm.name in self.arguments.arms}
        for start in sorted(starts):
            folders[f"start, {start}"] = start_folder(start, self.text)
        heldout: TeacherRows | None = None
        found = {}
        for name, folder in folders.items():
            file = self._file(name)
            if not file.exists():
                heldout = heldout or self._rows(self.heldout, "plain")
                model = loaded(folder)
                scores = self._scores(model, heldout)
                _keep(file, {**scores, "parameters": parameters_of(model)})
            found[name] = json.loads(file.read_text())
            print(f"{name}: {found[name]['parameters'] / 1e6:.1f} million parameters", flush=True)
        return found

    def gradients(self) -> dict[str, dict[str, Compared]]:
        """Return the comparison of gradients, by state of the student and by target."""
        folders = {"start": start_folder("reconstructed", self.text), TRAINED: self._trained}
        if any(arm.start == "near" for arm in ARMS if arm.name in self.arguments.arms):
            folders["near"] = start_folder("near", self.text)
        found: dict[str, dict[str, Compared]] = {}
        rules: Rules | None = None
        for state, folder in folders.items():
            file = self._file(f"gradients-{state}")
            if not file.exists() and (folder / "config.json").exists():
                rules = rules or Rules(self._rows(self.train, "plain"))
                compared = compare_gradients(
                    loaded(folder), rules.teacher,
                    {name: rules.of(name, 0) for name in (CE, *SPARSE)},
                    per_step=self.arguments.per_step,
                    steps=min(GRADIENT_STEPS, self.arguments.train // self.arguments.per_step),
                )  # fmt: skip
                entries = {name: rules.entries(name) for name in SPARSE}
                rows = {name: asdict(row) for name, row in compared.items()}
                _keep(file, {"rows": rows, "entries": entries})
            if file.exists():
                rows = json.loads(file.read_text())["rows"]
                found[state] = {name: Compared(**row) for name, row in rows.items()}
        return found

    def entries(self) -> Mapping[str, float]:
        """Return the ids that a token's targets keep, as the comparison of gradients found."""
        file = self._file("gradients-start")
        entries: Mapping[str, float] = json.loads(file.read_text())["entries"]
        return entries

    @property
    def _trained(self) -> Path:
        return RESULTS / f"dense-0-{self.sizes}"

    def _file(self, name: str) -> Path:
        return RESULTS / f"{name}-{self.sizes}.json".replace(" ", "_").replace("%", "percent")

    def _rows(self, data: Hidden, teacher: str) -> TeacherRows:
        folder = plain_teacher()
        if teacher == "adapted":
            folder = adapted_teacher(self.text, self.arguments.per_step)
        name = f"states-{teacher}-{len(data.label_N)}-{data.sample_ids[0][:16]}-{self.sizes}.npy"
        return TeacherRows.of(with_states(folder, data, RESULTS / name))

    def _run(self, arm: Arm, seed: int, rules: Rules, heldout: TeacherRows, file: Path) -> None:
        model = loaded(start_folder(arm.start, self.text))
        train(
            model, rules.teacher, rules.of(arm.target, seed), seed=seed,
            per_step=self.arguments.per_step, select=selected(arm), learn_head=arm.learn_head,
            learning_rate=arm.learning_rate,
        )  # fmt: skip
        if arm.name == "dense" and seed == 0:
            model.save_pretrained(self._trained)
        scores = self._scores(model, heldout)
        _keep(file, scores)
        print(f"{file.stem}: loss {np.mean(scores['loss']):.4f} KL {np.mean(scores['kl']):.4f}",
              flush=True)  # fmt: skip

    def _scores(self, model: Any, heldout: TeacherRows) -> dict[str, Any]:
        scores = asdict(heldout_scores(model, heldout))
        for kind, ids_ST in self.copies.items():
            copied = copying_scores(model, ids_ST)
            scores[f"{kind}_accuracy"] = copied.accuracy_S
            scores[f"{kind}_gain"] = copied.gain_S
        return scores


def _keep(file: Path, scores: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(scores))
    partial.rename(file)


def _arms(asked: list[str] | None) -> list[str]:
    """Return the names of the arms to run.

    Raises:
        ConfigError: one of those asked for is none.
    """
    known = [arm.name for arm in ARMS]
    for name in asked or []:
        if name not in known:
            raise ConfigError(
                f"--arms {name} is no arm",
                expected=f"some of: {'; '.join(known)}",
                do=did_you_mean(name, known) or "use these names",
            )
    return asked or known


def main() -> None:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=40, help="sequences to train on")
    parser.add_argument("--per_step", type=int, default=2, help="sequences of a step")
    parser.add_argument("--heldout", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence at most")
    parser.add_argument("--tokens", type=int, default=65_536, help="read of the corpus")
    parser.add_argument("--arms", nargs="*", default=None, help="these alone, by their names")
    arguments = parser.parse_args()
    arguments.arms = _arms(arguments.arms)
    RESULTS.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    starts = bench.before()
    scores = bench.results()
    compared = bench.gradients()
    tokens = len(bench.train.label_N) * arguments.per_step // arguments.train
    print_gradients(compared, bench.entries(), tokens)
    print_students(scores, starts)
    print_copying(scores, starts)
    print_figures(scores, compared)


if __name__ == "__main__":
    sys.exit(run_command(main))
