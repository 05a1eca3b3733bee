"""What a training leaves to be read: training.json, what it was, and log.jsonl, a line per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sage.info import command_line, machine, versions
from sage.output import to_json, write_atomic


class Record:
    """The two files of one training.

    Args:
        folder: where they go.
        writes: whether this process writes them; the others only keep the facts.

    Attributes:
        facts: what is in training.json.
    """

    def __init__(self, folder: Path, writes: bool):
        self.folder, self.writes = folder, writes
        self.facts: dict[str, Any] = {}

    def start(self, step: int, **facts: Any) -> None:
        """Write training.json for a training that begins, or goes on, after `step`; lines of later steps leave the log."""
        self.facts = {"state": "running", "command": command_line(), **facts, "versions": versions(), "machine": machine()}
        self._write()
        if self.writes:
            _cut_log(self.folder / "log.jsonl", step)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Say in training.json that it is complete."""
        self.facts |= {"state": "complete", **facts}
        self._write()
        return self.facts

    def log(self, line: dict[str, Any]) -> None:
        """Add a step to the log."""
        if self.writes:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def _write(self) -> None:
        if self.writes:
            write_atomic(self.folder / "training.json", to_json(self.facts, indent=1) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Take out lines of steps that are made again, and one that a kill has cut."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_atomic(path, "".join(kept))
