"""The name of a sweep's run is taken by every tool that it is handed to."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s.submission.sweep import run_name
from pipeline.student.settings.student import is_repository
from pipeline.sweeps.plan import slug

VALUES = {
    "loss.alpha": 0.5,
    "loss.temperature": 2.0,
    "student.keep_layers": [0, 3, 6],
    "student.model": "/models/Qwen, the = tiny one",
    "train.learning_rate": 1e-05,
    "student.freeze": ["embed_tokens", "lm_head.*"],
}


@given(
    st.dictionaries(
        st.sampled_from(["loss.alpha", "seed", "student.model", "train.learning_rate"]),
        st.one_of(
            st.text(max_size=30),
            st.text(alphabet="-._=,+/ a", max_size=12),
            st.floats(),
            st.integers(),
            st.none(),
            st.booleans(),
            st.lists(st.floats(), max_size=4),
        ),
        min_size=1,
    )
)
def test_a_slug_is_a_file_and_a_repository_name(values: dict[str, Any]) -> None:
    name = slug(values)
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,79}", name)
    whole = f"{name}-1a2b3c4d"
    assert is_repository(whole)
    # A job's name, and a part of a label, as Kubernetes has them.
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", run_name(name, "1a2b3c4d"))


def test_a_slug_tells_values_apart_that_differ_in_their_sign() -> None:
    assert slug({"loss.alpha": -1.5}) == "alpha-minus1.5"
    assert slug({"loss.alpha": -1.5}) != slug({"loss.alpha": 1.5})


def test_the_hub_takes_the_name() -> None:
    from huggingface_hub.utils import validate_repo_id

    name = f"{slug(VALUES)}-1a2b3c4d"
    validate_repo_id(name)
    validate_repo_id(f"someone/{name}")


def test_the_line_of_the_card_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command goes through lm-eval's own parser and finds the very folder."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from pipeline.student.output import card

    line = re.search(r"^lm-eval run .*$", Path(card.__file__).read_text(), re.MULTILINE)
    assert line is not None
    folder = tmp_path / "runs" / f"{slug(VALUES)}-1a2b3c4d" / "model"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", shlex.split(line[0].replace("{place}", str(folder))))
    read = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    assert read.model_args == {"pretrained": str(folder)}
    assert Path(read.model_args["pretrained"]).is_dir()
