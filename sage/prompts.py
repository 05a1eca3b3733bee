"""Read prompts: a text file, a JSONL file or standard input. Every mistake is named before any work starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KNOWN_KEYS = ("prompt", "negative_prompt", "seed")
MAX_SEED = 2**63 - 1


class InputError(ValueError):
    """Something the caller handed in cannot be used. The message says what, where and what to do."""


@dataclass(frozen=True)
class PromptSet:
    """What a prompt file asks for.

    Attributes:
        source: name of the file, or "standard input".
        prompts: one entry per non-blank line, in file order, surrounding white space removed.
        negative_prompts: one entry per prompt (None where a line names none), or None when no line names one.
        seeds: one int per prompt, or None when no line names one.
        blank: number of blank lines that were skipped.
        images: one file name per prompt as it stands there (None where a line names none), or None when no line names one.
    """

    source: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...] | None = None
    seeds: tuple[int, ...] | None = None
    blank: int = 0
    images: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def repeated(self) -> int:
        """How many entries repeat an earlier prompt; each still gets a picture of its own."""
        return len(self.prompts) - len(set(self.prompts))

    def remarks(self) -> list[str]:
        """Sentences about what was read that a user should know, empty when all is plain."""
        said = []
        if self.blank:
            said.append(f"{self.source}: skipped {count(self.blank, 'blank line')}.")
        if self.repeated:
            said.append(f"{self.source}: {count(self.repeated, 'prompt')} repeated; every copy gets its own picture.")
        return said


def read_prompts(path: str | Path, known: Sequence[str] = KNOWN_KEYS) -> PromptSet:
    """Read prompts from a file, or from standard input when `path` is "-".

    A name ending in .jsonl or .ndjson is read as JSONL, any other file as text with one prompt per line. Standard
    input is JSONL when its first non-blank line starts with `{"`.

    Args:
        path: file name, or "-".
        known: keys that a line of JSONL may have; "image", the name of a picture that belongs to the prompt, only where it is asked for.
    Returns:
        PromptSet with at least one prompt.
    Raises:
        InputError: missing, unreadable, empty or wrongly encoded file, or a malformed line (named by number).
    """
    if str(path) == "-":
        source, data = "standard input", _stdin_bytes()
        text = _decode(data, source)
        as_jsonl = text.lstrip().startswith('{"')
    else:
        path = Path(path)
        source = str(path)
        text = _decode(_file_bytes(path), source)
        as_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    return parse_prompts(text, source, jsonl=as_jsonl, known=known)


def parse_prompts(text: str, source: str, *, jsonl: bool, known: Sequence[str] = KNOWN_KEYS) -> PromptSet:
    """Parse prompt text that is already decoded; see `read_prompts`."""
    # Only line feeds and carriage returns end a line: str.splitlines would also break prompts at U+2028 and others.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    filled = [(number, line) for number, line in lines if line]
    blank = len(lines) - len(filled) - (1 if not lines[-1][1] else 0)  # the end of the last line is no blank line
    if not filled:
        skipped = f" ({count(blank, 'blank line')})" if blank else ""
        raise InputError(f"{source}: no prompts in it{skipped}; write one prompt per line.")
    if not jsonl:
        return PromptSet(source, tuple(line for _, line in filled), blank=blank)
    rows = [parse_row(line, f"{source}, line {number}", known) for number, line in filled]
    return PromptSet(
        source,
        tuple(row["prompt"] for row in rows),
        _column(rows, "negative_prompt"),
        _seed_column(rows, source),
        blank,
        _column(rows, "image"),
    )


def count(number: int, noun: str) -> str:
    """"1 picture", "2 pictures": the number with its noun, plural where it should be."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _stdin_bytes() -> bytes:
    if sys.stdin.isatty():
        print("Reading prompts from the terminal, one per line; end with Ctrl-D.", file=sys.stderr)
    return sys.stdin.buffer.read()


def _file_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; give a file with one prompt per line.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _decode(data: bytes, source: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{source}: the file is UTF-16; save it as UTF-8.")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise InputError(f"{source}: line {line} holds a zero byte; this is no text file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset is counted after a byte order mark, which utf-8-sig has taken off.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, offset) + 1
        column = offset - (data.rfind(b"\n", 0, offset) + 1) + 1
        raise InputError(
            f"{source}: line {line}, byte {column} (0x{data[offset]:02x}) is not UTF-8; save the file as UTF-8."
        ) from None


def parse_row(line: str, where: str, known: Sequence[str] = KNOWN_KEYS) -> dict:
    """A line of JSONL as an object with checked values. Raises InputError, which calls the line `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}).") from None
    except RecursionError:
        raise InputError(f"{where}: not usable JSON (nested too deeply).") from None
    if not isinstance(row, dict):
        raise InputError(f'{where}: wanted an object like {{"prompt": "a red fox"}}, got {type(row).__name__}.')
    unknown = [key for key in row if key not in known]
    if unknown:
        raise InputError(f"{where}: unknown key {_quote(unknown[0])}; known keys: {', '.join(known)}.")
    if "prompt" not in row:
        raise InputError(f'{where}: the key "prompt" is missing.')
    for key in ("prompt", "negative_prompt", "image"):
        if key in row:
            row[key] = _checked_text(row[key], key, where)
    if not row["prompt"]:
        raise InputError(f"{where}: the prompt is empty.")
    if "seed" in row:
        check_seed(row["seed"], where)
    return row


def _checked_text(value, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be a string, got {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {key} holds half of a surrogate pair, which no UTF-8 file can store.") from None
    if "\0" in value:
        raise InputError(f"{where}: {key} holds a zero character.")
    return value.strip()


def check_seed(seed, where: str) -> None:
    """Refuse anything that is not an int in [0, 2**63)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"{where}: seed must be a whole number from 0 to {MAX_SEED}, got {_quote(seed)}.")


def _column(rows: list[dict], key: str) -> tuple | None:
    return tuple(row.get(key) for row in rows) if any(key in row for row in rows) else None


def _seed_column(rows: list[dict], source: str) -> tuple[int, ...] | None:
    given = sum("seed" in row for row in rows)
    if given not in (0, len(rows)):
        raise InputError(f"{source}: {given} of {len(rows)} lines give a seed; give one on every line, or on none.")
    return tuple(row["seed"] for row in rows) if given else None


def _quote(value) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
