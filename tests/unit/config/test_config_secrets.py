"""Addresses with a secret are refused before they are written anywhere, and not shown."""

from __future__ import annotations

import pytest

from pipeline.config.mistakes import validated
from pipeline.config.schema import Settings
from pipeline.config.secrets import has_secret
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import ConfigError, StoreError
from pipeline.storage import Store
from pipeline.teacher.settings import TeacherSettings


class _Stage(Settings):
    corpus: CorpusSettings = CorpusSettings()


SECRET = [
    "https://me:hunter2@host/rows.jsonl",
    "s3://key:hunter2@bucket/cache",
    "https://host/rows.parquet?X-Amz-Signature=hunter2",
    "https://host/rows.parquet?a=b&sig=hunter2",
    "https://host/x?token=hunter2",
]
PLAIN = [
    "runs/default/cache", "s3://bucket/a:b/c@d", "hf://datasets/me/cache@main/folder",
    "abfs://container@account.dfs.core.windows.net/x", "https://host:8000/rows.jsonl?page=2",
    "Answer as me:you@host would.", "C:\\folder",
]  # fmt: skip


@pytest.mark.parametrize("address", SECRET)
def test_an_address_with_a_secret_is_refused_and_not_shown(address: str) -> None:
    assert has_secret(address)
    for settings, values in (
        (CorpusSettings, {"dataset_name": address}),
        (TeacherSettings, {"engine_options": {"x": [{"y": address}]}}),
    ):
        with pytest.raises(ConfigError, match="a password or a key") as refused:
            validated(settings, values)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^corpus\.dataset_name: found an address"):
        validated(_Stage, {"corpus": {"dataset_name": address}})
    with pytest.raises(StoreError, match="a password or a key") as refused_store:
        Store(address)
    assert "hunter2" not in str(refused_store.value)


@pytest.mark.parametrize("address", PLAIN)
def test_others_are_taken(address: str) -> None:
    assert not has_secret(address)
    validated(CorpusSettings, {"dataset_name": address})
