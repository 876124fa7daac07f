"""Stamps: what the files with the weights of one checkpoint have in common, and no others have."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from llama4.errors import CheckpointError

STAMP = "llama4_stamp"
"""Its key in the metadata of a file."""


def new_stamp() -> str:
    return secrets.token_hex(16)


def stamp_for(content: object) -> str:
    """The stamp of all that is made of the same.

    Args:
        content: what the result depends on, as JSON.
    """
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def check_stamps(directory: Path, stamps: Mapping[str, str | None], wanted: str | None, remedy: str = "") -> None:
    """See that files were written together.

    Args:
        stamps: file -> its stamp; None if it has none.
        wanted: the stamp; None if others wrote the checkpoint.
        remedy: where these files are what is wanted, begins with a semicolon.

    Raises:
        CheckpointError: one that has another stamp.
    """
    strange = [file for file, stamp in stamps.items() if stamp != wanted]
    if wanted is not None and strange:
        raise CheckpointError(
            f"{directory} holds files that were not written together: {', '.join(strange[:3])}"
            f"{' and others are' if len(strange) > 3 else ' is' if len(strange) == 1 else ' are'} of another model, or "
            f"of another time of saving this one; copy all of its files again, or save it again{remedy}"
        )
