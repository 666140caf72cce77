"""Tables of an export of nsys, whose names and columns differ between versions of nsys."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIAGNOSTICS = "DIAGNOSTIC_EVENT"


class Tables:
    """The tables of an open export, and its strings."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self.path = database, path
        names = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self._names = {name for (name,) in names}
        self._strings: dict[int, str] = {}
        if "StringIds" in self._names:
            self._strings = dict(self.rows("StringIds", "id", "value"))

    def __contains__(self, table: str) -> bool:
        return table in self._names

    def expect(self, table: str, trace: str) -> None:
        """Raise ValueError, with what nsys complains of and its flag, where a table is absent."""
        if table not in self:
            told = "; ".join(["", *self.complaints()])
            raise ValueError(
                f"{self.path}: expected a table {table}, got none, so nothing of it was recorded; "
                f"run nsys with --trace={trace}{told}"
            )

    def complaints(self) -> list[str]:
        """Return nsys's own complaints, once each, of severities above information."""
        if DIAGNOSTICS not in self:
            return []
        messages = [
            text
            for text, severity in self.rows(DIAGNOSTICS, "text", "severity?")
            if severity is None or severity >= 2
        ]
        return [f"nsys: {text}" for text in dict.fromkeys(map(self.text, messages))]

    def rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield columns of a table's rows; `a|b|c`: the first that exists, `a?`: NULL if absent.

        Raises ValueError naming the table and its columns where none of a column's names exists.
        """
        there = {row[1] for row in self._database.execute(f'PRAGMA table_info("{table}")')}
        chosen = []
        for column in columns:
            names = column.rstrip("?").split("|")
            first = next((f'"{name}"' for name in names if name in there), None)
            if first is None and not column.endswith("?"):
                raise ValueError(
                    f"{self.path}: table {table} has no column {' or '.join(names)}; it has "
                    f"{', '.join(sorted(there))}"
                )
            chosen.append(first or "NULL")
        yield from self._database.execute(f'SELECT {", ".join(chosen)} FROM "{table}"')

    def text(self, value: Any) -> str:
        """Return a text, looked up where it is the number of one."""
        if isinstance(value, int):
            return self._strings.get(value, f"string {value}")
        return str(value)
