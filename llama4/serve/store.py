"""Responses that clients may ask for again, in SQLite: in a file, or in memory where none is given.

What `put` has returned from is there after the process was killed.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.errors import ArgumentError
from llama4.reading import check_regular
from llama4.serve.errors import RequestError

logger = logging.getLogger(__name__)

MAX_IN_MEMORY = 1000
"""Responses that are kept where there is no file; the oldest go."""
MAX_BYTES_IN_MEMORY = 64 << 20
"""Of these, and of what they answer."""

_APPLICATION = 0x4C346C34
"""Stands in the file's head, so that another program's file is known as such."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS responses "
    "(number INTEGER PRIMARY KEY, id TEXT UNIQUE, size INTEGER, response TEXT, input TEXT)"
)
_PUT = (
    "INSERT INTO responses (id, size, response, input) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
    "size = excluded.size, response = excluded.response, input = excluded.input"
)
_FORGET = (
    "DELETE FROM responses WHERE number IN (SELECT number FROM (SELECT number, COUNT(*) OVER newest AS place, "
    "SUM(size) OVER newest AS total FROM responses WINDOW newest AS (ORDER BY number DESC)) "
    "WHERE place > ? OR total > ?)"
)
_FAIL_UNFINISHED = (
    "UPDATE responses SET response = json_set(response, '$.status', 'failed', '$.error', json(?)) WHERE CASE WHEN "
    "json_valid(response) THEN json_extract(response, '$.status') IN ('queued', 'in_progress') ELSE FALSE END"
)
_ENDED = json.dumps({"code": "server_error", "message": "the server ended before the response was complete"})


@dataclass(frozen=True)
class Stored:
    """A response as it was answered, and the items of its input, those of responses before it apart."""

    response: dict[str, Any]
    input: list[dict[str, Any]]


class Store:
    """Responses by their ids. Several threads may use it; of several processes one has the file."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: of the file, which is made if it is not there; None to keep the last ones in memory.

        Raises:
            ArgumentError: the file cannot be used, is another program's, or another server has it.
        """
        self._lock = threading.Lock()
        self._is_limited = path is None
        self._unwritten: dict[str, Stored] = {}  # later states of what is in the file, which it had no room for
        try:
            if path is not None:
                _check_ours(path)
            self._database = sqlite3.connect(
                path or ":memory:", timeout=1, check_same_thread=False, isolation_level=None
            )
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise
            weakref.finalize(self, self._database.close)  # where nobody calls close()
        except (OSError, ValueError, sqlite3.Error) as error:
            said = "another server has it" if "locked" in str(error) else getattr(error, "strerror", None) or error
            raise ArgumentError(f"responses cannot be stored in {path}: {said}; choose another --store") from error

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA locking_mode=EXCLUSIVE")  # from the first write until it is closed
        database.execute(f"PRAGMA application_id={_APPLICATION}")  # before WAL: at once in the file's head
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(_TABLE)
        database.execute(_FAIL_UNFINISHED, (_ENDED,))

    def put(self, stored: Stored) -> None:
        """Keep a response, in place of an earlier state of it.

        Raises:
            RequestError: it cannot be written. A later state of what is in the file is then kept in memory.
        """
        identity, response, given = stored.response["id"], json.dumps(stored.response), json.dumps(stored.input)
        with self._lock:
            try:
                with _writes():
                    self._database.execute(_PUT, (identity, len(response) + len(given), response, given))
                    if self._is_limited:
                        self._database.execute(_FORGET, (MAX_IN_MEMORY, MAX_BYTES_IN_MEMORY))
            except RequestError:
                if self._row("id", identity) is not None:
                    self._unwritten[identity] = stored
                raise
            self._unwritten.pop(identity, None)

    def size(self, identity: str) -> int:
        """Characters of what is written of a response and its input, 0 if nothing is."""
        with self._lock:
            row = self._row("size", identity)
        return (row[0] if row is not None else None) or 0

    def get(self, identity: str) -> Stored | None:
        with self._lock:
            if identity in self._unwritten:
                return self._unwritten[identity]
            row = self._row("response, input", identity)
        try:
            stored = Stored(*map(json.loads, row)) if row is not None else None
            if stored is None or (stored.response["id"] == identity and isinstance(stored.input, list)):
                return stored
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        logger.warning("what is stored of response %.80r is damaged", identity)
        return None

    def delete(self, identity: str) -> bool:
        """Forget a response; -> whether it was there.

        Raises:
            RequestError: the file cannot be written.
        """
        with self._lock, _writes():
            is_there = self._database.execute("DELETE FROM responses WHERE id = ?", (identity,)).rowcount > 0
            self._unwritten.pop(identity, None)
            return is_there

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _row(self, columns: str, identity: str) -> tuple[Any, ...] | None:
        query = f"SELECT {columns} FROM responses WHERE id = ?"
        try:
            row: tuple[Any, ...] | None = self._database.execute(query, (identity,)).fetchone()
        except sqlite3.Error as error:
            logger.warning("the file of responses cannot be read: %s", error)
            return None
        return row


def _check_ours(path: Path) -> None:
    """Before SQLite opens a file, which may write to it.

    Raises:
        ArgumentError: it is another program's.
        OSError: it cannot be read.
    """
    if not path.exists():
        path.touch(mode=0o600)  # conversations: nobody else reads them, nor what SQLite puts beside them
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(100)
    if head and (head[:16] != b"SQLite format 3\0" or head[68:72] != _APPLICATION.to_bytes(4, "big")):
        raise ArgumentError("it is another program's file")


@contextmanager
def _writes() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        message = f"the server cannot store the response ({error}); free space there, or send store: false"
        raise RequestError(message, status=507, code="store_full") from error
