"""Fill the tables of README.md and docs/ from committed measurements, or check that they agree.

    python benchmarks/readme_tables.py           rewrite the blocks
    python benchmarks/readme_tables.py --check   exit 1 when a page says something else than the JSON

A block is `<!-- table:NAME -->` … `<!-- /table -->`; NAME is benchmarks/results/NAME.json, which holds

    "table": {"columns": ["solver", "saved", …], "rows": [["ddim", 0.251, …], …], "formats": [null, ".1%", …]}

`formats` may be left out; it says how the numbers of a column are written. `<!-- table:NAME:KEY -->` takes "tables"[KEY] instead,
for a JSON with several. Whatever else the JSON holds (machine, command, raw samples) is for the reader who follows the link below
the table.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
BLOCK = re.compile(r"<!-- table:([a-z0-9_-]+)(?::([a-z0-9_-]+))? -->\n.*?<!-- /table -->", re.DOTALL)


def filled(page: str, root: Path = ROOT, up: str = "") -> str:
    """The page's text with every block made again from its JSON; `up` leads from the page's folder to the root."""
    return BLOCK.sub(lambda match: f"{match[0].splitlines()[0]}\n{_block(match[1], match[2], root, up)}\n<!-- /table -->", page)


def pages() -> dict[Path, str]:
    """Every page with tables, and what `filled` makes of it."""
    found = {ROOT / "README.md": "", **{path: "../" for path in sorted((ROOT / "docs").glob("*.md"))}}
    return {path: filled(path.read_text(encoding="utf-8"), up=up) for path, up in found.items()}


def _block(name: str, key: str | None, root: Path, up: str) -> str:
    path = root / RESULTS / f"{name}.json"
    if not path.exists():
        return "*Not measured yet.*"
    data = json.loads(path.read_text(encoding="utf-8"))
    tables, wanted = (data, "table") if key is None else (data.get("tables", {}), key)
    if wanted not in tables:
        raise ValueError(f'{path}: wanted a key "{wanted}" with "columns" and "rows", got {", ".join(tables)}')
    source = f"From [`{name}.json`]({up}{RESULTS}/{name}.json)"
    if "command" in data:
        source += f": `{data['command']}`"
    ran = data.get("environment")
    if ran is not None:
        threads = "one thread" if ran["threads"] == 1 else f"{ran['threads']} threads"
        on_gpu = ran.get("device", "cpu") != "cpu"
        where = f"one {ran['device']}" if on_gpu else f"{threads} of an {ran['processor']}"
        source += f": `{ran['command']}`, {where}, torch {ran['packages']['torch']}"
    return f"{markdown_table(**tables[wanted])}\n\n{source}."


def markdown_table(columns: list[str], rows: list[list], formats: list[str | None] | None = None) -> str:
    """A Markdown table; a column whose first value is a number is set to the right.

    Raises:
        ValueError: a row has another number of values than there are columns.
    """
    formats = formats or [None] * len(columns)
    for values in (formats, *rows):
        if len(values) != len(columns):
            raise ValueError(f"table: wanted {len(columns)} values as there are columns, got {len(values)}: {values}")
    numeric = [bool(rows) and isinstance(value, (int, float)) for value in (rows[0] if rows else columns)]
    lines = [list(columns), ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(value, form) for value, form in zip(row, formats)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value, form: str | None) -> str:
    if value is None:
        return "–"
    if form is not None and isinstance(value, (int, float)):
        return format(value, form)
    return str(value).replace("|", "\\|")


def main() -> int:
    differs = False
    for path, new in pages().items():
        if new == path.read_text(encoding="utf-8"):
            continue
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)} differs from benchmarks/results; run: python benchmarks/readme_tables.py")
            differs = True
        else:
            path.write_text(new, encoding="utf-8")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
