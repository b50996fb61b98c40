"""Rows about the passes, read from their docstrings: the README's table and ``fusionc passes``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import PIPELINE

PARTS = ("Math", "Exactness", "Legality", "Cost", "Source")


@dataclass(frozen=True)
class Row:
    """One pass as its file describes it. ``parts`` has the five parts of the docstring, each on one line."""

    position: int
    name: str
    level: str
    summary: str
    exactness: str
    word: str
    parts: dict[str, str]


def rows() -> list[Row]:
    """All built-in passes in pipeline order."""
    found = []
    for step in PIPELINE:
        if step.item is not None:
            text = sys.modules[type(step.item).__module__].__doc__ or ""
            found.append(Row(step.position, step.item.name, step.level, text.split("\n\n")[0].replace("\n", " ").rstrip("."),
                             str(step.item.exactness), step.word, dict(parts(text))))
    return found


def parts(text: str) -> Iterator[tuple[str, str]]:
    """(name, text on one line) of the parts of a pass's docstring."""
    current = ""
    lines: list[str] = []
    for line in [*text.splitlines(), "End"]:
        head = re.match(rf"({'|'.join(PARTS)}|End)\b\s*(.*)", line)
        if head:
            if current:
                yield current, " ".join(" ".join(lines).split())
            current, lines = head.group(1), [head.group(2)]
        else:
            lines.append(line.strip())


def markdown() -> str:
    """The README's table."""
    lines = ["| # | pass | level | what | exactness | cost |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {row.position} | `{row.name}` | {row.level} | {_cell(row.summary)} | {row.exactness} | "
              f"{_cell(row.parts.get('Cost', ''))} |" for row in rows()]
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(markdown())
