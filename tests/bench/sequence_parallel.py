"""Two processes that share each pass, over one process: losses and weights of several steps.

`make bench-sequence-parallel`. Random students of a few layers, one a family: grouped heads, one
head of keys and values for two processes, sliding windows. Each takes a few steps of gradient
descent in float32 through the pipeline's engine (ZeRO 2, two passes a step) over packs of several
sequences of odd lengths, with sparse random targets: once in one process, once in two with half of
each pass's tokens and, with tiles and offloading, once more. Processes exchange by gloo. Not AdamW,
whose first steps take a gradient that is nothing but rounding for as good as any other.

`FIGURE sp2_loss_error` is the largest relative difference of a step's loss; the table also has that
of the weights, over the largest weight of each matrix.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from tests.ranks import free_port

FAMILIES = ("llama", "mqa", "qwen3", "gemma3")
STEPS, PASSES = 4, 2
VOCABULARY, ENTRIES = 96, 6
LENGTHS = ((17, 5, 23), (9, 31), (40,), (3, 3, 3, 12), (), (26, 14), (21, 8), (7, 7, 11))
"""Of the sequences of each pass; one pass has none. Odd sums are padded."""

Outcome = dict[str, tuple[list[float], dict[str, Any]]]
"""Losses of the steps and final weights, by family."""


def student_of(family: str) -> Any:
    """Return a random float32 model, the same on every process."""
    import torch
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    window = {
        "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2,
    }  # fmt: skip
    configs = {
        "llama": lambda: hf.LlamaConfig(**common),
        "mqa": lambda: hf.LlamaConfig(**{**common, "num_key_value_heads": 1}),
        "qwen3": lambda: hf.Qwen3Config(**common, **window, use_sliding_window=True),
        "gemma3": lambda: hf.Gemma3TextConfig(**common, **window, query_pre_attn_scalar=8),
        # Its code flattens heads in its own way.
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        ),
        # Short convolutions, which look at tokens of the slice before.
        "lfm2": lambda: hf.Lfm2Config(
            **common, layer_types=["conv", "full_attention", "conv", "full_attention"]
        ),
    }
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(
        configs[family](), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model


def pass_of(number: int) -> Any:
    """Return one pass: sequences, of which two thirds of the tokens are supervised."""
    import torch

    from pipeline.data.collate import Batch, collate

    lengths = LENGTHS[number % len(LENGTHS)]
    if not lengths:
        return collate([], temperature=1.0)
    draw = torch.Generator().manual_seed(number)
    tokens = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    supervised = (torch.rand(tokens, generator=draw) < 2 / 3) & (positions > 0)
    places = torch.nonzero(supervised).flatten()
    ids = torch.randint(VOCABULARY, (tokens,), generator=draw)
    count = len(places)
    full = torch.randn(count, VOCABULARY, generator=draw).log_softmax(-1)
    kept = full.topk(ENTRIES, -1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Batch(
        input_ids_1T=ids[None],
        position_ids_1T=positions[None],
        label_index_N=places - 1,
        label_ids_N=ids[places],
        ids_NK=kept.indices,
        logprobs_NK=kept.values,
        inclusion_NK=None,
        log_z_N=torch.zeros(count),
        entropy_N=-(full.exp() * full).sum(-1),
        label_logprob_N=full[torch.arange(count), ids[places]],
        sample_index_N=owner[places],
        sample_ids=tuple(f"{number}-{index}" for index in range(len(lengths))),
        lengths=lengths,
        temperature=1.0,
    )


def train(family: str, size: int, *, saving: bool = False) -> tuple[list[float], dict[str, Any]]:
    """Take the steps on this process; return each step's loss and the weights."""
    from pipeline.loss.head import install_distill_head
    from pipeline.loss.settings import LossSettings
    from pipeline.student.build.model import optimizer_groups
    from pipeline.student.sequence.groups import SequenceGroup
    from pipeline.student.sequence.memory import offload_checkpoints, tile_mlps
    from pipeline.student.sequence.parallel import SequenceParallel
    from pipeline.student.settings.train import TrainSettings
    from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.student.training.distributed import read_distributed
    from pipeline.student.training.module import StudentModule, module_inputs

    distributed, model = read_distributed(), student_of(family)
    install_distill_head(model, LossSettings(temperature=1, alpha=0.5), valid_vocab=VOCABULARY)
    if saving:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tile_mlps(model, tiles=3)
        offload_checkpoints(model, on_gpu=False)
    module = StudentModule(model)
    engine = DeepSpeedEngine(
        module,
        TrainSettings(
            gradient_accumulation_steps=PASSES, optim="sgd",
            learning_rate=0.5, warmup_ratio=0, max_grad_norm=0, zero_stage=2,
            sequence_parallel_size=size,
        ),
        dtype="float32",
        distributed=distributed,
        total_steps=STEPS,
        optimizer_groups=optimizer_groups(model, 0.05),
    )  # fmt: skip
    data_size = distributed.world_size // size
    sequence = SequenceParallel(SequenceGroup.of(distributed.rank, size=size, data_size=data_size))
    module.body = sequence.install(module.body, model, device=engine.device)
    losses = []
    for step in range(STEPS):
        passes = [pass_of(step * PASSES + number) for number in range(PASSES)]
        tokens = sum(batch.num_loss_tokens for batch in passes)
        scale = distributed.world_size * PASSES / tokens
        outputs = engine.train_step(
            [module_inputs(sequence.slice(batch).batch, scale) for batch in passes]
        )
        mine = sum(float(terms.loss.detach()) for _, terms in outputs)
        losses.append(engine.sum_over_ranks([mine])[0] / tokens)
    weights = {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
    engine.close()
    return losses, weights


def _process(rank: int, size: int, port: int, arms: list[tuple[str, bool]], answers: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch

    from pipeline.errors import ModelError
    from pipeline.student.training.deepspeed_engine import init_distributed, shut_down_distributed
    from pipeline.student.training.distributed import read_distributed

    torch.set_num_threads(1)
    init_distributed(read_distributed(), timeout_s=120)
    found: dict[tuple[str, bool], Any] = {}
    for family, saving in arms:
        try:
            found[family, saving] = train(family, size, saving=saving)
        except ModelError as error:
            found[family, saving] = str(error)
    if rank == 0:
        answers.put(found)
    shut_down_distributed()


def run_processes(size: int, arms: list[tuple[str, bool]]) -> dict[tuple[str, bool], Any]:
    """Return what the first of `size` processes found; a refusal in words where it was refused.

    Args:
        size: processes, all of one group.
        arms: families, and whether with tiles, checkpoints and offloading.
    """
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_process, args=(rank, size, port, arms, answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[tuple[str, bool], Any] = answers.get(timeout=300)
    for process in processes:
        process.join(60)
    return found


def differences(one: Any, other: Any) -> tuple[float, float]:
    """Return the largest relative difference of losses, and of weights over a matrix's largest."""
    (losses, weights), (other_losses, other_weights) = one, other
    loss = max(abs(b / a - 1) for a, b in zip(losses, other_losses, strict=True))
    weight = max(
        float(abs(other_weights[name] - value).max() / abs(value).max())
        for name, value in weights.items()
    )
    return loss, weight


def main() -> None:
    """Measure, print."""
    arms = [(family, False) for family in FAMILIES]
    one = run_processes(1, arms)
    two = run_processes(2, [*arms, ("llama", True)])
    print("two processes with half of each pass over one process, largest relative difference")
    print(f"{'family':24} {'loss':>9} {'weights':>9}")
    worst = 0.0
    for (family, saving), found in two.items():
        loss, weight = differences(one[family, False], found)
        worst = max(worst, loss)
        print(f"{family + (', tiles, offloaded' if saving else ''):24} {loss:9.1e} {weight:9.1e}")
    print(f"FIGURE sp2_loss_error {worst:.2e}")


if __name__ == "__main__":
    main()
