"""Embed a prompt file that is larger than memory into a .npy file, and go on after an interruption.

    embeddings = embed_file("prompts.txt", "vectors.npy")

    vectors.npy               float32 [n, d], rows of length 1; it gets this name when it is complete
    vectors.unknown.npy       bool [n], prompts that the encoder mostly does not know
    vectors.embedding.json    what the vectors were made from, how many are done, and whether all are
    vectors.npy.part, vectors.unknown.npy.part     the first two while they are being made
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sage.embed import Embeddings, distinct_vectors, read_flags
from sage.encoder_identity import FORMAT, Unidentified
from sage.encoders import Encoder, find
from sage.output import write_atomic
from sage.plan_checks import integer
from sage.prompt_stream import PromptFile

__all__ = ["embed_file"]


def embed_file(
    prompts: "PromptFile | str | Path",
    out: str | Path,
    encoder: str = "auto",
    pipe: Any = None,
    *,
    batch_size: int = 64,
    chunk: int = 4096,
    progress: bool = True,
    device: Any = "cpu",
    resume: bool = True,
) -> Embeddings:
    """Embed the prompts of a file, a chunk of them in memory at a time.

    Every distinct prompt is embedded once, among those that are new in its chunk; equal ones get equal rows, to the bit.
    A run that was stopped and goes on writes what it would have written at once. Vectors differ from those of
    `embed_prompts` for the whole file by rounding at most.

    Args:
        prompts: n prompts.
        out: name of a .npy file.
        encoder, pipe, batch_size, device: as for `embed_prompts`.
        chunk: prompts between two notes of how far it is; each needs memory for its tokens and its vector.
        progress: show a bar.
        resume: go on with what is there, and return it if it is complete. False: start anew, replacing it.

    Returns:
        Embeddings: `vectors` mapped into memory and read-only, `unknown` in memory. Warns, with a count, about prompts
        that had to be cut (distinct ones) and about prompts that the encoder mostly does not know.

    Raises:
        InputError: what is wrong with the prompt file.
        ValueError: `out` is no .npy name or would replace the prompts, or what is there was made from something else (the message
            says from what), or the encoder cannot be told from others, so that a run could not go on safely.
        OSError: a file cannot be written, as on a full disk.
        Other errors of `embed_prompts`.
    """
    batch_size, chunk = integer(batch_size, "embed_file: batch_size", 1), integer(chunk, "embed_file: chunk", 1)
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"embed_file: out must end in .npy, got {str(out)!r}")
    if not isinstance(prompts, PromptFile):
        with PromptFile(prompts) as opened:
            return embed_file(opened, out, encoder, pipe, batch_size=batch_size, chunk=chunk, progress=progress, device=device,
                              resume=resume)
    if prompts.path.resolve() in [file.resolve() for file in files_of(out)]:
        raise ValueError(f"embed_file: out must not name the file of the prompts, which would be replaced, got {str(out)!r} for "
                         f"{prompts.source}")
    source = find(encoder, pipe, device)
    try:
        identity = source.identity()
    except Unidentified as error:
        raise ValueError(f"embed_file: {source.name} cannot be told from others ({error}); name another encoder") from error
    files = _Files(out, {"format": FORMAT, "prompts": prompts.sha256, "rows": len(prompts), "encoder": identity,
                         "batch_size": batch_size, "chunk": chunk})
    if resume:
        files.take_up()
    else:
        files.remove()
    if not files.complete:
        _embed_rest(source.load(), prompts, files, batch_size, chunk, progress)
        files.finish()
    vectors, unknown = files.open("r")
    found = Embeddings(vectors, source.name, np.array(unknown))
    if files.cut:
        warnings.warn(f"embed_file: {files.cut} distinct prompts are longer than {source.name} reads, and were cut", stacklevel=2)
    if found.unknown.any():
        warnings.warn(f"embed_file: {found.unknown.sum()} of {len(found)} prompts are mostly unknown to {source.name} and must not "
                      "be grouped; another encoder may know them", stacklevel=2)
    return found


def files_of(out: Path) -> tuple[Path, ...]:
    """All files that embedding into `out` makes or replaces; see the module docstring."""
    unknown = out.with_suffix(".unknown.npy")
    return out, unknown, out.with_suffix(".embedding.json"), _part(out), _part(unknown)


class _Files:
    """The files of a run, see the module docstring.

    Args:
        out: the .npy file.
        made_from: what decides the vectors; another run with the same goes on where one stopped.

    Attributes:
        done: rows that are written and on disk.
        cut: distinct prompts among them that were cut.
        complete: whether all files have their final names.
    """

    def __init__(self, out: Path, made_from: dict):
        self.out, self.unknown, self.record, *_ = files_of(out)
        self.made_from, self.done, self.cut, self.complete = made_from, 0, 0, False

    def take_up(self) -> None:
        """Read how far an earlier run came. Raises ValueError when it was another."""
        if not self.record.exists():
            taken = [str(file) for file in (self.out, self.unknown) if file.exists()]
            if taken:
                raise ValueError(f"embed_file: {taken[0]} is there, but no {self.record.name} that says what it was made from; move "
                                 "it away, or replace it with resume=False")
            return
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            made_from = dict(record["made_from"])
            self.done, self.cut, self.complete = int(record["done"]), int(record["cut"]), record["complete"] is True
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"embed_file: {self.record} is no record of a run ({error!r}); move it away, or start anew with "
                             "resume=False") from error
        others = [key for key, value in self.made_from.items() if made_from.get(key) != value]
        if others:
            changes = ", ".join(f"{key} {made_from.get(key)!r:.20} instead of {self.made_from[key]!r:.20}" for key in others)
            raise ValueError(f"embed_file: {self.out} was begun with {changes}; give another out, or start anew with resume=False")
        if not 0 <= self.done <= self.made_from["rows"] or self.cut < 0:
            raise ValueError(f"embed_file: {self.record} is no record of a run (done {self.done}, cut {self.cut}); start anew with "
                             "resume=False")
        lost = [file.name for file in (self.out, self.unknown) if not (file if self.complete else self._latest(file)).exists()]
        if lost and self.done:
            raise ValueError(f"embed_file: {self.record} says that {self.done} rows are done, but {lost[0]} is gone; start anew with "
                             "resume=False")

    def remove(self) -> None:
        """What earlier runs left."""
        for file in files_of(self.out):
            file.unlink(missing_ok=True)

    def create(self, dimension: int) -> tuple[np.memmap, np.memmap]:
        """Both arrays, new, with their room on disk taken: float32 [n, d], bool [n]."""
        rows = self.made_from["rows"]
        vectors = np.lib.format.open_memmap(_part(self.out), "w+", np.float32, (rows, dimension))
        unknown = np.lib.format.open_memmap(_part(self.unknown), "w+", bool, (rows,))
        for file in (_part(self.out), _part(self.unknown)):
            _take_room(file)
        return vectors, unknown

    def open(self, mode: str) -> tuple[np.memmap, np.memmap]:
        """Both arrays as they are; mode "r" or "r+". Raises ValueError when they are not what the record says."""
        rows = self.made_from["rows"]
        return self._array(self.out, mode, np.float32, 2, rows), self._array(self.unknown, mode, np.bool_, 1, rows)

    def _array(self, file: Path, mode: str, dtype: type, ndim: int, rows: int) -> np.memmap:
        file = self._latest(file)
        try:
            array = np.lib.format.open_memmap(file, mode)
        except (OSError, ValueError) as error:
            raise ValueError(f"embed_file: {file} cannot be read ({error}); start anew with resume=False") from error
        if array.dtype != dtype or array.ndim != ndim or len(array) != rows:
            raise ValueError(f"embed_file: {file} must hold {np.dtype(dtype)} of {rows} prompts, got {array.dtype} "
                             f"{list(array.shape)}; start anew with resume=False")
        return array

    def note(self, done: int, cut: int, complete: bool = False) -> None:
        """Say how far it is; the rows must be on disk."""
        self.done, self.cut, self.complete = done, cut, complete
        record = {"made_from": self.made_from, "done": done, "cut": cut, "complete": complete}
        write_atomic(self.record, json.dumps(record, indent=1) + "\n")

    def finish(self) -> None:
        """Give the arrays their names, then say that they are complete."""
        for file in (self.unknown, self.out):
            if _part(file).exists():
                os.replace(_part(file), file)
        self.note(self.done, self.cut, complete=True)

    def _latest(self, file: Path) -> Path:
        """Where an array of a run that is not complete lies: it may have stopped between two renamings."""
        return _part(file) if _part(file).exists() else file


def _embed_rest(encoder: Encoder, prompts: PromptFile, files: _Files, batch_size: int, chunk: int, progress: bool) -> None:
    """Embed and write the chunks that are not done."""
    first = prompts.first_positions()
    vectors, unknown = files.open("r+") if files.done else (None, None)
    for start in _starts(files.done, len(prompts), chunk, progress):
        rows = np.arange(start, min(start + chunk, len(prompts)))
        new = sorted((prompts[row], row) for row in rows[first[rows] == rows].tolist())
        texts, places = [text for text, _ in new], [row for _, row in new]
        cut = files.cut
        if texts:
            fresh = distinct_vectors(encoder, texts, batch_size, progress=False)
            marks, long = read_flags(encoder, texts)
            if vectors is None:
                vectors, unknown = files.create(fresh.shape[1])
            vectors[places], unknown[places] = fresh, marks
            cut += int(long.sum())
        repeats = rows[first[rows] != rows]
        vectors[repeats], unknown[repeats] = vectors[first[repeats]], unknown[first[repeats]]
        vectors.flush()
        unknown.flush()
        files.note(int(rows[-1]) + 1, cut)


def _starts(done: int, total: int, chunk: int, progress: bool):
    """Where the chunks begin that are not done, with a bar if wanted."""
    starts = range(done, total, chunk)
    if not progress:
        return starts
    from tqdm.auto import tqdm

    return tqdm(starts, desc="embedding prompts", unit="chunk", initial=done // chunk, total=-(-total // chunk))


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def _take_room(file: Path) -> None:
    """Without this, writing to a full disk through the map would end the process instead of raising OSError."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
