"""Students whose tokenizer has the pieces of another one under other ids, and some more."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path


def permute_student(
    source: Path, target: Path, *, seed: int = 3, extra: int = 5, padding: int = 9
) -> dict[int, int]:
    """Write the same model with its ids shuffled, `extra` pieces of its own and padding rows.

    Returns:
        The new id of each old one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    used = sorted(set(vocab.values()) | {token["id"] for token in data["added_tokens"]})
    places = list(range(len(used) + extra))
    random.Random(seed).shuffle(places)
    new = dict(zip(used, places, strict=False))
    data["model"]["vocab"] = {piece: new[number] for piece, number in vocab.items()}
    for number in range(extra):
        data["model"]["vocab"][f"its-own-{number}"] = places[len(used) + number]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(places) + padding, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.zero_()
        for number, place in new.items():
            weight[place] = old[number]
    config = json.loads((source / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, new[config[name]])
        setattr(model.generation_config, name, new[config[name]])
    model.save_pretrained(target)
    return new
