"""Embeddings on disk: each prompt is embedded once per encoder, in whatever run first asks for it.

    FOLDER/<identity of the encoder>.sqlite        one row per prompt: digest, vector, flags, checksum

The folder is $SAGE_CACHE_DIR/embeddings, else $XDG_CACHE_HOME/sage-diffusion/embeddings, else
~/.cache/sage-diffusion/embeddings. Processes may share it. Prompts are not stored, only their sha256.

A stored vector is, to the bit, that of the run that first saw the prompt. Another run would have embedded it among other
prompts, perhaps on another device: that moves a vector by rounding at most.

What is damaged is embedded again, row by row where the file can still be read, else the whole file; where nothing can be
written, nothing is kept. Either is said in a warning, and neither is an error.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sage.encoder_identity import FORMAT, Unidentified

__all__ = ["CacheInfo", "Entry", "VectorStore", "cache_info", "clear_cache", "default_folder", "open_store"]

TABLES = (
    "CREATE TABLE about (format INTEGER, identity TEXT, dimension INTEGER, token_limit INTEGER, crc INTEGER)",
    "CREATE TABLE vectors (id INTEGER PRIMARY KEY, key BLOB, vector BLOB, flags INTEGER, crc INTEGER)",
)
FILE_NAME = re.compile(r"[0-9a-f]{64}\.sqlite(-journal)?")
PACKAGE = Path(__file__).parent
PATIENCE = 60.0  # seconds to wait for another process that writes
AT_ONCE = 500  # ids in one query; SQLite takes 999 or more
UNKNOWN, CUT = 1, 2  # bits of flags


@dataclass(frozen=True)
class Entry:
    """What is kept of a prompt.

    Args:
        vector: float32 [d], of length 1.
        unknown: whether the encoder knows less than half of it.
        cut: whether it is longer than the encoder reads.
    """

    vector: np.ndarray
    unknown: bool
    cut: bool


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

    Args:
        folder: where it is, whether or not it exists.
        files: number of files, one per encoder.
        prompts: number of vectors in all of them.
        bytes: size of all files.
        unreadable: names of files that are damaged; they are rebuilt when their encoder is next used.
    """

    folder: Path
    files: int
    prompts: int
    bytes: int
    unreadable: tuple[str, ...] = ()


class _Unfit(Exception):
    """A database that cannot be what this module wrote."""


class VectorStore:
    """The vectors of one encoder.

    Args:
        path: the file; it and its folder are made when something is first written.
        identity: sha256 of the encoder, as hex digits.

    No method raises for what is wrong with the file: it warns, and the store holds nothing, or takes nothing more.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self.limit: int | None = None  # tokens the encoder reads, once `read` found something
        self._removed = False  # whether a damaged file was

    def read(self, prompts: Sequence[str]) -> dict[str, Entry]:
        """The entries of those of n distinct prompts that are there and intact."""
        if not os.path.exists(self.path):
            return {}
        prompt_of = {_key(prompt): prompt for prompt in prompts}
        entries = self._do(lambda db: self._entries(db, list(prompt_of)), "read") or {}
        return {prompt_of[key]: entry for key, entry in entries.items()}

    def write(self, prompts: Sequence[str], vectors: np.ndarray, unknown: np.ndarray, cut: np.ndarray, limit: int) -> None:
        """Keep the entries of n distinct prompts, in one transaction; those of other processes stay.

        Args:
            vectors: float32 [n, d].
            unknown, cut: bool [n].
            limit: tokens the encoder reads.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _warn(f"{self.path.parent} cannot be made ({error.strerror or error}); goes on without it")
            return
        rows = []
        for prompt, vector, *marks in zip(prompts, vectors, unknown, cut, strict=True):
            key, data, flags = _key(prompt), vector.astype("<f4").tobytes(), UNKNOWN * bool(marks[0]) + CUT * bool(marks[1])
            rows.append((_id(key), key, data, flags, _checksum(key, data, flags)))

        def insert(db: sqlite3.Connection) -> None:
            with _transaction(db):
                if not self._dimension(db):
                    facts = (FORMAT, self.identity, vectors.shape[1], limit)
                    db.execute("INSERT INTO about VALUES (?, ?, ?, ?, ?)", (*facts, _checksum(*facts)))
                db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)", rows)
                if len(self._entries(db, [row[1] for row in rows])) < len(rows):
                    raise _Unfit("does not give back what is written to it")

        self._removed = False
        self._do(insert, "written")
        if self._removed:  # damage came to light only now
            self._do(insert, "written")

    def discard(self, reason: str) -> bool:
        """Remove the file with a warning; whether that worked."""
        _warn(f"{self.path} {reason}; it is built anew")
        try:
            for file in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                file.unlink(missing_ok=True)
        except OSError as error:
            _warn(f"{self.path} cannot be removed ({error.strerror or error}); remove it")
            return False
        self._removed = True
        return True

    def _do(self, action: Callable[[sqlite3.Connection], Any], done: str) -> Any:
        """What `action` returns, None if it failed. A damaged file is removed; one that cannot be used stays."""
        try:
            with contextlib.closing(_connect(self.path)) as db:
                return action(db)
        except _Unfit as error:
            self.discard(str(error))
        except sqlite3.OperationalError as error:  # locked, read-only, disk full
            _warn(f"{self.path} cannot be {done} ({error}); goes on without it")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from names in damaged tables
            self.discard(f"is damaged ({error})")
        return None

    def _dimension(self, db: sqlite3.Connection) -> int:
        """Numbers in a vector; 0 in a new database, which gets its tables if this is a transaction."""
        tables = tuple(sql for sql, in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"))
        if not tables:
            if db.in_transaction:
                for table in TABLES:
                    db.execute(table)
            return 0
        if tables != TABLES:
            raise _Unfit("has other tables than this version writes")
        about = db.execute("SELECT format, identity, dimension, token_limit, crc FROM about").fetchall()
        if len(about) != 1 or about[0][:2] != (FORMAT, self.identity) or about[0][4] != _checksum(*about[0][:4]):
            raise _Unfit("does not say that it belongs to this encoder")
        self.limit = about[0][3]
        return about[0][2]

    def _entries(self, db: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, Entry]:
        """The intact entries of some keys."""
        dimension = self._dimension(db)
        found, damaged, wanted, ids = {}, 0, set(keys), [_id(key) for key in keys]
        for first in range(0, len(ids) if dimension else 0, AT_ONCE):
            some = ids[first : first + AT_ONCE]
            marks = ", ".join("?" * len(some))
            for key, data, flags, crc in db.execute(f"SELECT key, vector, flags, crc FROM vectors WHERE id IN ({marks})", some):
                if key in wanted and crc == _checksum(key, data, flags) and len(data) == 4 * dimension:
                    vector = np.frombuffer(data, "<f4").astype(np.float32)
                    found[key] = Entry(vector, bool(flags & UNKNOWN), bool(flags & CUT))
                else:
                    damaged += 1
        if damaged and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise _Unfit("is damaged")
        if damaged:
            _warn(f"{damaged} of {len(found) + damaged} vectors in {self.path} are damaged and embedded again")
        return found


def open_store(cache: str | Path | bool | None, source: Any) -> VectorStore | None:
    """The store of an encoder.

    Args:
        cache: as for `embed_prompts`.
        source: an encoder that `sage.encoders.find` found.
    Returns:
        VectorStore; None when no cache is wanted, or, with a warning, when the encoder cannot be told from others.
    Raises:
        TypeError: cache is neither a path nor True, False or None.
    """
    if cache is None or cache is False:
        return None
    if cache is not True and (not isinstance(cache, (str, Path)) or not str(cache)):
        raise TypeError(f"embed_prompts: cache must be a folder, True, False or None, got {cache!r}")
    folder = default_folder() if cache is True else Path(cache).expanduser()
    try:
        identity = source.identity()
    except Unidentified as error:
        _warn(f"{source.name} cannot be told from others ({error}); goes on without it")
        return None
    return VectorStore(folder / f"{identity}.sqlite", identity)


def default_folder() -> Path:
    """Where embeddings are kept when no folder is named."""
    if named := os.environ.get("SAGE_CACHE_DIR"):
        return Path(named).expanduser() / "embeddings"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sage-diffusion" / "embeddings"


def cache_info(folder: str | Path | None = None) -> CacheInfo:
    """What is kept in a folder of embeddings, None: the usual one."""
    folder = default_folder() if folder is None else Path(folder).expanduser()
    files = [file for file in _files(folder) if file.suffix == ".sqlite"]
    prompts, unreadable = 0, []
    for file in files:
        try:
            with contextlib.closing(_connect(file)) as db:
                prompts += db.execute("SELECT count(*) FROM vectors").fetchone()[0]
        except (sqlite3.Error, UnicodeDecodeError):
            unreadable.append(file.name)
    size = sum(file.stat().st_size for file in _files(folder))  # only now: opening them removes what a crash left
    return CacheInfo(folder, len(files), prompts, size, tuple(unreadable))


def clear_cache(folder: str | Path | None = None) -> CacheInfo:
    """Remove the embeddings in a folder, None: the usual one, and no other file in it. Returns what was there.

    Raises:
        OSError: a file cannot be removed.
    """
    info = cache_info(folder)
    for file in _files(info.folder):
        file.unlink(missing_ok=True)
    return info


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if FILE_NAME.fullmatch(file.name) and file.is_file())


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)  # transactions are begun by hand
    db.text_factory = lambda data: data.decode("utf-8", "replace")  # damaged text is other text, not an error
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection):
    """All or nothing; waits for other processes before it looks at anything."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _key(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


def _id(key: bytes) -> int:
    """Where SQLite keeps a row: the first 8 bytes of its key as a number. Should two prompts share it, one is kept."""
    return int.from_bytes(key[:8], "little", signed=True)


def _checksum(*values: Any) -> int:
    """CRC-32 of the values and their types."""
    return zlib.crc32(repr(values).encode())


def _warn(what: str) -> None:
    """A warning that points at the line that called into this package."""
    frame, level = sys._getframe(1), 2  # of who called this function
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"embedding cache: {what}", stacklevel=level)
