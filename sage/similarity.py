"""Cosine similarities that depend on two vectors alone: not on order, tiles, threads or machine.

Normalised vectors are rounded to whole multiples of 2⁻²⁵. Products of such vectors are integers below 2⁵¹, which 64 bits add exactly in
any order. A similarity is the product over the lengths, rounded to millionths (`sage_kernels.grouping`): equal vectors have 1, and
similarities that are equal after rounding are ties.
"""

import tempfile
from typing import Any

import numpy as np
import torch

from sage.plan_checks import short, threshold
from sage_kernels.grouping import GRID, UNITS, millionths, squares_of

__all__ = ["similarity_matrix"]

IN_MEMORY = 4 << 30  # bytes of a grid that is held in memory
BLOCK = 4096  # rows that are normalised, or multiplied, at once


def on_grid(embeddings: Any, name: str, num_rows: int | None = None, order: np.ndarray | None = None) -> np.ndarray:
    """Vectors of any length → rows on the grid. A row depends on nothing but itself.

    Args:
        embeddings: [n, d] numbers; may be memory-mapped, it is read in blocks.
        name: what errors call it.
        num_rows: n, if it is known.
        order: int64 [m], the rows that are wanted, in the order wanted; None: all, as they are.

    Returns:
        int32 [m, d]; in a temporary file that is mapped into memory, if it is large.

    Raises:
        TypeError: no numbers.
        ValueError: another shape; NaN, infinity or rows of zeros, which are named.
    """
    rows = as_numbers(embeddings, name)
    wanted = "[n, d]" if num_rows is None else f"[{num_rows}, d]"
    if rows.ndim != 2 or 0 in rows.shape or (num_rows is not None and len(rows) != num_rows):
        raise ValueError(f"{name} must be {wanted} with n ≥ 1 and d ≥ 1, one row per prompt, got {list(rows.shape)}")
    order = np.arange(len(rows)) if order is None else order
    out = _room(len(order), rows.shape[1])
    not_finite, zero = [], []
    for first in range(0, len(order), BLOCK):
        some = order[first : first + BLOCK]
        block = np.array(rows[some], dtype=np.float64)
        finite = np.isfinite(block).all(axis=1)
        largest = np.abs(block).max(axis=1, keepdims=True)
        not_finite += some[~finite].tolist()
        zero += some[largest[:, 0] == 0].tolist()
        if not_finite or zero:
            continue
        block /= largest  # no overflow in the squares
        out[first : first + BLOCK] = np.rint(block / np.sqrt((block * block).sum(axis=1, keepdims=True)) * GRID)
    if not_finite:
        raise ValueError(f"{name} must be finite, but rows {short(sorted(not_finite))} hold NaN or infinity")
    if zero:
        raise ValueError(f"{name} must not be zero, but rows {short(sorted(zero))} are; such prompts have no direction")
    return out


def as_numbers(embeddings: Any, name: str) -> np.ndarray:
    """Vectors as an array: of NumPy, torch or `sage.embed_prompts`, or lists of numbers. Raises TypeError for anything else."""
    given = getattr(embeddings, "vectors", embeddings)
    if torch.is_tensor(given):
        given = given.detach().to("cpu", torch.promote_types(given.dtype, torch.float32)).numpy()
    try:
        rows = np.asarray(given)
    except ValueError as error:
        raise TypeError(f"{name} must be rows of equally many numbers, got {type(embeddings).__name__} ({error})") from None
    if rows.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be numbers, got {type(embeddings).__name__} of dtype {rows.dtype}")
    return rows


def _room(rows: int, width: int) -> np.ndarray:
    """int32 [rows, width], to be written."""
    if rows * width * 4 <= IN_MEMORY:
        return np.empty((rows, width), dtype=np.int32)
    with tempfile.TemporaryFile() as file:  # it has no name, and is gone when the array is
        return np.memmap(file, dtype=np.int32, mode="w+", shape=(rows, width))


def similarity_matrix(embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarities as grouping sees them: [n, d] → float64 [n, n], six decimals."""
    return all_pairs(on_grid(embeddings, "similarity_matrix: embeddings")) / UNITS


def all_pairs(grid: np.ndarray) -> np.ndarray:
    """int32 [n, d] on the grid → int32 [n, n], similarities in millionths."""
    squares, rows = squares_of(grid), grid.astype(np.float64)  # whole numbers, and so are all partial sums below 2⁵³
    similarities = np.empty((len(rows), len(rows)), dtype=np.int32)
    for first in range(0, len(rows), BLOCK):
        similarities[first : first + BLOCK] = millionths(rows[first : first + BLOCK] @ rows.T, squares[first : first + BLOCK, None], squares)
    return similarities


def in_millionths(similarity: Any, name: str) -> int:
    """A threshold in the units that similarities are compared in."""
    return round(threshold(similarity, name) * UNITS)
