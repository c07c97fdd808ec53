"""Other projects' rows in the benches: whose code runs, and that a wrong path or name is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from tests.bench.fidelity_data import Hidden
from tests.bench.fidelity_run import Errors, at, bytes_at
from tests.bench.fidelity_spread import _summary
from tests.bench.peers.adapters import PROJECTS, caption, peers_of
from tests.bench.peers.checkout import Checkout, load, parse
from tests.bench.peers.rebuilt import rebuilt, truncated
from tests.bench.peers.seam import gradient_of, rows_of
from tests.bench.quality import _loss, _targets

VOCABULARY = 200
SWIFT = "swift/rlhf_trainers/gkd_loss.py"
# Stands for a checkout of ms-swift: a loss that nothing else here computes.
LOSS = """
class TeacherOutput:
    def __init__(self, **given):
        self.ids = given["topk_indices"]

def gkd_loss(student_logits, teacher_output, labels, beta, temperature):
    return student_logits.gather(-1, teacher_output.ids).sum() * 7, None
"""


@pytest.fixture
def swift(tmp_path: Path) -> Path:
    file = tmp_path / "checkout" / SWIFT
    file.parent.mkdir(parents=True)
    file.write_text(LOSS)
    return tmp_path / "checkout"


def _logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("key", PROJECTS)
def test_a_path_that_is_no_checkout_is_told_in_one_message(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        parse([f"{key}={tmp_path}"], PROJECTS)
    project = PROJECTS[key]
    assert f"--peer {key}={tmp_path}: the path has no {project.marks[0]}" in refused.value.found
    assert refused.value.expected.startswith(f"a checkout of {project.title}")
    assert f"git clone {project.repository}" in refused.value.do
    with pytest.raises(ConfigError, match="the path is no folder"):
        parse([f"{key}={tmp_path / 'nowhere'}"], PROJECTS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("distilkit=/x", "did you mean distillkit"),
        ("Axolot=/x", "did you mean axolotl"),
        ("ms_swift=/x", "did you mean ms-swift"),
        ("nothing-alike=/x", "use one of these names"),
        ("verl", "as in --peer verl=/path/to/it"),
        ("verl=", "expected --peer NAME=PATH"),
    ],
)
def test_a_wrong_option_is_told_with_the_right_name(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse([given], PROJECTS)


def test_a_project_given_twice_is_told(swift: Path) -> None:
    with pytest.raises(ConfigError, match="ms-swift is given twice"):
        parse([f"ms-swift={swift}"] * 2, PROJECTS)


def test_the_commit_is_read_from_the_checkout(swift: Path) -> None:
    def checkout() -> Checkout:
        return parse([f"ms-swift={swift}"], PROJECTS)["ms-swift"]

    assert checkout().commit == "commit not known (no git repository)"
    assert not checkout().is_clean
    _git(swift, "init", "-q")
    _git(swift, "add", ".")
    _git(swift, "commit", "-qm", "first")
    assert checkout().commit == f"commit {_git(swift, 'rev-parse', 'HEAD')}"
    assert checkout().is_clean
    (swift / SWIFT).write_text(LOSS + "\n")
    assert checkout().commit.endswith(", with local changes")
    assert not checkout().is_clean


def test_rebuilt_rows_say_so_and_others_do_not(swift: Path) -> None:
    without = rows_of(peers_of({}, VOCABULARY))
    assert all(name.endswith(", rebuilt") for name in without)
    assert any("ms-swift" in name for name in without)
    checkouts = parse([f"ms-swift={swift}"], PROJECTS)
    peers = peers_of(checkouts, VOCABULARY)
    ours = [name for name in rows_of(peers) if "ms-swift" in name]
    assert ours == ["ms-swift, k = 64"]
    told = caption(checkouts, peers)
    assert f"ms-swift: {PROJECTS['ms-swift'].repository}, commit not known" in told
    assert "ms-swift, k = 64: gkd_logits_topk 64, beta 0" in told


def test_a_row_runs_the_checkouts_own_code(swift: Path) -> None:
    peers = peers_of(parse([f"ms-swift={swift}"], PROJECTS), VOCABULARY)
    peer, loss = rows_of(peers)["ms-swift, k = 64"]
    stored = peer.store(_logits(0))
    expected = torch.zeros(5, VOCABULARY).scatter(1, stored.ids_RK, 7.0)
    for temperature in (1.0, 2.0):
        found = loss.gradient(stored, _logits(1), temperature)
        torch.testing.assert_close(found, temperature * expected)
    assert peer.stored_bytes() is None


def test_a_checkout_of_another_version_is_told(swift: Path) -> None:
    (swift / SWIFT).write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ConfigError, match=r"gkd_loss\.py does not run: .*a_package_that_is_not"):
        peers_of(parse([f"ms-swift={swift}"], PROJECTS), VOCABULARY)


def test_loaded_modules_leave_installed_ones_alone(tmp_path: Path) -> None:
    (tmp_path / "decoder.py").write_text("from json.missing import thing\nvalue = thing\n")
    checkout = Checkout(PROJECTS["trl"], tmp_path, "")
    before = {name: module for name, module in sys.modules.items() if name.startswith("json")}
    files = {"json.decoder": "decoder.py"}
    made = load(checkout, files, absent={"json.missing": {"thing": 3}})
    assert made["json.decoder"].value == 3
    after = {name: module for name, module in sys.modules.items() if name.startswith("json")}
    assert after == before


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_of_rebuilt_rows_are_those_of_their_divergences(temperature: float) -> None:
    teacher, student = _logits(0), _logits(1)
    names = {peer.name.split(",")[0]: (peer, loss) for peer, loss in rows_of(rebuilt()).values()}

    def kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum()

    for name in ("Axolotl", "verl", "ms-swift"):
        peer, loss = names[name]
        stored = peer.store(teacher)
        log_p = torch.log_softmax(teacher / temperature, -1).gather(1, stored.ids_RK)
        if name != "verl":
            log_p = torch.log_softmax(log_p, -1)

        def divergence(logits: torch.Tensor, name=name, stored=stored, log_p=log_p) -> torch.Tensor:
            log_q = torch.log_softmax(logits / temperature, -1).gather(1, stored.ids_RK)
            return kl(torch.log_softmax(log_q, -1) if name == "ms-swift" else log_q, log_p)

        expected = gradient_of(divergence, student, temperature)
        torch.testing.assert_close(loss.gradient(stored, student, temperature), expected)


def test_draws_are_right_on_average() -> None:
    peer, loss = next(row for name, row in rows_of(rebuilt()).items() if "draws" in name)
    teacher, student = _logits(0), _logits(1)
    found = [loss.gradient(peer.store(teacher), student, 1.0) for _ in range(400)]
    exact = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    assert float((torch.stack(found).mean(0) - exact).norm() / exact.norm()) < 0.05


def test_bytes_at_an_error_between_and_beyond_the_points() -> None:
    table = {f"threshold, tau = 1/{n}": Errors(0, float(n), at={1.0: [1 / n]}) for n in (8, 16, 32)}
    table["threshold, of two"] = Errors(0, 1.0, at={1.0: [0.1], 2.0: [0.1]})
    for error in (1 / 4, 1 / 8, 1 / 20, 1 / 32, 1 / 64):
        assert bytes_at(table, error) == pytest.approx(1 / error)


def test_an_error_at_more_tokens_is_noise_and_bias() -> None:
    counts = (1000, 2000, 4000)
    errors = [(3 / count + 1e-4) ** 0.5 for count in counts]
    assert at(2000, counts, errors) == errors[1]
    assert at(64_000, counts, errors) == pytest.approx((3 / 64_000 + 1e-4) ** 0.5)


def test_a_spread_names_least_mean_and_most(capsys: pytest.CaptureFixture[str]) -> None:
    _summary("figure", [1.0, 2.0, 6.0])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "FIGURE figure_least 1.000",
        "FIGURE figure_mean 3.000",
        "FIGURE figure_most 6.000",
    ]


def test_targets_of_students_are_named_as_what_they_are() -> None:
    others = rows_of([truncated(64), *rebuilt()])
    assert _targets(None, others) == [
        "dense", "sampled", "top-64 truncated", "DistillKit budget, zero, rebuilt",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean DistillKit budget, zero, rebuilt"):
        _targets(["DistillKit budget, zero"], others)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_students_learn_from_a_projects_own_loss(swift: Path, temperature: float) -> None:
    """The gradient on the student's logits is T times that on logits / T: that of T^2 KL."""
    teacher_ND = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float16)
    weight_VD = np.random.default_rng(1).normal(size=(VOCABULARY, 8)).astype(np.float32)
    ids_L, loss_mask_L = np.zeros(6, np.int32), np.arange(6) > 0
    train = Hidden(
        teacher_ND, teacher_ND, weight_VD, np.zeros(5, np.int64), ["a"], [ids_L], [loss_mask_L]
    )
    others = rows_of(peers_of(parse([f"ms-swift={swift}"], PROJECTS), VOCABULARY))
    peer, one = others["ms-swift, k = 64"]
    loss = _loss("ms-swift, k = 64", temperature, train, torch.from_numpy(weight_VD), (peer, one))
    hidden_ND = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    head_VD = torch.from_numpy(weight_VD)
    loss(hidden_ND, head_VD, np.array([0])).backward()
    logits_RV = torch.from_numpy(teacher_ND).float() @ head_VD.t()
    stored = peer.store(logits_RV)
    expected_RV = temperature * one.gradient(
        stored, (hidden_ND @ head_VD.t()).detach(), temperature
    )
    torch.testing.assert_close(hidden_ND.grad, expected_RV @ head_VD)
