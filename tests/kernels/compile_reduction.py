"""Compile the reduction's kernels for real GPUs, which needs none; a test runs it uninterpreted."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.teacher.sparsify.gpu import kernels, launch
from pipeline.teacher.sparsify.gpu.plan import BLOCK

ARGUMENTS = {
    "label_ptr": "*i64", "noise_ptr": "*i64", "last_ptr": "*i64", "keys_ptr": "*i64",
    "columns_ptr": "*fp32", "row_ptr": "*fp32", "border_ptr": "*i64", "stride": "i32",
    "columns_stride": "i32", "vocab": "i32", "log_z_step": "fp32", "step": "fp32",
    "inverse_step": "fp32", "most": "fp32",
}  # fmt: skip
EACH_TEMPERATURE = ("temperatures", "exponents", "inverses", "log_taus", "tau_factors")
EVERYWHERE = {"LOWEST": launch.LOWEST, "BLOCK": BLOCK}
DRAW = {"ALWAYS": 70, "SAMPLED": 73, "BITS": 23, "PADDED": 128, "FARTHEST": -40.0, **EVERYWHERE}
CANDIDATES = {"ALWAYS": 131, "SAMPLED": 218, "BITS": 22, "PADDED": 256}
"""Of the default scheme for two temperatures."""
STATISTICS = {"ONE": 0, "ROUNDED": True, "TOP": 64, **EVERYWHERE}

# Kernel, temperatures, constants.
CASES: list[tuple[Any, int, dict[str, Any]]] = [
    (kernels.statistics_kernel, 1, {"COUNT": 1, "GRID": 1, **STATISTICS, "TOP": 0}),
    (kernels.statistics_kernel, 2, {"COUNT": 2, "GRID": 2, **STATISTICS}),
    (kernels.statistics_kernel, 4, {"COUNT": 4, "GRID": 4, **STATISTICS}),
    (kernels.statistics_kernel, 2, {"COUNT": 2, "GRID": 2, **STATISTICS, "TOP": 1}),
    (kernels.candidates_kernel, 0, {"TOP": 64, "CAPACITY": 256, "BLOCK": BLOCK}),
    (kernels.top_kernel, 0, {"GRID": 2, "TOP": 64, "PADDED": 64}),
    (kernels.draw_kernel, 1, {"GRID": 1, "USED": 1, "BOTH": False, "TOP": 0, **DRAW}),
    (kernels.draw_kernel, 2, {"GRID": 2, "USED": 2, "BOTH": True, "TOP": 64, **DRAW}),
    (kernels.draw_kernel, 2, {"GRID": 2, "USED": 2, "BOTH": True, "TOP": 1, **DRAW, **CANDIDATES}),
]


def spilled_bytes(ptx: str, architecture: int) -> int:
    """Return the bytes of a thread for which registers do not suffice."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        target = f"-arch=sm_{architecture}{'a' if architecture >= 90 else ''}"
        done = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", target, file, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return max(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))


for architecture, element in ((80, "bf16"), (90, "fp32")):
    for kernel, count, constants in CASES:
        types: dict[str, Any] = {}
        for name in kernel.arg_names:
            if name in constants:
                types[name] = "constexpr"
            elif name in EACH_TEMPERATURE:
                types[name] = ("fp32",) * count
            elif name == "places":
                types[name] = ("i32",) * count
            else:
                types[name] = f"*{element}" if name == "logits_ptr" else ARGUMENTS[name]
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants),
            target=GPUTarget("cuda", architecture, 32),
            options=launch.OPTIONS,
        )
        assert compiled.asm["cubin"]
        assert spilled_bytes(compiled.asm["ptx"], architecture) <= 16
        if kernel is kernels.draw_kernel:
            assert "fma.rn.f32" not in compiled.asm["ptx"], "products and sums round alone"
        print(kernel.__name__, element, architecture)
