"""Every token of the student's tokenizer has a row of its head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.student.build.vocabulary import _head_rows


@pytest.mark.parametrize("where", ["top", "text"])
def test_the_last_row_is_the_last_token(where: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 10}
    config = sizes if where == "top" else {"text_config": sizes}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert _head_rows(tmp_path, {"a": 0, "b": 9}) == 10
    assert _head_rows(tmp_path, {}) == 10
    with pytest.raises(ModelError, match="its head has 10 rows"):
        _head_rows(tmp_path, {"a": 0, "b": 10})
