"""Reads an export with `datasets`, pyarrow and numpy alone; run as a program of its own.

It knows what the export's README.md says and nothing of this project. For each folder it prints, as
JSON, what it computes from the columns: the sums that a loss is made of.
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq


def main(folders: list[str]) -> None:
    datasets.disable_progress_bars()
    found = {folder: read(Path(folder)) for folder in folders}
    assert not [name for name in sys.modules if name.split(".")[0] in ("pipeline", "stages")]
    print(json.dumps(found))


def read(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Return for each split its rows' sums; both libraries must read the same."""
    loaded = datasets.load_dataset(str(folder))
    sums = {}
    for split, rows in loaded.items():
        files = sorted((folder / "data" / split).glob("*.parquet"))
        tables = [pq.read_table(file) for file in files]
        assert [row for table in tables for row in table.to_pylist()] == list(rows)
        facts = json.loads(tables[0].schema.metadata[b"distill_export"])
        sums[split] = [row_sums(row, facts) for row in rows]
    return sums


def row_sums(row: dict, facts: dict) -> dict[str, object]:
    """Return the label's id (the shift), and for each temperature two sums over the entries."""
    tokens = [row["input_ids"][place] for place in row["positions"]]
    weights, gradients = [], []
    for g, temperature in enumerate(facts["temperatures"]):
        for n in range(len(row["positions"])):
            p = np.exp(np.array(row["target_logprobs"][n]) / temperature - row["log_z"][n][g])
            if "target_inclusion" in row:
                inclusion = np.array(row["target_inclusion"][n])
                p = np.where(inclusion < 1, p * np.exp(-facts["rounding"][g]), p) / inclusion
            ids = np.array(row["target_ids"][n], int)
            weights.append(float(p.sum()))
            gradients.append(float((p * np.sin(ids + 1.0)).sum()))
    return {
        "sample_id": row["sample_id"], "tokens": tokens, "weights": weights,
        "gradients": gradients, "label_logprob": row["label_logprob"],
        "written": row.get("written_logprob"), "entropy": row["entropy"],
        "requested": [sum(part) for part in row.get("target_requested", [])],
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
