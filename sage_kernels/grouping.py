"""The grouping core: exact similarities, the pairs of a tile that reach a threshold, complete linkage of a sparse graph.

NumPy arrays in and out; it knows no prompts. Compiled code (`sage_kernels._grouping`) does the work where it was built; without it
the same results come from NumPy and Python, slower (`refusal` says why). Both agree to the bit.

Units: a `grid` row is a unit vector in whole multiples of 2⁻²⁵, int32; the product of two rows is an integer, exact in 64 bits, and
`squares` has those of each row with itself. A similarity is product / √(square · square) in millionths, int32, in three double
operations: equal rows have 1,000,000.
"""

import heapq
import importlib
from collections.abc import Sequence

import numpy as np

from sage_kernels.backends import build_info

GRID = 2.0**25
UNITS = 1_000_000
INTERFACE = 1  # of csrc/grouping/module.cpp
_CHUNK = 4096  # pairs whose products NumPy computes at once


def _load():
    info = build_info()
    if "grouping" not in info["native"]:
        return None, info["reason"] or info["grouping_reason"] or "this installation was built without the grouping core"
    try:
        module = importlib.import_module("sage_kernels._grouping")
    except ImportError as error:
        return None, f"sage_kernels._grouping does not load: {error}"
    if getattr(module, "interface", None) != INTERFACE:
        return None, "sage_kernels._grouping was built from other sources than these; build again"
    return module, None


core, refusal = _load()  # the compiled core; None, and why it is not used


def squares_of(grid: np.ndarray) -> np.ndarray:
    """int32 [n, d] → int64 [n], the product of each row with itself."""
    parts = [grid[first : first + _CHUNK] for first in range(0, len(grid), _CHUNK)]
    return np.concatenate([np.einsum("ij,ij->i", part, part, dtype=np.int64, casting="safe") for part in parts])


def similarities(grid: np.ndarray, squares: np.ndarray, rows: np.ndarray, cols: np.ndarray, threads: int = 1) -> np.ndarray:
    """Exact similarities of pairs of rows.

    Args:
        grid: int32 [n, d], on the grid.
        squares: int64 [n], see `squares_of`.
        rows, cols: int32 [m], indices into it.

    Returns:
        int32 [m], millionths.
    """
    _check_grid(grid, squares)
    rows, cols = (_indices(given, name, len(grid)) for given, name in ((rows, "rows"), (cols, "cols")))
    if len(rows) != len(cols):
        raise ValueError(f"similarities: rows and cols must be equally many, got {len(rows)} and {len(cols)}")
    if core is not None:
        return core.similarities(grid, squares, rows, cols, threads)
    products = np.empty(len(rows), dtype=np.int64)
    for first in range(0, len(rows), _CHUNK):
        part = slice(first, first + _CHUNK)
        products[part] = np.einsum("ij,ij->i", grid[rows[part]], grid[cols[part]], dtype=np.int64, casting="safe")
    return millionths(products, squares[rows], squares[cols])


def millionths(products: np.ndarray, squares: np.ndarray, other_squares: np.ndarray) -> np.ndarray:
    """Products of grid rows, and the squares of these rows → similarities, int32, ties to even."""
    both = squares.astype(np.float64) * other_squares.astype(np.float64)
    return np.rint(products.astype(np.float64) * float(UNITS) / np.sqrt(both)).astype(np.int32)


def tile_pairs(
    tile: np.ndarray,
    grid: np.ndarray,
    squares: np.ndarray,
    row_numbers: np.ndarray,
    col_numbers: np.ndarray,
    floor: float,
    least: int,
    *,
    ordered: bool = True,
    threads: int = 1,
) -> np.ndarray:
    """The pairs of a tile that reach a similarity.

    Args:
        tile: float32 [r, c], approximate products of rows `row_numbers` with rows `col_numbers`.
        grid, squares: int32 [n, d] and int64 [n].
        row_numbers, col_numbers: int32 [r] and [c], indices into the grid.
        floor: a value of the tile below it stands for a similarity below `least` for sure; all others are computed exactly.
        least: millionths.
        ordered: leave out pairs whose col number is below their row number, because this or another tile has them the other
            way round.

    Returns:
        int32 [m, 3]: row < col, similarity.
    """
    _check_grid(grid, squares)
    row_numbers, col_numbers = _indices(row_numbers, "row_numbers", len(grid)), _indices(col_numbers, "col_numbers", len(grid))
    if tile.dtype != np.float32 or tile.shape != (len(row_numbers), len(col_numbers)):
        raise ValueError(f"tile_pairs: tile must be float32 [{len(row_numbers)}, {len(col_numbers)}], got {tile.dtype} {list(tile.shape)}")
    if core is not None:
        return core.tile_pairs(np.ascontiguousarray(tile), grid, squares, row_numbers, col_numbers, floor, least, ordered, threads)
    at_row, at_col = np.nonzero(tile >= np.float32(floor))
    rows, cols = row_numbers[at_row], col_numbers[at_col]
    kept = cols > rows if ordered else cols != rows
    rows, cols = np.minimum(rows, cols)[kept], np.maximum(rows, cols)[kept]
    found = similarities(grid, squares, rows, cols, threads)
    kept = found >= least
    return np.stack([rows[kept], cols[kept], found[kept]], axis=1).astype(np.int32, copy=False)


def complete_linkage(num_nodes: int, edges: Sequence[np.ndarray], max_size: int) -> np.ndarray:
    """Complete-linkage clustering of a graph with a size cap: its clusters are cliques.

    Again and again the two clusters whose least similar pair is most similar are joined, as long as all pairs between them are
    edges and the joint size is within `max_size`. Ties go to the smaller first and then the smaller second cluster, a cluster
    being called by its smallest node. At the end no two clusters can be joined.

    Args:
        num_nodes: n.
        edges: arrays int32 [m, 3]: row < col < n, similarity; in any order, a pair in one or in several of them.
        max_size: most nodes of a cluster, ≥ 1.

    Returns:
        int32 [k, 3], the merges in their order: the cluster that goes on, the one that is gone, the similarity of the least
        similar pair of the joint cluster.

    Notes:
        O(m log m) time and O(n + m) memory; for dense graphs about O(n²) of both.
    """
    parts = [np.ascontiguousarray(part, dtype=np.int32) for part in edges]
    for part in parts:
        if part.ndim != 2 or part.shape[1] != 3:
            raise ValueError(f"complete_linkage: edges must be arrays [m, 3], got {list(part.shape)}")
    if not 0 <= num_nodes < 2**31:
        raise ValueError(f"complete_linkage: num_nodes must be below 2³¹, got {num_nodes}")
    if max_size < 1:
        raise ValueError(f"complete_linkage: max_size must be at least 1, got {max_size}")
    if core is not None:
        return core.complete_linkage(num_nodes, parts, max_size)
    similarity_of = {}
    for row, col, similarity in np.concatenate([np.empty((0, 3), np.int32), *parts]).tolist():
        if not 0 <= row < col < num_nodes:
            raise ValueError("edges must have 0 <= row < col < n")
        if similarity_of.setdefault((row, col), similarity) != similarity:
            raise ValueError("a pair must have one similarity")
    return np.array(_merges(num_nodes, similarity_of, max_size), dtype=np.int32).reshape(-1, 3)


def _merges(num_nodes: int, similarity_of: dict[tuple[int, int], int], max_size: int) -> list[tuple[int, int, int]]:
    """`complete_linkage` in Python: what two clusters are both adjacent to, their union is adjacent to."""
    adjacent: list[dict[int, int]] = [{} for _ in range(num_nodes)]
    for (row, col), similarity in similarity_of.items():
        adjacent[row][col] = adjacent[col][row] = similarity
    queue = [(-similarity, row, col) for (row, col), similarity in similarity_of.items()]
    heapq.heapify(queue)
    sizes, merges = [1] * num_nodes, []
    while queue:
        similarity, kept, gone = heapq.heappop(queue)
        if adjacent[kept].get(gone) != -similarity or sizes[kept] + sizes[gone] > max_size:
            continue
        merges.append((kept, gone, -similarity))
        sizes[kept] += sizes[gone]
        ours, theirs = adjacent[kept], adjacent[gone]
        adjacent[kept], adjacent[gone] = {}, {}
        for node in ours.keys() | theirs.keys():
            adjacent[node].pop(kept, None)
            adjacent[node].pop(gone, None)
        for node in (ours.keys() & theirs.keys()) - {kept, gone}:
            joint = min(ours[node], theirs[node])
            adjacent[kept][node] = adjacent[node][kept] = joint
            if joint != ours[node]:
                heapq.heappush(queue, (-joint, min(node, kept), max(node, kept)))
    return merges


def _check_grid(grid: np.ndarray, squares: np.ndarray) -> None:
    if grid.dtype != np.int32 or grid.ndim != 2 or not grid.flags.c_contiguous:
        raise ValueError(f"grid must be int32 [n, d], contiguous, got {grid.dtype} {list(grid.shape)}")
    if squares.dtype != np.int64 or squares.shape != grid.shape[:1]:
        raise ValueError(f"squares must be int64 [{len(grid)}], got {squares.dtype} {list(squares.shape)}")


def _indices(given: np.ndarray, name: str, below: int) -> np.ndarray:
    given = np.asarray(given)
    if given.ndim != 1:
        raise ValueError(f"{name} must be indices [m], got {list(given.shape)}")
    if len(given) and not (given.min() >= 0 and given.max() < below):
        raise ValueError(f"{name} must be indices [m] below {below}, got {given.min()} to {given.max()}")
    return np.ascontiguousarray(given, dtype=np.int32)
