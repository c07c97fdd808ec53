"""A trainer of no weights: keeps stage two's files and signals, in milliseconds a step.

The objective is (temperature - 2)^2 + alpha + a part that shrinks with the steps. A learning rate
above 1 fails, as a loss that is not finite does; one above 0.8 ends with a result that is not. The
last step waits while there is a file `hold` in the sweep's folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    folder = Path(settings["output"]["output_dir"])
    total, loss = settings["train"]["max_steps"], settings["loss"]
    state, metrics = folder / "state.json", folder / "metrics.jsonl"
    start = json.loads(state.read_text())["step"] if state.exists() else 0
    with (folder / "starts.log").open("a") as log:
        log.write(f"{start} {os.environ.get('OMP_NUM_THREADS', '')}\n")
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    for step in range(start + 1, total + 1):
        time.sleep(float(os.environ.get("QUICK_STEP_S", "0.02")))
        hold = folder.parent.parent / "hold"
        while step == total and hold.exists():
            time.sleep(0.02)
        if settings["train"]["learning_rate"] > 1:
            print(f"error: the loss is not finite at step {step}.", file=sys.stderr)
            return 1
        value = (loss["temperature"] - 2) ** 2 + loss["alpha"] + (total - step) / total
        if settings["train"]["learning_rate"] > 0.8:
            value = float("nan")
        with metrics.open("a") as file:
            file.write(
                json.dumps({"step": step, "heldout/kl": value if value == value else "nan"}) + "\n"
            )
        state.write_text(json.dumps({"step": step}))
        if stop and step < total:
            print("error: stopped by SIGTERM.", file=sys.stderr)
            return 143
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    mark = {"identity_digest": folder.name.rsplit("-", 1)[-1]}
    (folder / "finished.json").write_text(json.dumps(mark))
    return 0


if __name__ == "__main__":
    sys.exit(main())
