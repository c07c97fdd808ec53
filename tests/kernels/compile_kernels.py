"""Compile the loss's kernels for real GPUs, which needs none; a test runs this uninterpreted."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.loss import chunk_gradient_triton

SUMS = {"x_ptr": "", "max_ptr": "*fp32", "sum_t_ptr": "*fp32", "sum_1_ptr": "*fp32",
        "stride": "i32", "vocab_size": "i32", "inverse_t": "fp32"}  # fmt: skip
COMBINE = {"x_ptr": "", "max_ptr": "*fp32", "factor_t_ptr": "*fp32", "factor_1_ptr": "*fp32",
           "label_ptr": "*i64", "stride": "i32", "vocab_size": "i32", "inverse_t": "fp32",
           "label_part": "fp32"}  # fmt: skip
BLOCK = {"BLOCK": chunk_gradient_triton._BLOCK}

for architecture in (80, 90):
    for element in ("bf16", "fp16", "fp32"):
        for kernel, signature, constants in (
            (
                chunk_gradient_triton._sums_kernel,
                SUMS,
                {"LOWEST": chunk_gradient_triton._LOWEST, **BLOCK},
            ),
            (chunk_gradient_triton._combine_kernel, COMBINE, BLOCK),
        ):
            types = {**signature, "x_ptr": f"*{element}", **dict.fromkeys(constants, "constexpr")}
            compiled = triton.compile(
                ASTSource(fn=kernel, signature=types, constexprs=constants),
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": chunk_gradient_triton._WARPS},
            )
            assert compiled.asm["cubin"]
            if element == "bf16" and kernel is chunk_gradient_triton._combine_kernel:
                assert "cvt.rn.bf16" in compiled.asm["ptx"], "stored bfloat16 is rounded, not cut"
            print(kernel.__name__, element, architecture)
