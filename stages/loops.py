"""Compile the loops of both stages once, into the files that numba keeps beside the sources.

A checkout's first run would compile each where it is first needed: 25 s, most of it in one thread
while another waits. Beside a teacher that is still loading they cost nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from pipeline.program import module_name

__all__ = ["compile_loops", "compiling"]

_VOCAB, _POSITIONS = 512, 3


@contextmanager
def compiling() -> Iterator[None]:
    """Compile them in a process beside this one, which ends at the end at the latest.

    A process of its own: torch's threads would be in the way of forks.
    """
    command = [sys.executable, "-m", module_name("stages.loops")]
    quiet = subprocess.DEVNULL  # who needs a loop says what is wrong with it
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        try:
            yield
        finally:
            process.kill()


def compile_loops() -> None:
    """Take a row through the default capture's loops, from logits to what a training reads."""
    import torch

    from pipeline.cache.codec.arrow import coded_rows, coded_table, quantised, targets_of
    from pipeline.cache.codec.spec import CodecSpec
    from pipeline.cache.codec.targets import CachedSequence
    from pipeline.teacher.settings import CaptureSettings
    from pipeline.teacher.sparsify.columns import to_targets
    from pipeline.teacher.sparsify.device import sparsify
    from pipeline.teacher.sparsify.scheme import capture_scheme

    whole = capture_scheme(CaptureSettings(top_k=8))
    spec = CodecSpec(_VOCAB, whole.rule, whole.quantisation, largest_known=whole.keeps_largest)
    ids_L = np.arange(_POSITIONS + 1, dtype=np.int32)
    loss_mask_L = ids_L > 0
    logits_RV = torch.linspace(0, 9, _POSITIONS * _VOCAB).reshape(_POSITIONS, _VOCAB)
    label_R, noise_R = torch.arange(1, _POSITIONS + 1), torch.arange(_POSITIONS)
    for scheme in filter(None, (whole, whole.heldout)):
        own = replace(spec, rule=scheme.rule, quantisation=scheme.quantisation)
        columns = sparsify(logits_RV, label_R, scheme.first_phase, noise_R).numpy()
        targets, tail_N = to_targets(
            columns, scheme, sample_id="0" * 32, label_N=ids_L[1:], rows_N=ids_L[:-1]
        )
        row = CachedSequence("0" * 32, ids_L, loss_mask_L, targets)
        table = coded_table(*quantised([row], own, [tail_N]), own, {})
        targets_of(*coded_rows(table, own, scheme.temperatures), own, scheme.temperatures)


if __name__ == "__main__":
    compile_loops()
