"""Where `sage evaluate` writes.

    OUT/results.json            every figure with its interval, settings, versions, machine
    OUT/table.md, plot.png      the same to read and to look at, made of results.json alone
    OUT/sheets/METHOD.png       a few groups drawn by each method; side-by-side.png: all methods
    OUT/methods/METHOD/         images/, manifest.jsonl and calls.jsonl: what each chunk cost
    OUT/features/               of the pictures, by method and extractor; may be removed at any time
    OUT/evaluation.json         settings of all runs: what --resume goes by
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sage.evaluation.request import MAY_CHANGE
from sage.output import PICTURE_NAME, OutputFolder, read_manifest
from sage.prompts import InputError

KEY = re.compile(r"[a-z0-9-]{1,160}")


class EvaluationFolder(OutputFolder):
    """See `OutputFolder`; a run of this kind is told by evaluation.json."""

    report_name = "evaluation.json"
    folders = ("methods", "features", "sheets")
    single_files = ("evaluation.json", "results.json", "table.md", "plot.png")

    def check_resumable(self, settings: dict) -> bool:
        """As `OutputFolder.check_resumable`, but what MAY_CHANGE names is not compared: it takes no picture's place.

        Raises:
            InputError: a setting that decides pictures differs; a LoRA of the name of a former run's is another one.
        """
        report = self.old_report() or {"settings": {}, "runs": []}
        there = super().check_resumable(settings | {key: report["settings"].get(key) for key in MAY_CHANGE})
        for run in report["runs"]:
            for name, sha256 in run["asked"]["adapter"].items():
                if settings["adapter"].get(name, sha256) != sha256:
                    raise InputError(f"{self.path}: --resume wants the LoRA {name} that the run there had, and this file is another one; "
                                     "give it another name.")
        return there

    def method(self, key: str) -> Path:
        """The folder of a method's pictures, made if it is not there."""
        path = self.path / "methods" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _own_files(self) -> list[Path]:
        found = [self.path / name for name in self.single_files]
        for folder, ending in (("features", ".safetensors"), ("sheets", ".png")):
            found += [file for file in self._inside(folder) if file.suffix == ending and KEY.fullmatch(file.stem)]
        for method in self._inside("methods"):
            if not KEY.fullmatch(method.name) or method.is_symlink() or (method / "images").is_symlink():
                continue
            for row in read_manifest(method / "manifest.jsonl"):
                parent, _, name = str(row.get("file")).partition("/")
                if parent == "images" and PICTURE_NAME.fullmatch(name):
                    found.append(method / parent / name)
            found += [method / "manifest.jsonl", method / "calls.jsonl"]
        return found

    def _inside(self, folder: str) -> list[Path]:
        path = self.path / folder
        return sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []


def read_results(path: str | Path) -> dict:
    """results.json as it was written. Raises InputError for anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--table {path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise InputError(f"--table {path}: not valid JSON ({error}).") from None
    if not isinstance(found, dict) or found.get("kind") != "sage evaluation" or found.get("version") != 2:
        raise InputError(f"--table {path}: no results of `sage evaluate` (wanted results.json of a run of this version).")
    return found
