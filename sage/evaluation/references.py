"""The pictures that drawn ones are compared with: a folder, a picture per prompt, or scenes of the embedded benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sage.evaluation.asked import Asked, Source
from sage.evaluation.request import picture_files
from sage.output import digest
from sage.prompts import InputError

__all__ = ["References", "find_references"]

REFERENCE_SEED, REAL_SEED = 1_000_003, 2_000_003  # draws of real pictures; no seed that anything was trained with


class References(Protocol):
    """What a reference set offers.

    Attributes:
        name: for tables.
        images: real pictures of each prompt in `real`, in the order of the prompts; 0: there is no such row.
        independent: whether `real` and `pictures` are two draws; if not, they are the same pictures, and have no distance.
        identity: changes with the pictures.
    """

    name: str
    images: int
    independent: bool
    identity: str

    def pictures(self) -> Any:
        """The set that distances are measured to, as `sage.evaluation` takes pictures."""

    def real(self) -> Any:
        """images · n pictures, those of a prompt together."""


@dataclass(frozen=True)
class Files:
    """Pictures in a folder; `aligned`: one for each prompt, in their order."""

    name: str
    files: tuple[Path, ...]
    aligned: bool
    independent: bool = False

    @property
    def images(self) -> int:
        return int(self.aligned)

    @property
    def identity(self) -> str:
        return digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files])

    def pictures(self) -> Iterator[Any]:
        from PIL import Image

        for file in self.files:
            try:
                with Image.open(file) as image:
                    yield image.convert("RGB")
            except OSError as error:
                raise InputError(f"--images: {file} cannot be read as a picture ({error}).") from None

    real = pictures


class Drawn:
    """Real pictures of the embedded benchmark, composed anew for every seed."""

    name, independent = "the benchmark's real pictures", True

    def __init__(self, records: list, images: int):
        self._records, self.images = records, images
        self.identity = digest([list(map(str, records)), images, REFERENCE_SEED, REAL_SEED])

    def pictures(self) -> Any:
        return self._draw(REFERENCE_SEED)

    def real(self) -> Any:
        return self._draw(REAL_SEED)

    def _draw(self, seed: int) -> Any:
        import sage.emoji

        return sage.emoji.real_pictures(self._records, self.images, seed)


def find_references(images: str | None, source: Source, asked: Asked) -> References | None:
    """The references of the evaluated prompts; None where there are none.

    Args:
        images: --images.

    Raises:
        InputError: a picture that a line names is missing or outside the folder.
    """
    if images is not None:
        folder = Path(images).expanduser()
        if source.prompts.images is None:
            return Files(f"the pictures in {folder.name}", tuple(picture_files(folder)), aligned=False)
        files = [picture_of(folder, source.prompts.images[row]) for row in asked.rows]
        return Files(f"the pictures of the prompts in {folder.name}", tuple(files), aligned=True)
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
