"""Under which licence and terms a cache is published, as its publisher states it on the card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.cache.layout.card import FRONT, LICENCE_KEYS, LICENCE_SECTION, card_text
from pipeline.cache.layout.manifest import Manifest
from pipeline.errors import ConfigError

__all__ = ["Licence", "licensed_card", "stated_licence"]

_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, slots=True)
class Licence:
    """What the publisher states; nothing of it is guessed here."""

    identifier: str
    """As the hub lists them: `apache-2.0`, `cc-by-4.0`, `llama3.1`, `other`."""
    name: str = ""
    """Of a licence that is `other`."""
    link: str = ""
    terms: str = ""
    """The teacher's terms for its outputs, in the publisher's words."""


def stated_licence(
    identifier: str | None, *, name: str | None, link: str | None, terms: str | None, teacher: str
) -> Licence:
    """Return the licence, checked as far as a program can.

    Args:
        identifier: of the licence.
        name: of one that is `other`.
        link: to its text.
        terms: the teacher's terms for its outputs.
        teacher: its name, for messages.

    Raises:
        ConfigError: none is stated, or not as the hub takes it; with all mistakes.
    """
    if not identifier:
        raise ConfigError(
            "push: found no --license",
            expected=f"the licence that the terms of {teacher} and of the corpus allow, such as "
            "--license apache-2.0, or --license other with --license-name and --license-link",
        )
    mistakes = []
    if not _NAME.fullmatch(identifier):
        mistakes.append(
            f"--license: found {identifier!r}, expected the hub's name of one, in lower case, such "
            "as apache-2.0, cc-by-4.0, llama3.1 or other"
        )
    if identifier == "other" and not name:
        mistakes.append("--license other: found no --license-name, expected the name it has")
    if identifier != "other" and name:
        mistakes.append(
            f"--license-name: found it with --license {identifier}, expected it with other alone"
        )
    if link and not re.match(r"https?://\S+$|[\w./-]+$", link):
        mistakes.append(f"--license-link: found {link!r}, expected an address or a file's name")
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return Licence(identifier, name or "", link or "", " ".join((terms or "").split()))


def licensed_card(
    manifest: Manifest, card: bytes | None, licence: Licence, *, command: str
) -> bytes:
    """Return a cache's card with the licence in its front matter and a section of its own.

    Args:
        manifest: of the cache.
        card: as it is; None where the cache has none.
        licence: as stated; takes the place of an earlier one.
        command: for a card that has to be written anew.
    """
    text = card_text(manifest, command) if card is None else card.decode("utf-8", "replace")
    found = FRONT.match(text)
    front: dict[str, Any] = (yaml.safe_load(found[1]) or {}) if found else {}
    body = text[found.end() :] if found else text
    for key in LICENCE_KEYS:
        front.pop(key, None)
    front["license"] = licence.identifier
    if licence.name:
        front["license_name"] = licence.name
    if licence.link:
        front["license_link"] = licence.link
    body = LICENCE_SECTION.sub("", body).rstrip("\n")
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body}\n\n{_section(manifest, licence)}".encode()


def _section(manifest: Manifest, licence: Licence) -> str:
    teacher = manifest.identity["teacher"]["model"]
    named = f"{licence.identifier} ({licence.name})" if licence.name else licence.identifier
    link = f" Text: {licence.link}." if licence.link else ""
    terms = licence.terms.rstrip(".") or "not stated; read them before students are trained"
    return f"""## Licence and terms

Published under **{named}**, as its publisher states.{link} The rows hold the corpus's text as token
ids and the outputs of the teacher, so the terms of both bind whoever trains on them.

- Terms of the teacher `{teacher}` for its outputs: {terms}.
"""
