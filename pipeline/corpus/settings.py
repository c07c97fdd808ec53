"""The corpus section of stage one's configuration: which text, in which format."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from pipeline.config import Settings, option

__all__ = ["LONGEST", "CorpusSettings", "FormatName", "LossOn", "Overlong", "Reasoning"]

LONGEST = 4096
"""Tokens of the longest sequence where none is named and the teacher has as many positions. Not all
its positions: the engine's memory for keys and values and a step of the student are made for the
longest sequence that there may be, and today's teachers have 32,768 to 1,048,576 positions."""

FormatName = Literal["auto", "sharegpt", "messages", "prompt_completion", "instruction", "text"]
Overlong = Literal["truncate", "split", "drop"]
LossOn = Literal["assistant", "all"]
Reasoning = Literal["keep", "template", "drop"]


class CorpusSettings(Settings):
    """Text or chats, how they become token sequences, and which of them are held out."""

    dataset_name: str = option(
        "embedded",
        "what to read: 'embedded' (documentation that ships with Python, nothing is downloaded), "
        "a dataset of the Hugging Face hub, a file or folder of .parquet, .jsonl, .ndjson, .json, "
        ".csv, .tsv or .txt (one document per file; all but .parquet also as .gz, .bz2, .xz or "
        ".zst), a folder of datasets.save_to_disk, or a URL of any of these such as "
        "s3://bucket/chats",
        flag="dataset_name",
        min_length=1,
    )
    dataset_config: str | None = option(None, "configuration name of a hub dataset")
    dataset_revision: str | None = option(
        None, "commit, tag or branch of a hub dataset; a commit makes the corpus reproducible"
    )
    dataset_split: str = option(
        "train",
        "split of the dataset to read; the held-out part is taken from it",
        flag="dataset_split",
        min_length=1,
    )
    num_samples: int | None = option(
        None, "read only the first rows of the source; none reads all", flag="num_samples", ge=1
    )
    format: FormatName = option(
        "auto",
        "format of a row: sharegpt (conversations of from/value), messages (role/content), "
        "prompt_completion, instruction (instruction, input, output), text; auto detects it by the "
        "columns. With the embedded text, messages takes its chats only and text its documents",
    )
    column: str | None = option(
        None, "the column that holds the conversation or the text, when it has an unusual name"
    )
    max_length: int | None = option(
        None,
        f"tokens of the longest sequence; see overlong. None takes the teacher's positions, of a "
        f"teacher with more than {LONGEST} that many",
        flag="max_length",
        ge=2,
    )
    overlong: Overlong = option(
        "truncate",
        "rows longer than max_length: truncate cuts the end off, split makes several sequences, "
        "drop leaves the row out; the log counts each",
    )
    loss_on: LossOn = option(
        "assistant",
        "supervised tokens of a chat: those of the assistant, or all; in plain text always all",
    )
    chat_template: str | None = option(
        None,
        "Jinja chat template: a .jinja file, the text itself, or the name of one of the "
        "tokenizer's (tool_use); none uses the tokenizer's default",
        flag="chat_template",
    )
    template_options: dict[str, Any] = option(
        {},
        "further variables of the chat template, for all chats, as a mapping: "
        "{enable_thinking: false, documents: [...]}; tools is for chats without tools of their own",
    )
    reasoning: Reasoning = option(
        "keep",
        "reasoning of an answer (reasoning_content, or <think> at its beginning): keep quarantines "
        "a row whose template leaves it out, template lets the template decide, drop takes it away "
        "before rendering",
    )
    supervise_empty: bool = option(
        False,
        "supervise the end of a turn whose answer is empty, and the empty thought that a template "
        "puts before an answer; false leaves both as context",
    )
    system_prompt: str | None = option(
        None, "system message for the chats that have none; none leaves it to the template"
    )
    add_bos: bool = option(
        True, "begin plain documents with the BOS token where the tokenizer does so itself"
    )
    add_eos: bool = option(True, "end plain documents with the EOS token")
    on_bad_row: Literal["quarantine", "refuse"] = option(
        "quarantine",
        "a row that cannot be used (not JSON, an unknown role, an image, content that the template "
        "loses): quarantine leaves it out, counted and named in the log; refuse stops the run",
    )
    max_quarantined_fraction: float = option(
        0.05,
        "the run stops before the teacher when more of the rows than this (and more than 10) are "
        "quarantined",
        ge=0,
        le=1,
    )
    invalid_unicode: Literal["reject", "replace"] = option(
        "reject",
        "text that is not valid Unicode (half of a surrogate pair): reject makes the row a bad "
        "row, replace puts U+FFFD in its place, counted",
    )
    heldout_fraction: float = option(
        0.02,
        "share of the rows held out for evaluation, chosen by a hash of each row's identity and "
        "the seed: reading more rows never moves a row between the splits",
        ge=0.0,
        lt=1.0,
    )
    heldout_samples: int | None = option(
        None,
        "hold out at most this many rows: the first, in source order, of those that "
        "heldout_fraction picks; none takes ever fewer of them by their hash from the 400th on, "
        "which makes 1,000 of 100 thousand rows, 2,200 of 2 million, 3,500 of 50 million",
        ge=0,
    )
    prepared: str | None = option(
        None,
        "folder or URL of the tokenised corpus, which several caches of one tokenizer and template "
        "share; none keeps it in the cache. What is missing there is prepared, by all workers",
    )
    unit_mib: float = option(
        16,
        "MiB of the source that one process prepares at a time; Parquet is divided at row groups, "
        "JSON Lines anywhere, other files not at all",
        gt=0,
        le=4096,
    )
    processes: int | None = option(
        None,
        "processes of a worker that tokenise; none takes the cores that it may use, divided by the "
        "GPUs of the machine",
        ge=1,
    )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; before `for_positions`, of a teacher with many."""
        return LONGEST if self.max_length is None else self.max_length

    def for_positions(self, positions: int | None) -> CorpusSettings:
        """Return the settings with the number that `max_length` has for a teacher.

        Args:
            positions: tokens of the longest sequence that it reads; None: any number.
        """
        if self.max_length is not None:
            return self
        longest = LONGEST if positions is None else min(LONGEST, positions)
        return self.model_copy(update={"max_length": longest})

    @model_validator(mode="after")
    def _system_prompt_needs_chats(self) -> CorpusSettings:
        if self.format == "text" and self.system_prompt is not None:
            raise ValueError("system_prompt is given, but format text has no chats to put it in")
        return self
