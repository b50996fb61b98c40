"""Write the table of passes in README.md from the docstrings of the passes, in the order in which they run.

    python scripts/readme_table.py            rewrite the table
    python scripts/readme_table.py --check    exit 1 if it is out of date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- passes: made by scripts/readme_table.py -->", "<!-- end of passes -->"
SECTIONS = ("Math", "Exactness", "Legality", "Cost", "Source")


def sections(doc: str) -> dict[str, str]:
    """{"": first paragraph, "Math": …, "Cost": …} of a pass's docstring; each value on one line."""
    out: dict[str, list[str]] = {"": []}
    key = ""
    for line in inspect.cleandoc(doc).splitlines():
        word, _, rest = line.partition(" ")
        if word in SECTIONS:
            key = word
            out[key] = [rest.strip()]
        elif not line.strip() and key == "":
            key = "after the summary"
        else:
            out.setdefault(key, []).append(line.strip())
    return {k: " ".join(v).strip() for k, v in out.items()}


def table() -> str:
    """The table as Markdown."""
    from fusionc.passes import PIPELINE

    rows = ["| | pass | level | what it does | exactness | what it saves |", "| --- | --- | --- | --- | --- | --- |"]
    for step in PIPELINE:
        if step.item is None:
            cells = [str(step.position), "*yours*", step.level, step.word, "", ""]
        else:
            cls = type(step.item)
            doc = sections(inspect.getdoc(sys.modules[cls.__module__]) or "")
            exactness = str(step.item.exactness)
            cells = [str(step.position), f"`{step.item.name}`", step.level, doc[""], exactness, doc.get("Cost", "")]
        rows.append("| " + " | ".join(c.replace("|", "\\|").rstrip(".") for c in cells) + " |")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Rewrite or check; the exit status."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    new = f"{head}{START}\n{table()}\n{END}{tail}"
    if new == text:
        return 0
    if "--check" in argv:
        print("The table of passes in README.md is out of date; run `make readme`.", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
