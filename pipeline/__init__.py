"""Offline distillation of large language models in two stages that meet in a cache."""

__version__ = "0.1.0"
