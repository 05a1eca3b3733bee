"""The pictures that drawn ones are compared with: a folder, a picture per prompt, or scenes of the embedded benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sage.encoder_identity import file_sha256
from sage.evaluation.asked import Asked, Source
from sage.evaluation.request import picture_files
from sage.output import digest
from sage.prompts import InputError, count

__all__ = ["References", "find_references"]

REFERENCE_SEED, REAL_SEED = 1_000_003, 2_000_003  # draws of real pictures; no seed that anything was trained with


class References(Protocol):
    """What a reference set offers.

    Attributes:
        name: for tables.
        count: pictures in `pictures`.
        images: real pictures of each prompt in the row of real pictures, in the order of the prompts; 0: there is no such row.
        identity: changes with the pictures.
        places: where the row's pictures stand among `pictures`; None: they are a draw of their own, `real`, and have a distance to them.
    """

    name: str
    count: int
    images: int
    identity: str
    places: Sequence[int] | None

    def pictures(self) -> Any:
        """The set that distances are measured to, as `sage.evaluation` takes pictures; no picture is in it twice."""

    def real(self) -> Any:
        """images · n pictures, those of a prompt together; None where they are among `pictures`."""


class Files:
    """Pictures in a folder. Equal files count once, since a reference set holds a photograph once however many captions it has.

    Args:
        name: for tables.
        files: of the pictures.
        aligned: whether they are those of the prompts, one for each, in their order.

    Raises:
        InputError: a file cannot be read; all files are equal.
    """

    def __init__(self, name: str, files: Sequence[Path], aligned: bool):
        self.name, self.images = name, int(aligned)
        first: dict[str, int] = {}  # sha256 → place among the distinct files
        self.places, self._distinct = [], []
        for file in files:
            sha256 = _sha256(file)
            if sha256 not in first:
                first[sha256] = len(self._distinct)
                self._distinct.append(file)
            self.places.append(first[sha256])
        if len(first) < 2:
            raise InputError(f"--images: wanted at least two different pictures, got {count(len(files), 'file')} with "
                             f"{len(first)}; distances are between sets.")
        self.count, self.identity = len(first), digest(list(first))

    def pictures(self) -> Iterator[Any]:
        return map(_opened, self._distinct)

    def real(self) -> None:
        return None


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise _unreadable(file, error) from None


def _opened(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises errors of all kinds for broken files and for enormous ones
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"--images: {file} cannot be read as a picture ({' '.join(str(error).split())[:200]}); mend it or take it away.")


class Drawn:
    """Real pictures of the embedded benchmark, composed anew for every seed."""

    name, places = "the benchmark's real pictures", None

    def __init__(self, records: list, images: int):
        import sage.emoji

        self.images, self.count = images, images * len(records)
        self._drawn = [sage.emoji.real_pictures(records, images, seed) for seed in (REFERENCE_SEED, REAL_SEED)]
        # By the pixels: sprites, or the way they are composed, may be another release's.
        self.identity = digest([hashlib.sha256(drawn.numpy().tobytes()).hexdigest() for drawn in self._drawn])

    def pictures(self) -> Any:
        return self._drawn[0]

    def real(self) -> Any:
        return self._drawn[1]


def find_references(images: str | None, source: Source, asked: Asked) -> References | None:
    """The references of the evaluated prompts; None where there are none.

    Args:
        images: --images.

    Raises:
        InputError: a picture that a line names is missing or outside the folder; there are no two different ones.
    """
    if images is not None:
        folder = Path(images).expanduser()
        if source.prompts.images is None:
            return Files(f"the pictures in {folder.name}", picture_files(folder), aligned=False)
        files = [picture_of(folder, source.prompts.images[row]) for row in asked.rows]
        return Files(f"the pictures of the prompts in {folder.name}", files, aligned=True)
    if source.records is not None:
        return Drawn([source.records[row] for row in asked.rows], asked.images)
    return None


def check_images(images: str | None, source: Source) -> None:
    """Refuse names of pictures that are missing, before anything is loaded. Raises InputError."""
    for name in source.prompts.images or () if images is not None else ():
        picture_of(Path(images).expanduser(), name)


def picture_of(folder: Path, name: str) -> Path:
    """The file of that name inside the folder. Raises InputError where it leads out of it, or is not there."""
    path = Path(name.replace("\0", "/.."))  # no file system has names with a zero in them
    inside = (folder / path).resolve()
    if not name or path.is_absolute() or ".." in path.parts or not inside.is_relative_to(folder.resolve()):
        raise InputError(f'"image" {name[:80]!r}: must be the name of a file inside --images {folder}.')
    if not inside.is_file():
        raise InputError(f'"image" {name[:80]!r}: no such file in --images {folder}.')
    return inside
