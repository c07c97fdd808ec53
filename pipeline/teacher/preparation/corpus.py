"""The prepared corpus of one run: where it is, how its units are made, what is known of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

from pipeline.config import fingerprint
from pipeline.corpus.intake import Intake, TeacherTokens
from pipeline.corpus.prepared.folder import PreparedFolder
from pipeline.corpus.prepared.summary import UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.prompts import PromptIntake, PromptLimits
from pipeline.corpus.reading import Reading, open_reading
from pipeline.corpus.samples import SampleIntake
from pipeline.corpus.settings import CorpusSettings
from pipeline.models.tokenizer import vocabulary_fingerprint
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.preparation.processes import Recipe, prepare_here
from pipeline.teacher.preparation.work import SMALL_BYTES, Preparation

__all__ = ["CorpusWork", "corpus_work"]

_BESIDE_THE_CACHE = "_meta/corpus"
"""Where the prepared corpus is, in the cache, unless it has an address of its own."""
_LEASES = "leases"
_DIGITS = 16
_SAMPLED_UNITS = 2
"""Prepared for an estimate of a corpus of which nothing is done yet."""


@dataclass(slots=True)
class CorpusWork:
    """A corpus to be prepared, or prepared; nothing is looked at before it is asked for."""

    settings: CorpusSettings
    intake: Intake
    """Of one thread at a time, which holds `lock`."""
    recipe: Recipe
    folder: PreparedFolder
    identity: dict[str, Any]
    """Of the corpus, with the tokenizer: what is prepared for one cache fits all of this one."""
    lock: Lock = field(default_factory=Lock)
    _units: tuple[Unit, ...] | None = None
    _view: CorpusView | None = None

    def units(self) -> tuple[Unit, ...]:
        """Return the units; cut and written where nobody has done so.

        Raises:
            CorpusError: the source cannot be read, or the folder holds another corpus.
        """
        if self._units is None:
            self._units = self.folder.begin(self.identity, self._cut)
        return self._units

    @property
    def view(self) -> CorpusView:
        """What is known of the corpus."""
        if self._view is None:
            self._view = self._new_view(self.folder, self.units())
        return self._view

    def sampled(self) -> CorpusView:
        """Return a view for estimates: of what is there, else of the first units; writes nothing.

        Raises:
            CorpusError: the source cannot be read, or the folder holds another corpus.
        """
        units = self.folder.units(self.identity)
        if units is not None:
            view = self._new_view(self.folder.only_read(), units)
            view.refresh()
            if view.train.samples:
                return view
        folder = PreparedFolder(Store(f"memory://estimate-{uuid.uuid4().hex}"))
        units = folder.begin(self.identity, self._cut)
        view = self._new_view(folder, units)
        for unit in units:
            folder.commit(self._prepare(folder, units, unit))
            view.refresh()
            # As long as any row may still be held out, none is known to be trained on.
            if view.num_done >= _SAMPLED_UNITS and view.train.samples:
                break
        return view

    def discard(self) -> None:
        """Remove a small corpus that could not be used: a run that fails leaves nothing behind."""
        units = self.folder.units(self.identity)
        small = units is not None and len(units) == 1 and units[0].size <= SMALL_BYTES
        if self.settings.prepared is None and small:
            self.folder.remove(_LEASES)

    def go_by(self, view: CorpusView) -> None:
        """Go by this view."""
        self._view = view

    def preparing(self, *, lease_s: float, shares: Shares) -> Preparation:
        """Return a context in which this worker prepares units, beside whatever else it does.

        Raises:
            CorpusError: the source cannot be read, or the folder holds another corpus.
        """
        return Preparation(
            self.folder,
            self.units(),
            self.recipe,
            LeaseBoard(self.folder.store, worker_name(), lease_s, folder=_LEASES),
            shares=shares,
            processes=self.settings.processes,
            prepare=partial(self._prepare, self.folder, self.units()),
        )

    def _new_view(self, folder: PreparedFolder, units: tuple[Unit, ...]) -> CorpusView:
        return CorpusView(folder, units, self.intake.rule, partial(self._prepare, folder, units))

    def _prepare(self, folder: PreparedFolder, units: tuple[Unit, ...], unit: Unit) -> UnitSummary:
        with self.lock:
            return prepare_here(self.intake, folder, unit, is_last=unit.index + 1 == len(units))

    def _cut(self) -> tuple[Unit, ...]:
        return self.intake.reading.units(self.settings)


def corpus_work(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens,
    cache_url: str,
    prompts: PromptLimits | None = None,
    reading: Reading | None = None,
) -> CorpusWork:
    """Open the source and determine its format; no row is prepared.

    Args:
        settings: the corpus section of the configuration.
        tokenizer: a fast tokenizer of transformers.
        seed: decides, with each row's identity, which rows are held out.
        teacher: its end tokens and the size of its embedding.
        cache_url: the cache, beside which the corpus is unless it has an address of its own.
        prompts: their lengths, where the teacher answers them.
        reading: of the source, where it is open already.

    Raises:
        CorpusError: the source cannot be reached or read, is empty, or fits no format.
    """
    new_intake: Callable[..., Intake]
    if prompts is None:
        new_intake = partial(SampleIntake, add_eos=settings.add_eos)
    else:
        # No EOS: the prompt is the beginning of a document, which the teacher continues.
        new_intake = partial(PromptIntake, add_eos=False, limits=prompts)
    new_intake = partial(
        new_intake, settings=settings, tokenizer=tokenizer, seed=seed, teacher=teacher
    )
    answered = prompts is None
    intake = new_intake(reading=reading or open_reading(settings, answered=answered))
    identity = {
        "samples": intake.identity(),
        "tokenizer_sha256": vocabulary_fingerprint(tokenizer),
        # Where no token can reach the end of the embedding, its size does not matter, and teachers
        # of one tokenizer and several sizes share the corpus.
        "vocab_size": _limit(tokenizer, teacher),
    }
    place = settings.prepared or f"{cache_url.rstrip('/')}/{_BESIDE_THE_CACHE}"
    # Named by what decides its content: another try with other settings finds no other corpus in
    # its way, and several corpora can share an address.
    url = f"{place.rstrip('/')}/{fingerprint(identity)[:_DIGITS]}"
    recipe = Recipe(new_intake, settings, intake.reading.source, url, answered)
    return CorpusWork(settings, intake, recipe, PreparedFolder(Store(url)), identity)


def _limit(tokenizer: Any, teacher: TeacherTokens) -> int | None:
    size = teacher.vocab_size
    return size if size is not None and max(tokenizer.get_vocab().values()) >= size else None
