"""Embeddings that somebody else made, or that are to be kept: .npy and Parquet files.

    embeddings = load_embeddings("vectors.npy", prompts)          # [n, d], one row per prompt, in their order
    embeddings = load_embeddings("vectors.parquet", prompts)      # columns "prompt" and "embedding", in any order
    save_embeddings("vectors.parquet", prompts, embeddings)

Nothing in these files is run: pickled objects are refused.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sage.embed import Embeddings
from sage.encoder_identity import file_sha256
from sage.output import whole_or_nothing
from sage.plan_checks import short, texts

__all__ = ["load_embeddings", "save_embeddings"]

BLOCK = 4096  # rows read at once
UNIT = 1e-6  # rows whose length differs from 1 by less are taken as they are
SUFFIXES = (".npy", ".parquet")
PYARROW = 'needs pyarrow, which is not installed; pip install "sage-diffusion[grouping]" or pip install pyarrow'


def load_embeddings(path: str | Path, prompts: Sequence[str]) -> Embeddings:
    """Read embeddings of prompts from a file.

    Args:
        path: a .npy file of floats [n, d], rows in the order of the prompts; or a .parquet file with the columns `prompt`
            (text) and `embedding` (list of d floats), matched by text: more prompts, and a prompt that is there
            several times with one vector, are fine. A bool column `unknown`, if there, marks prompts that must not be
            grouped.
        prompts: n texts, at least one.

    Returns:
        Embeddings: float32 [n, d], every row made length 1; rows that are, to one in a million, are unchanged. If all
        rows of a .npy file of float32 are, `vectors` is that file, mapped into memory and read-only. `encoder` names the
        file and the first 12 hex digits of its sha256.

    Raises:
        TypeError: the array holds no floats.
        ValueError: the file is no such file, its shape or numbers do not fit, or prompts are missing; says which.
        ModuleNotFoundError: a .parquet file without pyarrow.
        OSError: the file is missing or cannot be read.
    """
    prompts = texts(prompts, "load_embeddings: prompts")
    path, where = Path(path), f"load_embeddings: {path}"
    _check_suffix(path, "load_embeddings")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{where} {what}; give a .npy or .parquet file")
    name = f"file {path.name}, sha256 {file_sha256(path)[:12]}"
    if path.suffix.lower() == ".npy":
        return Embeddings(_unit_rows(_mapped(path, where, len(prompts)), where, prompts), name, np.zeros(len(prompts), dtype=bool))
    distinct = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    rows = np.array([row_of[prompt] for prompt in prompts])
    vectors, unknown = _from_parquet(path, where, row_of)
    return Embeddings(_unit_rows(vectors[rows], where, prompts), name, unknown[rows])


def save_embeddings(path: str | Path, prompts: Sequence[str], embeddings: "Embeddings | np.ndarray") -> None:
    """Write embeddings into a .npy or .parquet file that `load_embeddings` reads; the whole file or nothing.

    Args:
        path: of the file; one that is there is replaced. A .npy file cannot say which prompts are unknown: that warns.
        prompts: n texts, at least one.
        embeddings: what `embed_prompts` returned, or floats [n, d], finite, no row all zero; they are stored as float32.

    Raises:
        TypeError, ValueError: embeddings do not fit the prompts, or rows of equal prompts differ.
        ModuleNotFoundError: a .parquet file without pyarrow.
        OSError: the file cannot be written.
    """
    prompts = texts(prompts, "save_embeddings: prompts")
    path = Path(path)
    _check_suffix(path, "save_embeddings")
    unknown = embeddings.unknown if isinstance(embeddings, Embeddings) else np.zeros(len(prompts), dtype=bool)
    vectors = embeddings.vectors if isinstance(embeddings, Embeddings) else np.asarray(embeddings)
    _check_shape(vectors, "save_embeddings: embeddings", len(prompts))
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    _refuse_unusable(vectors, "save_embeddings", prompts)
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if not np.array_equal(vectors[row], vectors[first.setdefault(prompt, row)]):
            raise ValueError(f"save_embeddings: embeddings of equal prompts must be equal, but rows {first[prompt]} and {row} "
                             f"of {prompt!r:.80} differ")
    if path.suffix.lower() == ".npy":
        if unknown.any():
            warnings.warn(f"save_embeddings: {unknown.sum()} of {len(prompts)} prompts are unknown to the encoder, which a .npy "
                          "file cannot say: they will be grouped; save a .parquet file instead", stacklevel=2)
        with whole_or_nothing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        return
    pyarrow = _pyarrow("save_embeddings")
    flat = pyarrow.array(vectors.reshape(-1))
    columns = {"prompt": pyarrow.array(prompts), "unknown": pyarrow.array(unknown),
               "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    with whole_or_nothing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def _mapped(path: Path, where: str, count: int) -> np.ndarray:
    """The array of a .npy file, mapped into memory; objects are refused unread."""
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise ValueError(f"{where} cannot be read as a .npy file of floats ({error}); write one with np.save, from an array "
                         "of float32") from error
    _check_shape(vectors, where, count)
    return vectors


def _from_parquet(path: Path, where: str, row_of: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, d] and bool [n] of n distinct prompts, which `row_of` numbers."""
    found: list[np.ndarray | None] = [None] * len(row_of)
    line_of = np.full(len(row_of), -1)
    unknown = np.zeros(len(row_of), dtype=bool)
    for line, (prompt, vector, *mark) in enumerate(_parquet_rows(path, where)):
        row = row_of.get(prompt.as_py())
        if row is None:
            continue
        vector = _list_values(vector, f"{where}: embedding in row {line}")
        if found[row] is not None and not np.array_equal(vector, found[row], equal_nan=True):
            raise ValueError(f"{where}: rows {line_of[row]} and {line} hold different embeddings of {prompt.as_py()!r:.80}; "
                             "keep one")
        found[row], line_of[row] = vector, line
        unknown[row] |= bool(mark and mark[0].as_py())
    missing = [prompt for prompt, row in row_of.items() if found[row] is None]
    if missing:
        named = ", ".join(f"{prompt!r:.60}" for prompt in missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"{where} lacks {len(missing)} of {len(row_of)} distinct prompts: {named}; embed them and add them")
    lengths = sorted({len(vector) for vector in found})
    if len(lengths) > 1 or not lengths[0]:
        raise ValueError(f"{where}: embeddings must be of one length, at least 1, got lengths {short(lengths)}")
    return np.array(found), unknown


def _parquet_rows(path: Path, where: str) -> Iterator[tuple]:
    """Prompt, embedding and, if there is such a column, unknown of every row, as pyarrow's scalars."""
    pyarrow = _pyarrow("load_embeddings")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, where)
            for batch in file.iter_batches(BLOCK, columns=columns):
                yield from zip(*(batch.column(column) for column in columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{where} cannot be read as a Parquet file ({error}); write it anew") from error


def _columns(schema: Any, where: str) -> list[str]:
    """The columns to read, after a look at their types."""
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    if "prompt" not in kinds or "embedding" not in kinds:
        raise ValueError(f'{where} must have the columns "prompt" and "embedding", got {", ".join(kinds) or "none"}')
    kind = kinds["prompt"].value_type if types.is_dictionary(kinds["prompt"]) else kinds["prompt"]
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f'{where}: column "prompt" must be text, got {kinds["prompt"]}')
    kind = kinds["embedding"]
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not listed or not types.is_floating(kind.value_type):
        raise ValueError(f'{where}: column "embedding" must be lists of floats, got {kind}')
    if "unknown" in kinds and not types.is_boolean(kinds["unknown"]):
        raise ValueError(f'{where}: column "unknown" must be bool, got {kinds["unknown"]}; rename it')
    return ["prompt", "embedding"] + ["unknown"] * ("unknown" in kinds)


def _list_values(vector: Any, where: str) -> np.ndarray:
    if not vector.is_valid or vector.values.null_count:
        raise ValueError(f"{where} is missing or holds missing numbers")
    return vector.values.to_numpy(zero_copy_only=False)


def _unit_rows(vectors: np.ndarray, where: str, prompts: list[str]) -> np.ndarray:
    """float32 [n, d], rows of length 1; `vectors` itself if it is that already."""
    _refuse_unusable(vectors, where, prompts)
    unit = np.concatenate([np.abs(_lengths(vectors[first : first + BLOCK]) - 1) < UNIT for first in range(0, len(vectors), BLOCK)])
    if vectors.dtype == np.float32 and vectors.dtype.isnative and unit.all():
        return vectors
    result = np.empty(vectors.shape, dtype=np.float32)
    for first in range(0, len(vectors), BLOCK):
        rows = vectors[first : first + BLOCK].astype(np.float64)
        rows /= np.abs(rows).max(axis=1, keepdims=True)  # no overflow in the squares
        rows /= _lengths(rows)[:, None]
        kept = unit[first : first + BLOCK]
        rows[kept] = vectors[first : first + BLOCK][kept]
        result[first : first + BLOCK] = rows
    return result


def _lengths(rows: np.ndarray) -> np.ndarray:
    """float64 [n]."""
    with np.errstate(over="ignore"):
        return np.linalg.norm(rows.astype(np.float64), axis=1)


def _check_shape(vectors: np.ndarray, where: str, count: int) -> None:
    if vectors.dtype.kind != "f" or vectors.dtype.itemsize > 8:
        raise TypeError(f"{where} must hold float16, float32 or float64, got dtype {vectors.dtype}")
    if vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] == 0:
        raise ValueError(f"{where} must be [{count}, d], one row per prompt in their order, got {list(vectors.shape)}")


def _refuse_unusable(vectors: np.ndarray, where: str, prompts: list[str]) -> None:
    broken, zero = [], []
    for first in range(0, len(vectors), BLOCK):
        rows = vectors[first : first + BLOCK]
        broken += (first + np.flatnonzero(~np.isfinite(rows).all(axis=1))).tolist()
        zero += (first + np.flatnonzero(~rows.any(axis=1))).tolist()
    for bad, what in ((broken, "hold NaN or infinity"), (zero, "are zero, which is no direction")):
        if bad:
            raise ValueError(f"{where}: the embeddings of prompts {short(bad)} {what} (the first: {prompts[bad[0]]!r:.80}); embed "
                             "them again")


def _check_suffix(path: Path, op: str) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{op}: path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")


def _pyarrow(op: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(f"{op}: a .parquet file {PYARROW}") from error
    return pyarrow
