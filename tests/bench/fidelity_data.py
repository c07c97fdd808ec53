"""Hidden states of a teacher and of a student that is the teacher without two layers.

The data of `tests.bench.fidelity`. Computed once for a text and a number of tokens (minutes) and
kept below `runs/bench/`, which git ignores. All texts come with Python: nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.corpus.settings import CorpusSettings
from pipeline.models.load import load_causal_lm
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizer import load_tokenizer
from tests.bench.gemma import GEMMA, gemma_folder
from tests.whole_corpus import build_corpus

__all__ = ["CORPORA", "Hidden", "hidden_states", "samples_of", "sequences"]

FOLDER = Path("runs/bench")
CORPORA = ("documentation", "code", "chats")
"""Texts beside `embedded`, which mixes the first and the last. Code is Python's own library."""
_EVERY = 4
"""One in so many files of the library is read."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """N supervised tokens of whole sequences, in order; D hidden, V head rows, S sequences."""

    teacher_ND: NDArray[np.float16]
    student_ND: NDArray[np.float16]
    weight_VD: NDArray[np.float32]
    label_N: NDArray[np.int64]
    sample_ids: list[str]
    input_ids: list[NDArray[np.int32]]
    loss_mask: list[NDArray[np.bool_]]

    @property
    def counts_S(self) -> list[int]:
        """Supervised tokens of each sequence."""
        return [int(loss_mask.sum()) for loss_mask in self.loss_mask]

    def head(self, tokens: int) -> Hidden:
        """Return the first sequences that hold at least `tokens` supervised ones."""
        ends = np.cumsum(self.counts_S)
        return self.part(0, min(int(np.searchsorted(ends, tokens)) + 1, len(ends)))

    def redrawn(self, draw: int) -> Hidden:
        """Return the same tokens under other sample ids, on which sampling depends."""
        if not draw:
            return self
        ids = [hashlib.md5(f"{draw}:{name}".encode()).hexdigest() for name in self.sample_ids]
        return replace(self, sample_ids=ids)

    def part(self, first: int, last: int) -> Hidden:
        """Return sequences `first` to `last`."""
        ends = np.cumsum([0, *self.counts_S])
        tokens, some = slice(ends[first], ends[last]), slice(first, last)
        return Hidden(
            self.teacher_ND[tokens], self.student_ND[tokens], self.weight_VD, self.label_N[tokens],
            self.sample_ids[some], self.input_ids[some], self.loss_mask[some],
        )  # fmt: skip


def hidden_states(
    tokens: int,
    *,
    model: str = "embedded",
    dropped: tuple[int, ...] = (12, 20),
    corpus: str = "embedded",
) -> Hidden:
    """Return the last hidden states of at least `tokens` tokens of a text."""
    if model == GEMMA:
        model = str(gemma_folder(FOLDER))
    resolved = resolve_model(model, revision=None, role="teacher")
    samples = _samples(resolved.path, tokens, corpus)
    network = load_causal_lm(resolved.path, dtype="float32").eval()
    weight_VD = network.get_output_embeddings().weight.detach().numpy()
    name, layers_dropped = Path(model).name, "-".join(map(str, dropped))
    total = sum(int(sample.loss_mask.sum()) for sample in samples)
    before = f"hidden-{name}-" if corpus == "embedded" else f"hidden-{name}-{corpus}-"
    made = _made(before, f"-{layers_dropped}.npz", tokens)
    if made is not None:
        data = np.load(made)
        teacher_ND, student_ND = data["teacher"][:total], data["student"][:total]
    else:
        teacher_ND = _run(network, samples)
        layers = [layer for i, layer in enumerate(network.model.layers) if i not in dropped]
        network.model.layers = torch.nn.ModuleList(layers)
        network.config.num_hidden_layers = len(layers)
        kinds = getattr(network.config, "layer_types", None)
        if kinds:  # sliding window or not, of each layer
            network.config.layer_types = [k for i, k in enumerate(kinds) if i not in dropped]
        student_ND = _run(network, samples)
        FOLDER.mkdir(parents=True, exist_ok=True)
        file = FOLDER / f"{before}{tokens}-{layers_dropped}.npz"
        np.savez(file, teacher=teacher_ND, student=student_ND)
    return Hidden(
        teacher_ND,
        student_ND,
        weight_VD,
        np.concatenate([s.input_ids[s.loss_mask] for s in samples]).astype(np.int64),
        [s.sample_id for s in samples],
        [s.input_ids for s in samples],
        [s.loss_mask for s in samples],
    )


def _made(before: str, after: str, tokens: int) -> Path | None:
    """Return the smallest file of at least so many tokens: samples always come in one order."""
    found = [
        re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), file.name)
        for file in FOLDER.glob(f"{before}*")
    ]
    enough = [size for match in found if match and (size := int(match[1])) >= tokens]
    return FOLDER / f"{before}{min(enough)}{after}" if enough else None


def sequences(tokens: int) -> list[NDArray[np.int32]]:
    """Return the token ids of the same sequences of the embedded corpus, without any model."""
    return [sample.input_ids for sample in samples_of(tokens)]


def samples_of(tokens: int) -> list[Any]:
    """Return the corpus's samples of the same sequences: ids, loss masks and names."""
    resolved = resolve_model("embedded", revision=None, role="teacher")
    return _samples(resolved.path, tokens, "embedded")


def _settings(corpus: str) -> CorpusSettings:
    if corpus == "documentation":
        return CorpusSettings(dataset_name="embedded", format="text", max_length=512)
    if corpus == "chats":
        return CorpusSettings(dataset_name="embedded", format="messages", max_length=512)
    if corpus == "code":
        return CorpusSettings(dataset_name=str(_code_folder()), max_length=512, overlong="split")
    return CorpusSettings(dataset_name="embedded", max_length=512)


def _code_folder() -> Path:
    """Return a folder with modules of Python's library as .txt files."""
    folder = FOLDER / f"code-{sysconfig.get_python_version()}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::_EVERY]:
        copy = folder / f"{file.stem}.txt"
        if not copy.exists():
            copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def _samples(folder: Path, tokens: int, name: str) -> list[Any]:
    settings = _settings(name)
    corpus = build_corpus(settings, tokenizer=load_tokenizer(folder), seed=42)
    samples = [sample for sample in corpus.samples if sample.split == "train"]
    chosen = []
    for index in np.random.default_rng(0).permutation(len(samples)):
        chosen.append(samples[index])
        tokens -= int(samples[index].loss_mask.sum())
        if tokens <= 0:
            return chosen
    raise SystemExit(f"the text {name} has {tokens} supervised tokens too few")


@torch.inference_mode()
def _run(network: Any, samples: list[Any]) -> NDArray[np.float16]:
    parts = []
    for sample in samples:
        ids_1L = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        rows_N = np.flatnonzero(sample.loss_mask) - 1
        hidden_LD = network.model(ids_1L, use_cache=False).last_hidden_state[0]
        parts.append(hidden_LD[rows_N].numpy().astype(np.float16))
    return np.concatenate(parts)
