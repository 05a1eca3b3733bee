"""Prompt files that are larger than memory: read by place, put in order and find repeats without holding the texts.

    with PromptFile("prompts.txt") as prompts:
        len(prompts), prompts[7]                     # a sequence of str
        for texts in prompts.chunks(4096): ...
        order = prompts.canonical_order()            # int64 [n]

What a file may hold, and what is said of mistakes in it, is as in `sage.prompts`. Eight bytes of memory per prompt are
held, and eight more once repeats were looked for; the file is mapped, and must not change while it is open.
"""

import hashlib
import heapq
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np

from sage.plan_checks import integer
from sage.prompts import InputError, count, parse_row

__all__ = ["PromptFile"]

LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)?")  # what ends a line ends it in sage.prompts too
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DIGEST_BYTES = 16  # of a prompt; two prompts of 2⁶⁴ would be taken for one


class PromptFile(Sequence):
    """The prompts of a text or JSONL file, in file order.

    Args:
        path: a name ending in .jsonl or .ndjson is read as JSONL, any other file as text with one prompt per line. It
            is read through once, and every line is checked.

    Attributes:
        path: Path.
        source: its name, for messages.
        offsets: int64 [n], where the lines of the prompts begin, in bytes.
        blank: number of blank lines, which are skipped.

    Raises:
        InputError: missing, unreadable, empty or wrongly encoded file, or a malformed line (named by number).
    """

    def __init__(self, path: str | Path):
        self.path, self.source = Path(path), str(path)
        self.jsonl = self.path.suffix.lower() in (".jsonl", ".ndjson")
        if str(path) == "-":
            raise InputError("standard input: cannot be read by place; write the prompts to a file.")
        if self.path.is_dir():
            raise InputError(f"{path}: this is a folder; give a file with one prompt per line.")
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError:
            raise InputError(f"{path}: no such file.") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
        self.offsets, self.blank = self._scan()

    def __enter__(self) -> "PromptFile":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Its prompts cannot be read any more."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, place: int | slice) -> str | list[str]:
        """One prompt, or a list of them. Raises IndexError for a place that is not there, ValueError when closed."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = index(place)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.source}: prompt {number} of {len(self)}")
        if self._data is None:
            raise ValueError(f"{self.source}: the prompt file was closed; open it again")
        line = LINE.match(self._data, int(self.offsets[number])).group().decode("utf-8").strip()
        return parse_row(line, f"{self.source}, prompt {number}")["prompt"] if self.jsonl else line

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def chunks(self, size: int) -> Iterator[list[str]]:
        """The prompts in lists of `size`, the last one shorter."""
        size = integer(size, "chunks: size", 1)
        return (self[first : first + size] for first in range(0, len(self), size))

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, as hex digits."""
        return hashlib.sha256(self._data).hexdigest()

    def canonical_order(self, run_bytes: int = 32 << 20) -> np.ndarray:
        """Positions sorted by text, equal texts by position: int64 [n].

        Args:
            run_bytes: of the file whose prompts are sorted in memory at once; the sorted runs are then merged, one prompt
                of each in memory. Takes about four times as much memory, and 24 bytes per prompt.
        """
        run_bytes = integer(run_bytes, "canonical_order: run_bytes", 1)
        runs, first = [], 0
        while first < len(self):
            stop = max(first + 1, int(np.searchsorted(self.offsets, self.offsets[first] + run_bytes)))
            texts = self[first:stop]
            runs.append(first + np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64))
            first = stop
            del texts
        if len(runs) == 1:
            return runs[0]
        merged = heapq.merge(*(map(int, run) for run in runs), key=self.__getitem__)  # equal ones in the order of the runs
        return np.fromiter(merged, dtype=np.int64, count=len(self))

    def first_positions(self) -> np.ndarray:
        """For each prompt, the position of the first one equal to it: int64 [n], read-only.

        Found when first asked for, which reads the file and takes 60 bytes per prompt meanwhile, then kept.
        """
        return self._first_positions

    @cached_property
    def _first_positions(self) -> np.ndarray:
        digests = np.empty((len(self), 2), dtype=np.uint64)
        done = 0
        for texts in self.chunks(128):
            data = b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
            digests[done : done + len(texts)] = np.frombuffer(data, dtype=np.uint64).reshape(-1, 2)
            done += len(texts)
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in file order
        new = np.ones(len(self), dtype=bool)
        new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
        first = np.empty(len(self), dtype=np.int64)
        first[order] = order[new][np.cumsum(new) - 1]
        first.setflags(write=False)
        return first

    def _scan(self) -> tuple[np.ndarray, int]:
        """Where the prompts begin, and the number of blank lines; checks every line."""
        if self._data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{self.source}: the file is UTF-16; save it as UTF-8.")
        begin = len(BYTE_ORDER_MARK) if self._data[:3] == BYTE_ORDER_MARK else 0
        offsets, blank, seeds = array("q"), 0, 0
        for number, match in enumerate(LINE.finditer(self._data, begin), start=1):
            line = match.group()
            if not line:  # the end of the file
                break
            text = self._decode(line, number, begin if number == 1 else 0).strip()
            if text:
                offsets.append(match.start())
                seeds += self.jsonl and "seed" in parse_row(text, f"{self.source}, line {number}")
            else:
                blank += line.endswith((b"\r", b"\n"))  # the end of the last line is no blank line
        if not offsets:
            skipped = f" ({count(blank, 'blank line')})" if blank else ""
            raise InputError(f"{self.source}: no prompts in it{skipped}; write one prompt per line.")
        if seeds not in (0, len(offsets)):
            raise InputError(f"{self.source}: {seeds} of {len(offsets)} lines give a seed; give one on every line, or on none.")
        return np.array(offsets, dtype=np.int64), blank

    def _decode(self, line: bytes, number: int, before: int) -> str:
        """A line as text; `before` bytes of the line stand in front of `line`."""
        if b"\0" in line:
            raise InputError(f"{self.source}: line {number} holds a zero byte; this is no text file.")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.source}: line {number}, byte {error.start + before + 1} (0x{line[error.start]:02x}) is not "
                             "UTF-8; save the file as UTF-8.") from None
