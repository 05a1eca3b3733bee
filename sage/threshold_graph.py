"""Which pairs of prompts are alike enough: the edges of the threshold graph, found exactly.

Products are made tile by tile in float32, on the CPU or a GPU, of rows that are shorter than the vectors: their coordinates along the
k directions in which all vectors lie most, and the length of the rest. By Cauchy and Schwarz the product of two such rows is an upper
bound of the similarity. What cannot reach the threshold, however the bound was rounded, is dropped; what is left, a little more than
the edges, is computed again exactly. So the edges do not depend on directions, tiles, threads or devices, and memory is that of the
vectors and the edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from sage_kernels.grouping import GRID, UNITS, tile_pairs

TILE = (2048, 2048)  # rows and columns of a tile on the CPU: it stays in the cache
GPU_TILE = (16384, 16384)
WIDTHS = (32, 48, 64, 96, 128, 192)  # of the bounds; beside them the whole width, where the bound is the similarity
LEARN_FROM = 8192  # vectors that directions are found from
TRY_ON = (256, 4096)  # rows and columns of the sample that chooses the width
EXACT_COST = 3500  # of a pair's exact product, in coordinates of a bound
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of the numbers that matrix products multiply
_EXACT_AT_ONCE = 1 << 18  # pairs whose exact products a GPU makes at once


class Products:
    """Products of rows of a grid, tile by tile, and the pairs in them.

    Args:
        grid: int32 [n, d] on the grid, may be memory-mapped.
        device: where products are made.
        tile: rows and columns of a tile; None: what suits the device.
    """

    def __init__(self, grid: np.ndarray, device: str | torch.device = "cpu", tile: tuple[int, int] | None = None):
        self.grid, self.device = grid, torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.rows_at_once, self.cols_at_once = tile or (TILE if on_cpu else GPU_TILE)
        self.threads = torch.get_num_threads()
        self._on_device = None if on_cpu else torch.from_numpy(np.ascontiguousarray(grid)).to(self.device)
        self._buffer = torch.empty(0, device=self.device)

    def rows(self, numbers: np.ndarray) -> torch.Tensor:
        """float32 [m, d]: rows of the grid as unit vectors."""
        if self._on_device is None:
            return torch.from_numpy(self.grid[numbers]).float().mul_(1 / GRID)
        return self._on_device[torch.from_numpy(numbers).to(self.device)].float().mul_(1 / GRID)

    def tile(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """float32 [r, c]: products of [r, k] and [c, k], in a buffer that the next tile takes."""
        size = len(rows) * len(cols)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, device=self.device)
        out = self._buffer[:size].view(len(rows), len(cols))
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            return torch.mm(rows, cols.T, out=out)

    def pairs(
        self, tile: torch.Tensor, rows: np.ndarray, cols: np.ndarray, floor: float, least: int, ordered: bool = True
    ) -> np.ndarray:
        """The pairs of a tile of rows `rows`, `cols` that reach `least`: see `sage_kernels.grouping.tile_pairs`."""
        if self._on_device is None:
            return tile_pairs(tile.numpy(), self.grid, rows, cols, floor, least, ordered=ordered, threads=self.threads)
        at_row, at_col = (tile >= floor).nonzero(as_tuple=True)
        row, col = (torch.from_numpy(given).to(self.device)[at].long() for given, at in ((rows, at_row), (cols, at_col)))
        kept = col > row if ordered else col != row
        row, col = torch.minimum(row, col)[kept], torch.maximum(row, col)[kept]
        found = torch.cat([self._exact(*pair) for pair in zip(row.split(_EXACT_AT_ONCE), col.split(_EXACT_AT_ONCE))] or [row])
        kept = found >= least
        return torch.stack([row[kept], col[kept], found[kept]], dim=1).int().cpu().numpy()

    def _exact(self, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """Similarities in millionths; float64 adds whole numbers below 2⁵³ exactly in any order."""
        products = (self._on_device[row].double() * self._on_device[col].double()).sum(dim=1)
        return torch.round(products * (UNITS / GRID**2))


def floor(width: int, least: int) -> float:
    """The product of two float32 rows of `width` below which the similarity is below `least` for sure, however it was rounded."""
    factors = 2 * _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
    return (least - 0.5) / UNITS - 1.01 * (factors + (width + 8) * 2.0**-24) - 1e-6


class Bounds:
    """Short rows of some nodes, whose products are upper bounds of the similarities.

    Args:
        nodes: int32 [m], indices into the grid of `products`.
        least: millionths; the width that finds its pairs with least work is chosen on a sample.

    Attributes:
        rows: float32 [m, k + 1] coordinates along k directions and the length of the rest; [m, d] if no bound is worth it.
        floor: a product below it stands for a similarity below `least`.
    """

    def __init__(self, products: Products, nodes: np.ndarray, least: int):
        directions = _directions(products, nodes)
        widths = [width for width in WIDTHS if width < len(directions)]
        width = _best_width(products, nodes, directions, widths, least) if widths else None
        kept = None if width is None else directions[:, :width].contiguous()
        parts = [_short(products.rows(nodes[first : first + LEARN_FROM]), kept) for first in range(0, len(nodes), LEARN_FROM)]
        self.rows = torch.cat(parts)
        self.floor = floor(self.rows.shape[1], least)


def _directions(products: Products, nodes: np.ndarray) -> torch.Tensor:
    """float64 [d, d]: orthonormal directions, that along which the nodes lie most first; [0, 0] if there are too few to learn from."""
    width = products.grid.shape[1]
    if len(nodes) < 16 * width:
        return torch.empty(0, 0, dtype=torch.float64, device=products.device)
    some = products.rows(nodes[:: max(1, len(nodes) // LEARN_FROM)])
    _, vectors = np.linalg.eigh((some.T @ some).double().cpu().numpy())
    return torch.from_numpy(vectors[:, ::-1].copy()).to(products.device)


def _short(rows: torch.Tensor, directions: torch.Tensor | None) -> torch.Tensor:
    """[m, d] → [m, k + 1], see `Bounds`."""
    if directions is None:
        return rows
    rows = rows.double()
    along = rows @ directions
    rest = ((rows * rows).sum(dim=1) - (along * along).sum(dim=1)).clamp(min=0).sqrt()
    return torch.cat([along, rest[:, None]], dim=1).float()


def _best_width(products: Products, nodes: np.ndarray, directions: torch.Tensor, widths: list[int], least: int) -> int | None:
    """The width with least work on a sample; None: the whole."""
    some, others = (products.rows(nodes[:: max(1, len(nodes) // count)][:count]) for count in TRY_ON)
    work = {None: float(directions.shape[0])}
    for width in widths:
        kept = directions[:, :width]
        tile = products.tile(_short(some, kept), _short(others, kept))
        work[width] = width + 1 + EXACT_COST * float((tile >= floor(width + 1, least)).float().mean())
    return min(work, key=work.__getitem__)


def exact_edges(
    products: Products, nodes: np.ndarray, least: int, on_rows: Callable[[int], None] | None = None
) -> Iterator[np.ndarray]:
    """All pairs of `nodes` that reach `least`, as they are found.

    Args:
        nodes: int32 [m], ascending indices into the grid.
        least: millionths.
        on_rows: called with a number of rows when their pairs have been found; for progress bars.

    Yields:
        int32 [k, 3]: row < col, similarity.
    """
    bounds = Bounds(products, nodes, least)
    for first in range(0, len(nodes), products.rows_at_once):
        some = slice(first, first + products.rows_at_once)
        for begin in range(first, len(nodes), products.cols_at_once):
            others = slice(begin, begin + products.cols_at_once)
            tile = products.tile(bounds.rows[some], bounds.rows[others])
            yield products.pairs(tile, nodes[some], nodes[others], bounds.floor, least)
        if on_rows is not None:
            on_rows(len(nodes[some]))


def similarity_counts(products: Products, nodes: np.ndarray, levels: np.ndarray, sample: int = 512) -> np.ndarray:
    """About how many pairs of `nodes` reach each level, from the products of a sample of them with all.

    Args:
        levels: ascending, int [k], millionths.
        sample: rows looked at, spread evenly over `nodes`.

    Returns:
        float [k].
    """
    chosen = np.unique(np.linspace(0, len(nodes) - 1, min(sample, len(nodes))).astype(np.int64))
    rows = products.rows(nodes[chosen])
    edges = torch.tensor([*(levels / UNITS - 1e-6), np.inf], dtype=torch.float32)
    counts = torch.zeros(len(levels), dtype=torch.float64)
    for begin in range(0, len(nodes), products.cols_at_once):
        tile = products.tile(rows, products.rows(nodes[begin : begin + products.cols_at_once]))
        counts += torch.histogram(tile.flatten().cpu().clamp(max=1.5), edges).hist.double()
    at_least = counts.flip(0).cumsum(0).flip(0).numpy() - len(chosen)  # without the rows themselves
    return np.maximum(at_least, 0) / len(chosen) * len(nodes) / 2

