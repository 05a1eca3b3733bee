"""Pictures with captions to train on: read, checked before anything starts, and made into tensors.

    pictures = read_training_set("photos")                      # a folder with metadata.jsonl, or a `datasets` data set
    pixels = Transform(512)(pictures.picture(0), seed=0, epoch=0, index=0)       # float32 [3, 512, 512] in [-1, 1]

A folder is laid out as `datasets` wants it of an imagefolder: pictures, and a `metadata.jsonl` or `metadata.csv` whose `file_name` names
one of them. Transforms are those of diffusers' `train_text_to_image_lora.py`. What is random in them depends on (seed, epoch, index)
alone, so neither resuming nor the number of workers changes a picture.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from sage.plan_checks import integer
from sage.prompts import InputError, count

__all__ = ["TrainingSet", "Transform", "draw", "read_training_set"]

METADATA = ("metadata.jsonl", "metadata.csv")
DATA_SUFFIXES = (".arrow", ".parquet", ".tar")  # of data sets that keep pictures inside
PROBLEMS_SHOWN = 10
INTERPOLATION = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")}
INTERPOLATION["nearest_exact"] = Image.Resampling.NEAREST  # the two differ for tensors only
UNREADABLE = (  # what Pillow's readers raise over broken files
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RuntimeError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
EXAMPLE = '{"file_name": "cat.png", "text": "a cat"}'

Problems = list[tuple[int, str]]  # (line or row, what is wrong with it)


@dataclass(frozen=True)
class _Files:
    """Pictures that are files, one per line of a metadata file."""

    source: str
    folder: Path
    lines: list[int]
    names: list[str]

    def where(self, i: int) -> str:
        return f"{self.source}, line {self.lines[i]} ({self.names[i]})"

    def data(self, i: int) -> bytes:
        return (self.folder / self.names[i]).read_bytes()


@dataclass(frozen=True)
class _Table:
    """Pictures in a column of a `datasets.Dataset`, as they were encoded."""

    source: str
    cells: Any
    column: str

    def where(self, i: int) -> str:
        return f"{self.source}, row {i}"

    def data(self, i: int) -> bytes:
        cell = self.cells[i][self.column]
        if cell is None:
            raise OSError("the row holds none")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Checked pictures with their captions; what `read_training_set` returns.

    Attributes:
        captions: one per picture, not empty, surrounding white space removed.
    """

    captions: tuple[str, ...]
    origin: _Files | _Table

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, i: int) -> str:
        """Where picture i comes from, for messages: file and line, or row."""
        return self.origin.where(i)

    def picture(self, i: int) -> Image.Image:
        """Picture i in RGB, turned as its EXIF orientation says, on white where it is transparent; of an animation the first frame."""
        return _decode(self.origin.data(i))

    def digest(self, i: int) -> str:
        """sha256 (hex) of the encoded picture i."""
        return hashlib.sha256(self.origin.data(i)).hexdigest()


def read_training_set(
    source: Any, *, split: str = "train", image_column: str = "image", caption_column: str = "text", limit: int | None = None,
    progress: bool = True,
) -> TrainingSet:  # fmt: skip
    """Read pictures with captions, and decode every one of them once, so that training does not stop half-way.

    Args:
        source: a folder with pictures and metadata (in it, or in its subfolder `split`), a folder that `datasets.load_from_disk` or
            `datasets.load_dataset` takes, the name of a data set on the hub, or a `datasets.Dataset` or `DatasetDict`.
        split: which part of a data set.
        image_column: the pictures; in metadata "image" is spelt `file_name`, any other name `<name>_file_name`, as `datasets` has it.
        caption_column: the captions.
        limit: read only so many pictures, the first ones; None: all.
        progress: show a bar while pictures are checked, if standard error is a terminal.

    Returns:
        TrainingSet, in the order of the source, at least one picture. One picture can be trained on, but has no group.

    Raises:
        InputError: something in the source cannot be used: a column that is not there, malformed lines, captions that are empty or no
            text, pictures that are missing, lie outside the folder, or cannot be decoded. Names file and line of up to ten, and counts.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        ModuleNotFoundError: `datasets` is needed and not installed.
    """
    if limit is not None:
        limit = integer(limit, "read_training_set: limit", 1)
    metadata = _find_metadata(Path(source), split) if isinstance(source, (str, Path)) else None
    if metadata is not None:
        file_column = "file_name" if image_column == "image" else f"{image_column}_file_name"
        captions, origin, problems = _read_metadata(metadata, file_column, caption_column, limit)
    else:
        captions, origin, problems = _read_table(*_load_table(source, split), image_column, caption_column, limit)
    for i in tqdm(range(len(captions)), desc="checking pictures", unit="picture", disable=None if progress else True):
        wrong = _picture_problem(origin, i)
        if wrong:
            problems.append((origin.lines[i], f"{origin.names[i]}: {wrong}") if isinstance(origin, _Files) else (i, wrong))
    if problems:
        _refuse(origin, sorted(problems))
    if not captions:
        raise InputError(f"{origin.source}: no pictures in it; wanted lines like {EXAMPLE}.")
    return TrainingSet(tuple(captions), origin)


def _refuse(origin: _Files | _Table, problems: Problems) -> None:
    """Raise InputError that says where the first problems are, and how many there are."""
    unit = "line" if isinstance(origin, _Files) else "row"
    shown = [f"  {origin.source}, {unit} {number}: {what}" for number, what in problems[:PROBLEMS_SHOWN]]
    first = f"; the first {PROBLEMS_SHOWN}" if len(problems) > PROBLEMS_SHOWN else ""
    raise InputError(f"{origin.source}: {count(len(problems), 'problem')}, nothing was trained{first}:\n" + "\n".join(shown))


def _find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of a folder of pictures; None if `datasets` is to read `folder`, which may also be a name on the hub."""
    if folder.is_file():
        raise InputError(f"{folder}: this is a file; give the folder with the pictures and their {' or '.join(METADATA)}.")
    if not folder.is_dir():
        if folder.is_absolute() or str(folder).startswith(".") or len(folder.parts) > 2:  # what no name on the hub is
            raise InputError(f"{folder}: no such folder.")
        return None
    for place in (folder / split, folder):
        found = [place / name for name in METADATA if (place / name).is_file()]
        if len(found) == 2:
            raise InputError(f"{place}: there are both {METADATA[0]} and {METADATA[1]}; keep one of them.")
        if found and place == folder and split != "train":
            raise InputError(f"{folder}: no folder {split!r} in it, and what is in the folder itself is its split 'train'.")
        if found:
            return found[0]
    if _saved_by_datasets(folder) or any(file.suffix.lower() in DATA_SUFFIXES for file in folder.rglob("*")):
        return None
    pictures = sum(file.suffix.lower() in Image.registered_extensions() for file in folder.rglob("*"))
    lacking = f"{count(pictures, 'image')}, but no {' or '.join(METADATA)} with captions" if pictures else "no images in it"
    raise InputError(f"{folder}: {lacking}; wanted image files and a {METADATA[0]} with lines like {EXAMPLE}.")


def _saved_by_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_metadata(path: Path, file_column: str, caption_column: str, limit: int | None) -> tuple[list[str], _Files, Problems]:
    """The pictures that a metadata file names: captions, files and what is wrong with its lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    rows = list(_jsonl_rows(text) if path.suffix == ".jsonl" else _csv_rows(text))[:limit]
    usable = [row for _, row in rows if isinstance(row, dict)]
    for column in (file_column, caption_column):
        if usable and not any(column in row for row in usable):
            _refuse_column(str(path), column, sorted({key for row in usable for key in row}))
    root = path.parent.resolve()
    captions, origin, problems = [], _Files(str(path), root, [], []), []
    for line, row in rows:
        if isinstance(row, str):
            problems.append((line, row))
            continue
        problems += [(line, f"no {column!r}, only {_listed(row)}") for column in (file_column, caption_column) if column not in row]
        wrong = _caption_problem(row[caption_column], caption_column) if caption_column in row else None
        outside = _file_problem(root, row[file_column], file_column) if file_column in row else None
        problems += [(line, what) for what in (wrong, outside) if what]
        if file_column in row and not outside:
            captions.append("" if wrong or caption_column not in row else row[caption_column].strip())
            origin.lines.append(line)
            origin.names.append(row[file_column])
    return captions, origin, problems


def _jsonl_rows(text: str) -> Iterator[tuple[int, dict | str]]:
    """Line number with the object in that line, or with what is wrong with it."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"malformed JSON ({error.msg} at character {error.pos + 1})"
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
            yield number, f"malformed JSON ({error})"
        else:
            yield number, row if isinstance(row, dict) else f"wanted an object like {EXAMPLE}, got {type(row).__name__}"


def _csv_rows(text: str) -> Iterator[tuple[int, dict | str]]:
    """Number of a row's first line with the row, or with what is wrong with it."""
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                yield line, f"malformed CSV ({count(len(fields), 'field')} under {count(len(header), 'column')}; quote commas)"
            elif fields:
                yield line, dict(zip(header, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"malformed CSV ({error})"


def _refuse_column(source: str, column: str, existing: Sequence[str]) -> None:
    raise InputError(f"{source}: no column {column!r}; there are {_listed(existing)}. Name the right ones with image_column and "
                     "caption_column.")  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _caption_problem(caption: Any, column: str) -> str | None:
    """What is wrong with a caption, None if nothing is."""
    if not isinstance(caption, str):
        return f"{column!r} must be a string, got {caption!r:.60}"
    if not caption.strip():
        return f"the caption is empty ({column!r})"
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        return "the caption holds half of a surrogate pair, which no tokenizer reads"
    return None


def _file_problem(root: Path, name: Any, column: str) -> str | None:
    """What is wrong with the name of a picture, None if it is a file under the resolved folder `root`."""
    if not isinstance(name, str) or not name:
        return f"{column!r} must be the name of a file, got {name!r:.60}"
    windows = PureWindowsPath(name)  # takes both slashes for separators
    if Path(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        return f"{name!r:.200} leaves the folder; name a file in {root}"
    try:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            return f"{name!r:.200} leaves the folder by a symbolic link; put the file into {root}"
        if not target.is_file():
            return f"{name!r:.200} is a folder, not a picture" if target.is_dir() else f"no such file: {name!r:.200}"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero character, links in a circle
        return f"{name!r:.200} is no usable file name ({error})"
    return None


def _load_table(source: Any, split: str) -> tuple[Any, str]:
    """A `datasets.Dataset`, and what messages call it."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'reading {str(source)!r:.200} needs the library datasets: pip install "sage-diffusion[train]"') from None
    name = "the data set"
    if isinstance(source, (str, Path)):
        name = str(source)
        try:
            on_disk = Path(source).is_dir() and _saved_by_datasets(Path(source))
            source = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{name}: datasets cannot read it, and it is no folder of pictures ({error}).") from error
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise InputError(f"{name}: no split {split!r}; there are {_listed(list(source))}.")
        source = source[split]
    if not isinstance(source, datasets.Dataset):
        raise TypeError(f"read_training_set: source must be a folder, a name, a datasets.Dataset or a DatasetDict, got "
                        f"{type(source).__name__}")  # fmt: skip
    return source, name


def _read_table(table: Any, name: str, image_column: str, caption_column: str, limit: int | None) -> tuple[list[str], _Table, Problems]:
    """The pictures of a `datasets.Dataset`: captions, cells and what is wrong with the captions."""
    import datasets

    for column in (image_column, caption_column):
        if column not in table.column_names:
            _refuse_column(name, column, table.column_names)
    if not isinstance(table.features[image_column], datasets.Image):
        raise InputError(f"{name}: column {image_column!r} holds {table.features[image_column]}, not images; use "
                         f"dataset.cast_column({image_column!r}, datasets.Image()).")  # fmt: skip
    table = table if limit is None else table.select(range(min(limit, len(table))))
    captions = list(table[caption_column])
    found = ((row, _caption_problem(caption, caption_column)) for row, caption in enumerate(captions))
    problems = [(row, what) for row, what in found if what]
    cells = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return [str(caption).strip() for caption in captions], _Table(name, cells, image_column), problems


def _picture_problem(origin: _Files | _Table, i: int) -> str | None:
    """What keeps picture i from being decoded, None if nothing does."""
    try:
        data = origin.data(i)
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # checksums, which decoding may not look at
        _decode(data)
    except UnidentifiedImageError:
        return "not a picture that Pillow can read"
    except UNREADABLE as error:
        return f"the picture cannot be read ({error})"
    return None


def _decode(data: bytes) -> Image.Image:
    """An encoded picture in RGB, upright, on white."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range of its own; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def draw(*parts: int | str) -> int:
    """A whole number in [0, 2**64) that depends on `parts` alone, on every machine and in every version."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Transform:
    """A picture to a square tensor: shorter side resized, cropped, mirrored, scaled to [-1, 1].

    Args:
        resolution: R, side of the square [pixels].
        center_crop: crop the centre; False: anywhere.
        random_flip: mirror half of the pictures, left to right.
        image_interpolation_mode: one of `INTERPOLATION`.
    """

    resolution: int = 512
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"

    def __post_init__(self):
        object.__setattr__(self, "resolution", integer(self.resolution, "Transform: resolution", 1))
        if self.image_interpolation_mode not in INTERPOLATION:
            raise ValueError(f"Transform: image_interpolation_mode must be one of {', '.join(INTERPOLATION)}, got "
                             f"{self.image_interpolation_mode!r}")  # fmt: skip

    def __call__(self, picture: Image.Image, seed: int, epoch: int, index: int) -> torch.Tensor:
        """float32 [3, R, R] in [-1, 1] of an RGB picture; `index` is its number in the training set."""
        if self.center_crop:
            return self.centred(picture, self.flipped(seed, epoch, index))
        resized = self._resized(picture)
        left, top = (
            draw("crop", axis, seed, epoch, index) * (side - self.resolution + 1) >> 64 for axis, side in enumerate(resized.size)
        )
        return self._tensor(resized, left, top, self.flipped(seed, epoch, index))

    def flipped(self, seed: int, epoch: int, index: int) -> bool:
        """Whether a picture is mirrored in an epoch."""
        return self.random_flip and draw("flip", seed, epoch, index) % 2 == 1

    def centred(self, picture: Image.Image, flip: bool) -> torch.Tensor:
        """float32 [3, R, R]: the centre of a picture, mirrored or not."""
        resized = self._resized(picture)
        left, top = (round((side - self.resolution) / 2) for side in resized.size)
        return self._tensor(resized, left, top, flip)

    def _resized(self, picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        size = tuple(self.resolution * side // short for side in picture.size)
        return picture.resize(size, INTERPOLATION[self.image_interpolation_mode])

    def _tensor(self, resized: Image.Image, left: int, top: int, flip: bool) -> torch.Tensor:
        square = resized.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.array(square))  # uint8 [R, R, 3]
        pixels = pixels.flip(1) if flip else pixels
        return ((pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5).contiguous()
