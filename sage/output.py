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

import contextlib
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from sage.prompts import InputError

SERIES = {"images": "manifest.jsonl", "unshared": "unshared.jsonl"}  # folder of pictures → its manifest
SINGLE_FILES = ("index.html", "plan.json", "report.json", *SERIES.values())
PICTURE_NAME = re.compile(r"[0-9]{5,12}-[a-z0-9-]{1,48}\.png")
SLUG_LENGTH = 48
MAX_NAME = 255  # bytes in a file name, on every usual file system


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
    with whole_or_nothing(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, flushed to disk and moved over it at the end; removed if an error is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
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
        overwrite: accept a folder that holds an earlier run; that run's files are replaced, other files stay.
        resume: accept a folder that holds an unfinished run with equal settings, and complete it.
        inputs: files that the new run reads, which `overwrite` must not take away.
    Raises:
        InputError: not a folder, not writable, not empty without leave, or something else is where files shall go.
    """

    report_name = "report.json"  # what tells a run of this kind; with its settings
    folders: tuple[str, ...] = tuple(SERIES)
    single_files: tuple[str, ...] = SINGLE_FILES

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False, inputs: Iterable[str] = ()):
        self.path, self.overwrite, self.resume = Path(path), overwrite, resume
        if overwrite and resume:
            raise InputError("--overwrite and --resume exclude each other: one starts anew, the other completes.")
        try:
            self._check_place()
            self._check_content(inputs)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be the output folder ({error.strerror or error}).") from None

    def old_report(self) -> dict | None:
        """The report of the run that is in the folder, None when there is none."""
        try:
            report = json.loads((self.path / self.report_name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        settings = report.get("settings") if isinstance(report, dict) else None
        return report if isinstance(settings, dict) and "prompts" in settings else None

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
                raise InputError(f"{self.path}: --resume finds no run in this folder (no {self.report_name}).")
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

    def _check_place(self) -> None:
        """Refuse a path where no folder is or can be made."""
        whole = self.path.absolute()
        if any(len(os.fsencode(part)) > MAX_NAME for part in whole.parts):
            raise InputError(f"{self.path}: a name in this path is longer than {MAX_NAME} bytes; give a shorter --out.")
        # A missing parent is created later, so the nearest one that exists decides.
        nearest = next(folder for folder in (whole, *whole.parents) if folder.exists() or folder.is_symlink())
        if not nearest.exists():
            raise InputError(f"{self.path}: {nearest} is a link to nothing; remove it or give another --out.")
        if not nearest.is_dir() and nearest == whole:
            raise InputError(f"{self.path}: the output folder is a file; give another --out.")
        if not nearest.is_dir():
            raise InputError(f"{self.path}: {nearest} is a file, so no folder can be made in it.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{self.path}: the folder {nearest} is not writable.")

    def _check_content(self, inputs: Iterable[str]) -> None:
        """Refuse a folder that holds what must stay where it is, or what is in the way."""
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        report = self.old_report()
        if not (self.overwrite or self.resume) and report is not None:
            raise InputError(f"{self.path}: the output folder is not empty; --resume completes it, --overwrite starts anew.")
        if not self.resume and report is None:
            raise InputError(
                f"{self.path}: the output folder is not empty, and what it holds is no run of sage (no {self.report_name} of one)"
                f"{', so --overwrite replaces nothing' if self.overwrite else ''}; give a new or empty folder as --out."
            )
        for name in self.folders:
            file = self.path / name
            if (file.exists() or file.is_symlink()) and not file.is_dir():
                raise InputError(f"{file}: this is a file where a folder of pictures shall go; move it away.")
        for name in self.single_files:
            if (self.path / name).is_dir():
                raise InputError(f"{self.path / name}: this is a folder where a file shall go; move it away.")
        if self.overwrite:
            taken = {file.resolve() for file in self._own_files()}
            for name in inputs:
                if Path(name).resolve() in taken:
                    raise InputError(f"{name}: --overwrite would remove this file, which the run reads; copy it elsewhere.")

    def _own_files(self) -> list[Path]:
        """What an earlier run left: the pictures that its manifests list, and the files with fixed names."""
        pictures = []
        for series, manifest in SERIES.items():
            if (self.path / series).is_symlink():
                continue
            for row in read_manifest(self.path / manifest):
                parent, _, name = str(row.get("file")).partition("/")
                if parent == series and PICTURE_NAME.fullmatch(name):
                    pictures.append(self.path / parent / name)
        return pictures + [self.path / name for name in self.single_files]


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
