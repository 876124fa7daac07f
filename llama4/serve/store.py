"""Responses that clients may ask for again, in SQLite: in a file, or in memory where none is given.

What `put` has returned from is there after the process was killed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.errors import ArgumentError

MAX_IN_MEMORY = 1000
"""Responses that are kept where there is no file; the oldest go."""

_TABLE = "CREATE TABLE IF NOT EXISTS responses (number INTEGER PRIMARY KEY, id TEXT UNIQUE, response TEXT, input TEXT)"


@dataclass(frozen=True)
class Stored:
    """A response as it was answered, and the items of its input, those of responses before it apart."""

    response: dict[str, Any]
    input: list[dict[str, Any]]


class Store:
    """Responses by their ids. Several threads may use it."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: of the file, which is made if it is not there; None to keep the last thousand in memory.

        Raises:
            ArgumentError: the file cannot be used.
        """
        self._lock = threading.Lock()
        self._limit = MAX_IN_MEMORY if path is None else None
        try:
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(_TABLE)
            self._fail_unfinished()
        except sqlite3.Error as error:
            raise ArgumentError(f"responses cannot be stored in {path}: {error}; choose another --store") from error

    def put(self, stored: Stored) -> None:
        """Keep a response, in place of an earlier state of it."""
        row = stored.response["id"], json.dumps(stored.response), json.dumps(stored.input)
        with self._lock:
            self._database.execute(
                "INSERT INTO responses (id, response, input) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET response = excluded.response, input = excluded.input",
                row,
            )
            if self._limit is not None:
                last = "SELECT number FROM responses ORDER BY number DESC LIMIT 1 OFFSET ?"
                self._database.execute(f"DELETE FROM responses WHERE number <= ({last})", (self._limit,))

    def get(self, identity: str) -> Stored | None:
        with self._lock:
            query = "SELECT response, input FROM responses WHERE id = ?"
            row = self._database.execute(query, (identity,)).fetchone()
        return Stored(json.loads(row[0]), json.loads(row[1])) if row is not None else None

    def delete(self, identity: str) -> bool:
        """Forget a response; -> whether it was there."""
        with self._lock:
            return self._database.execute("DELETE FROM responses WHERE id = ?", (identity,)).rowcount > 0

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _fail_unfinished(self) -> None:
        """What was being answered in the background when an earlier process ended."""
        rows = self._database.execute(
            "SELECT id FROM responses WHERE json_extract(response, '$.status') IN ('queued', 'in_progress')"
        ).fetchall()
        for (identity,) in rows:
            stored = self.get(identity)
            assert stored is not None
            error = {"code": "server_error", "message": "the server ended before the response was complete"}
            self.put(Stored({**stored.response, "status": "failed", "error": error}, stored.input))
