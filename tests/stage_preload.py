"""What every stage imports on its way, imported once by the fork server of `stage_runner.py`.

numba loads its own libraries with the first kernel that is called: 1 s of each stage.
"""

from __future__ import annotations

import importlib

import numpy as np

from pipeline.corpus.sources.embedded import embedded_source
from pipeline.data.order.packing import count_packs

for name in (
    "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_repack",
    "deepspeed.moe.ep_count", "deepspeed.module_inject.auto_ep_presets.registry",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.utils.pin_memory", "peft", "setuptools",
    "transformers.optimization", "transformers.trainer_utils", "huggingface_hub.hf_file_system",
    "pipeline.cache.codec.kernels", "pipeline.cache.codec.kernels_targets",
    "pipeline.cache.io.token_ids", "pipeline.cache.tools.verify", "pipeline.observe.prometheus",
    "pipeline.student.estimate", "pipeline.student.preflight", "pipeline.teacher.estimate",
):  # fmt: skip
    importlib.import_module(name)
count_packs(np.array([3, 4], np.int32), 8)
embedded_source("both")  # 6 s of each stage that reads it
