"""The capture against transformers for tiny random teachers of many architectures.

    python -m tests.bench.architectures [--architectures Llama,Qwen3]

`make check-architectures`. Each teacher of `tests/bench/architecture_teachers.py` (random weights,
float32, a vocabulary that is no multiple of 64) is captured by vLLM as stage one does, prefills cut
and mixed, and by transformers, padded; both are compared with dense logits that transformers
computes one sequence at a time. What this build of vLLM cannot run is listed with vLLM's reason.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.architecture_one import PRELOAD, compare
from tests.bench.architecture_teachers import NOT_ON_A_CPU, TEACHERS

__all__ = ["check_teachers", "chosen_teachers"]

LIMIT = 1e-3
_SECONDS = 240.0
"""For one teacher."""


def main() -> int:
    """Check, print; 1 where a capture differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="", help="names, separated by commas")
    parser.add_argument("--logs", type=Path, help="folder for what vLLM says of each teacher")
    given = parser.parse_args()
    names = chosen_teachers(given.architectures)
    print(
        f"{'teacher':<20} {'served by':<18} {'attention':<16} {'log-probs':>9} {'others':>8} "
        f"{'padded':>8} same bits  seconds"
    )
    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        logs = given.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for name, outcome in check_teachers(names, logs):
            outcomes[name] = outcome
            print(_line(name, outcome), flush=True)
    ran = {name: outcome for name, outcome in outcomes.items() if "vllm" in outcome}
    agreeing = [name for name in ran if _agrees(ran[name])]
    refused = {name: outcome["why"] for name, outcome in outcomes.items() if name not in ran}
    print(f"\n{len(agreeing)} agree, {len(ran) - len(agreeing)} do not, {len(refused)} do not run:")
    for name, why in refused.items():
        print(f"- {name}: {why}")
    # Where vLLM does not run, the other engine is judged all the same.
    wrong = [
        name
        for name, outcome in outcomes.items()
        if outcome.get("transformers", math.inf) > LIMIT or (name in ran and name not in agreeing)
    ]
    unexpected = sorted(refused.keys() - NOT_ON_A_CPU)
    for name in (*wrong, *unexpected):
        print(f"error: {name}: {'differs' if name in wrong else 'does not run, and did'}")
    measured = [
        outcome[engine]
        for outcome in outcomes.values()
        for engine in ("vllm", "transformers")
        if engine in outcome
    ]
    worst = max(measured, default=math.inf)
    print(f"FIGURE architectures_agreeing {len(agreeing)}")
    print(f"FIGURE worst_logprob_difference {worst:.2e}")
    return int(bool(wrong or unexpected or not ran))


def chosen_teachers(said: str) -> list[str]:
    """Return the teachers that are meant: case, spaces and hyphens do not count; all of none."""
    by_key = {_key(name): name for name in TEACHERS}
    keys = [_key(word) for word in said.split(",") if word.strip()]
    unknown = [key for key in keys if key not in by_key]
    if unknown:
        sys.exit(f"error: found {', '.join(unknown)}, expected of {', '.join(by_key)}")
    return [by_key[key] for key in keys] or list(TEACHERS)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


def check_teachers(names: list[str], logs: Path) -> Any:
    """Yield the outcome of each teacher, `architecture_one.compare`'s, from a process of its own.

    A fork server imports vLLM once; a teacher that ends its process costs no other.
    """
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        # Set before vLLM is imported, as stage one does.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        log = logs / f"{_key(name)}.log"
        process = context.Process(target=compare, args=(name, str(log), theirs))
        process.start()
        theirs.close()
        try:
            if ours.poll(_SECONDS):
                outcome = ours.recv()
            else:
                outcome = {"why": f"no answer in {_SECONDS:.0f} s"}
        except EOFError:
            process.join(10)
            last = (log.read_text(errors="replace").strip() or "no word").splitlines()[-1]
            outcome = {"why": f"its process ended with {process.exitcode}: {last}"}
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
        yield name, outcome


def _agrees(outcome: dict[str, Any]) -> bool:
    return max(outcome["vllm"], outcome["transformers"], outcome["others"]) <= LIMIT


def _line(name: str, outcome: dict[str, Any]) -> str:
    padded = f"{outcome.get('transformers', math.nan):>8.1e}"
    seconds = f"{outcome.get('seconds', math.nan):.0f}"
    if "vllm" not in outcome:
        return (
            f"{name:<20} {'does not run':<18} {'':<16} {'':>9} {'':>8} {padded} {'':<9}  {seconds}"
        )
    told = "" if _agrees(outcome) else "  DIFFERS"
    return (
        f"{name:<20} {outcome['served']:<18} {outcome['attention']:<16} {outcome['vllm']:>9.1e} "
        f"{outcome['others']:>8.1e} {padded} {'yes' if outcome['same'] else 'no':<9}  "
        f"{seconds}{told}"
    )


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.exit(main())
