"""Datasets and chat formats -> tokenised samples with loss masks, stable identities and a split."""

from pipeline.corpus.build import Progress, build_corpus
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.sample import CorpusCounts, Sample, SplitName
from pipeline.corpus.settings import CorpusSettings

__all__ = [
    "Corpus",
    "CorpusCounts",
    "CorpusSettings",
    "Progress",
    "Sample",
    "SplitName",
    "build_corpus",
]
