"""Write a run's results so that nothing is ever half-written: pictures, manifest, plan and report.

    OUT/index.html            gallery of the run
    OUT/images/00007-a-fox.png
    OUT/manifest.jsonl        one line per picture: file, sha256 and its record
    OUT/unshared/…            the same pictures sampled without sharing, and unshared.jsonl (only when compared)
    OUT/plan.json             who shared with whom
    OUT/report.json           settings, versions, machine, cost

Every file is written beside its place and moved there, so a reader sees the old file, or the new one, or none.
File names come from the picture's number and the letters and digits of its prompt, never from a path in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from sage.prompts import InputError

SERIES = {"images": "manifest.jsonl", "unshared": "unshared.jsonl"}  # folder of pictures → its manifest
SINGLE_FILES = ("index.html", "plan.json", "report.json", *SERIES.values())
PICTURE_NAME = re.compile(r"[0-9]{5,12}-[a-z0-9-]{1,48}\.png")
SLUG_LENGTH = 48


def slug(prompt: str, length: int = SLUG_LENGTH) -> str:
    """A short file-name part made of [a-z0-9-] only; "image" when the prompt has no such letter."""
    letters = unicodedata.normalize("NFKD", prompt[:400]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[:length].strip("-") or "image"


def picture_name(index: int, prompt: str) -> str:
    """File name of picture `index`: unique by its number, readable by its prompt."""
    return f"{index:05d}-{slug(prompt)}.png"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy and torch scalars as numbers, tuples as lists, nan and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """`plain(value)` as JSON text."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: beside its place, flushed to disk, then moved over what was there."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def png_bytes(image, record: dict, about: dict) -> bytes:
    """A picture as PNG with its prompt, seed and place in the plan in text chunks.

    Args:
        image (PIL.Image): the picture.
        record: its row of `result.records`.
        about: what holds for the whole run (model, steps, solver …); stored with the record under "sage".
    """
    info = PngInfo()
    info.add_text("Software", "sage-diffusion")
    texts = {"prompt": record.get("prompt"), "negative_prompt": record.get("negative_prompt")}
    for key, text in texts.items():
        if text:
            info.add_itxt(key, text)
    info.add_text("seed", str(record.get("seed")))
    info.add_itxt("sage", to_json({**about, **record}))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


class PictureSeries:
    """The pictures of one pass over the prompts: a folder and its manifest, complete after every pack.

    Args:
        root: the output folder, which exists.
        folder: key of `SERIES`.
        prompts: prompt of each picture, in the order asked for.
        about: facts about the run that go into every PNG.
    """

    def __init__(self, root: Path, folder: str, prompts: Sequence[str], about: dict):
        self.root, self.folder, self.about = root, folder, about
        self.names = [f"{folder}/{picture_name(index, prompt)}" for index, prompt in enumerate(prompts)]
        self.manifest = root / SERIES[folder]
        self.rows: dict[int, dict] = {}

    def load(self) -> None:
        """Take over the pictures that an earlier run finished and that are still what its manifest says."""
        for row in read_manifest(self.manifest):
            index = row.get("index")
            known = isinstance(index, int) and 0 <= index < len(self.names) and row.get("file") == self.names[index]
            if known and _sha256_of(self.root / self.names[index]) == row.get("sha256"):
                self.rows[index] = row
        self._write_manifest()

    @property
    def missing(self) -> list[int]:
        """Numbers of the pictures that are not finished."""
        return [index for index in range(len(self.names)) if index not in self.rows]

    def add(self, indices: Iterable[int], images: Iterable, records: Iterable[dict]) -> None:
        """Write finished pictures and note them; what is already there is left alone."""
        (self.root / self.folder).mkdir(exist_ok=True)
        lines = []
        for index, image, record in zip(indices, images, records, strict=True):
            index = int(index)
            if index in self.rows:
                continue
            record = {**record, "index": index}
            data = png_bytes(image, record, self.about)
            write_atomic(self.root / self.names[index], data)
            row = {"file": self.names[index], "sha256": hashlib.sha256(data).hexdigest(), **plain(record)}
            self.rows[index] = row
            lines.append(to_json(row) + "\n")
        # Whole lines are appended; `read_manifest` passes over a last line that a crash has cut.
        with open(self.manifest, "a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> list[dict]:
        """Put the manifest in order. Returns its rows."""
        self._write_manifest()
        return [self.rows[index] for index in sorted(self.rows)]

    def _write_manifest(self) -> None:
        lines = [to_json(self.rows[index]) + "\n" for index in sorted(self.rows)]
        write_atomic(self.manifest, "".join(lines))


def read_manifest(path: Path) -> list[dict]:
    """The rows of a manifest; none when there is no such file. A line that is no JSON object is left out."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return rows
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class OutputFolder:
    """Where a run writes. Construction looks and refuses; only `prepare` changes anything.

    Args:
        path: the folder; it and its parents are created by `prepare`.
        overwrite: accept a folder that holds something; an earlier run's files are replaced, other files stay.
        resume: accept a folder that holds an unfinished run with equal settings, and complete it.
    Raises:
        InputError: not a folder, not writable, or not empty without leave.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False):
        self.path, self.overwrite, self.resume = Path(path), overwrite, resume
        if overwrite and resume:
            raise InputError("--overwrite and --resume exclude each other: one starts anew, the other completes.")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: the output folder is a file; give another --out.")
        self._check_writable()
        if not (overwrite or resume) and self.path.is_dir() and any(self.path.iterdir()):
            hint = "--resume completes it, --overwrite starts anew" if self.old_report() else "--overwrite writes into it"
            raise InputError(f"{self.path}: the output folder is not empty; {hint}.")

    def old_report(self) -> dict | None:
        """The report of the run that is in the folder, None when there is none."""
        try:
            report = json.loads((self.path / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) and isinstance(report.get("settings"), dict) else None

    def check_resumable(self, settings: dict) -> bool:
        """Whether there is a run to complete.

        Args:
            settings: everything that decides what the pictures look like.
        Raises:
            InputError: the folder holds another run; the message names what differs.
        """
        report = self.old_report()
        if report is None:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise InputError(f"{self.path}: --resume finds no run in this folder (no report.json).")
            return False
        old, new = report["settings"], plain(settings)
        differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if differing:
            changes = "; ".join(_change(key, old.get(key), new.get(key)) for key in differing)
            raise InputError(f"{self.path}: --resume wants the settings of the run that is there, but {changes}.")
        return True

    def prepare(self) -> None:
        """Create the folder; with `overwrite`, take away what an earlier run left, and nothing else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                for file in self._own_files():
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be prepared for output ({error.strerror or error}).") from None

    def _check_writable(self) -> None:
        # A missing parent is created later, so the nearest one that exists decides.
        nearest = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"{self.path}: {nearest} is a file, so no folder can be made in it.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{self.path}: the folder {nearest} is not writable.")

    def _own_files(self) -> list[Path]:
        pictures = [
            file
            for folder in SERIES
            if (self.path / folder).is_dir() and not (self.path / folder).is_symlink()
            for file in (self.path / folder).iterdir()
            if PICTURE_NAME.fullmatch(file.name)
        ]
        return pictures + [self.path / name for name in SINGLE_FILES]


def _change(key: str, old: Any, new: Any) -> str:
    if key == "prompts":
        return "the prompts are others"
    return f"{key.replace('_', '-')} was {to_json(old)} and is {to_json(new)}"


def _sha256_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def digest(values: Any) -> str:
    """sha256 of any plain data, to tell whether two runs asked for the same."""
    return hashlib.sha256(to_json(values).encode("utf-8")).hexdigest()
