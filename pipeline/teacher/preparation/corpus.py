"""The prepared corpus of one run: where it is, how its units are made, what is known of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.corpus.intake import Intake, TeacherTokens
from pipeline.corpus.prepared.folder import PreparedFolder
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import SampleIntake
from pipeline.corpus.settings import CorpusSettings
from pipeline.models.tokenizer import vocabulary_fingerprint
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.preparation.processes import Recipe, prepare_here
from pipeline.teacher.preparation.work import Preparation

__all__ = ["BESIDE_THE_CACHE", "CorpusWork", "sample_work"]

BESIDE_THE_CACHE = "_meta/corpus"
"""Where the prepared corpus is, in the cache, unless it has an address of its own."""
_LEASES = "leases"
_SAMPLED_UNITS = 2
"""Prepared for an estimate of a corpus of which nothing is done yet."""


@dataclass(slots=True)
class CorpusWork:
    """A corpus to be prepared, or prepared; nothing is looked at before it is asked for."""

    settings: CorpusSettings
    tokenizer: Any
    intake: Intake
    recipe: Recipe
    folder: PreparedFolder
    identity: dict[str, Any]
    """Of the corpus, with the tokenizer: what is prepared for one cache fits all of this one."""
    _view: CorpusView | None = None

    def units(self) -> tuple[Unit, ...]:
        """Return the units; cut and written where nobody has done so.

        Raises:
            CorpusError: the source cannot be read, or the folder holds another corpus.
        """
        return self.folder.begin(self.identity, lambda: self.intake.reading.units(self.settings))

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
            view = self._new_view(self.folder, units)
            view.refresh()
            if view.blocks:
                return view
        folder = PreparedFolder(Store(f"memory://estimate-{uuid.uuid4().hex}"))
        units = folder.begin(self.identity, lambda: self.intake.reading.units(self.settings))
        for unit in units[:_SAMPLED_UNITS]:
            is_last = unit.index + 1 == len(units)
            folder.commit(prepare_here(self.intake, folder, unit, is_last=is_last))
        view = self._new_view(folder, units)
        view.refresh()
        return view

    def look_at(self, view: CorpusView) -> None:
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
        )

    def _new_view(self, folder: PreparedFolder, units: tuple[Unit, ...]) -> CorpusView:
        def prepare(unit: Unit) -> None:
            prepare_here(self.intake, folder, unit, is_last=unit.index + 1 == len(units))

        return CorpusView(folder, units, self.intake.rule, prepare)


def sample_work(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens,
    cache_url: str,
) -> CorpusWork:
    """Open the source and determine its format; no row is prepared.

    Raises:
        CorpusError: the source cannot be reached or read, is empty, or fits no format.
    """
    new_intake = partial(
        SampleIntake,
        settings=settings,
        tokenizer=tokenizer,
        seed=seed,
        teacher=teacher,
        add_eos=settings.add_eos,
    )
    intake = new_intake(reading=open_reading(settings))
    url = settings.prepared or f"{cache_url.rstrip('/')}/{BESIDE_THE_CACHE}"
    recipe = Recipe(new_intake, settings, True, intake.reading.source, url)
    identity = {
        "samples": intake.identity(),
        "tokenizer_sha256": vocabulary_fingerprint(tokenizer),
        # Where no token can reach the end of the embedding, its size does not matter, and teachers
        # of one tokenizer and several sizes share the corpus.
        "vocab_size": _limit(tokenizer, teacher),
    }
    return CorpusWork(settings, tokenizer, intake, recipe, PreparedFolder(Store(url)), identity)


def _limit(tokenizer: Any, teacher: TeacherTokens) -> int | None:
    size = teacher.vocab_size
    return size if size is not None and max(tokenizer.get_vocab().values()) >= size else None
