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

from sage_kernels.grouping import UNITS, squares_of, tile_pairs

TILE = (2048, 2048)  # rows and columns of a tile on the CPU: it stays in the cache
GPU_TILE = (16384, 16384)
WIDTHS = (32, 48, 64, 96, 128, 192)  # of the bounds; beside them the whole width, where the bound is the similarity
LEARN_FROM = 8192  # vectors that directions are found from
TRY_ON = (256, 4096)  # rows and columns of the sample that chooses the width
EXACT_COST = 3500  # of a pair's exact product, in coordinates of a bound: 70 ns and 0.02 ns on two cores that were timed
FACTOR_BITS = (22, 16, 10, 7)  # bits behind the point that matrix products keep of their factors: float32 all, TF32 10, bfloat16 7
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
        self.threads, self.squares = torch.get_num_threads(), squares_of(grid)
        self._on_device = None if on_cpu else torch.from_numpy(np.ascontiguousarray(grid)).to(self.device)
        self._lengths = torch.from_numpy(np.sqrt(self.squares.astype(np.float64)))
        self._buffer = torch.empty(0, dtype=torch.float32, device=self.device)
        self.factor_bits = self._factor_bits()

    def _factor_bits(self) -> int:
        """How many bits behind the point a product of tiles keeps of its factors; tried, as settings that lower it are many."""
        rows, cols = (torch.zeros(min(count, len(self.grid)), self.grid.shape[1], device=self.device, dtype=torch.float32)
                      for count in (self.rows_at_once, self.cols_at_once))  # fmt: skip
        cols[:, 0] = 1.0
        for bits in FACTOR_BITS:
            rows[:, 0] = 1 + 2.0**-bits
            if bool((self.tile(rows, cols) == 1 + 2.0**-bits).all()):
                return bits
        raise RuntimeError(f"matrix products on {self.device} keep less than {FACTOR_BITS[-1]} bits of their factors: too few to group by")

    def floor(self, width: int, least: int) -> float:
        """The product of two float32 rows of `width` below which the similarity is below `least` for sure.

        The rows' squares are at most 1. Each factor was rounded to float32 twice (as a unit vector, as a coordinate), and once more
        if the product keeps fewer bits: by Cauchy and Schwarz that moves the product by at most the sum of these relative errors. A sum
        of d products in float32, in any order, is off by d roundings at most; where factors are shortened, sums are taken to be
        four times as bad. The rest length of a `Bounds` row comes from a difference in double and is right to 2⁻²².
        """
        whole = self.factor_bits == FACTOR_BITS[0]
        factors = 4 * 2.0**-24 + (0.0 if whole else 2 * 2.0**-self.factor_bits)
        return (least - 0.5) / UNITS - 1.01 * (factors + (width + 8) * (2.0**-24 if whole else 2.0**-22) + 2 * 2.0**-22)

    def rows(self, numbers: np.ndarray) -> torch.Tensor:
        """float32 [m, d]: rows of the grid as unit vectors."""
        numbers = torch.from_numpy(numbers)
        scale = (1 / self._lengths[numbers]).float().to(self.device)
        if self._on_device is None:
            return torch.from_numpy(self.grid[numbers.numpy()]).float().mul_(scale[:, None])
        return self._on_device[numbers.to(self.device)].float().mul_(scale[:, None])

    def tile(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """float32 [r, c]: products of [r, k] and [c, k], in a buffer that the next tile takes."""
        size = len(rows) * len(cols)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.float32, device=self.device)
        out = self._buffer[:size].view(len(rows), len(cols))
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            return torch.mm(rows, cols.T, out=out)

    def pairs(
        self, tile: torch.Tensor, rows: np.ndarray, cols: np.ndarray, floor: float, least: int, ordered: bool = True
    ) -> np.ndarray:
        """The pairs of a tile of rows `rows`, `cols` that reach `least`: see `sage_kernels.grouping.tile_pairs`."""
        if self._on_device is None:
            return tile_pairs(tile.numpy(), self.grid, self.squares, rows, cols, floor, least, ordered=ordered, threads=self.threads)
        at_row, at_col = (tile >= floor).nonzero(as_tuple=True)
        row, col = (torch.from_numpy(given).to(self.device)[at].long() for given, at in ((rows, at_row), (cols, at_col)))
        kept = col > row if ordered else col != row
        row, col = torch.minimum(row, col)[kept], torch.maximum(row, col)[kept]
        found = torch.cat([self._exact(*pair) for pair in zip(row.split(_EXACT_AT_ONCE), col.split(_EXACT_AT_ONCE))])
        kept = found >= least
        return torch.stack([row[kept], col[kept], found[kept]], dim=1).int().cpu().numpy()

    def _exact(self, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """Similarities in millionths; float64 adds whole numbers below 2⁵³ exactly in any order."""
        products = (self._on_device[row].double() * self._on_device[col].double()).sum(dim=1)
        squares = (torch.from_numpy(self.squares)[of.cpu()].to(self.device).double() for of in (row, col))
        return torch.round(products * UNITS / torch.sqrt(next(squares) * next(squares)))


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
        if len(directions):
            directions = directions[:, : _best_width(products, nodes, directions, least)].contiguous()
        parts = range(0, len(nodes), LEARN_FROM)
        short = [_short(products.rows(nodes[first : first + LEARN_FROM]), directions) for first in parts]
        self.rows = torch.cat(short) if len(short) > 1 else short[0]
        self.floor = products.floor(self.rows.shape[1], least)


def _directions(products: Products, nodes: np.ndarray) -> torch.Tensor:
    """float64 [d, d]: orthonormal directions, that along which the nodes lie most first; [0, 0] if there are too few to learn from."""
    width = products.grid.shape[1]
    if len(nodes) < 16 * width:
        return torch.empty(0, 0, dtype=torch.float64, device=products.device)
    some = products.rows(nodes[:: max(1, len(nodes) // LEARN_FROM)])
    _, vectors = np.linalg.eigh((some.T @ some).double().cpu().numpy())
    return torch.from_numpy(vectors[:, ::-1].copy()).to(products.device)


def _short(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """[m, d] → [m, k + 1], see `Bounds`; as they are, if `directions` [d, k] are none or all."""
    if directions.shape[0] == directions.shape[1]:
        return rows
    rows = rows.double()
    along = rows @ directions
    rest = ((rows * rows).sum(dim=1) - (along * along).sum(dim=1)).clamp(min=0).sqrt()
    return torch.cat([along, rest[:, None]], dim=1).float()


def _best_width(products: Products, nodes: np.ndarray, directions: torch.Tensor, least: int) -> int:
    """The number of directions with which a sample takes least work."""
    some, others = (products.rows(nodes[:: max(1, len(nodes) // count)][:count]).double() @ directions for count in TRY_ON)
    work = {len(directions): float(len(directions))}
    for width in (width for width in WIDTHS if width < len(directions)):
        short = [torch.cat([x[:, :width], x[:, width:].norm(dim=1, keepdim=True)], dim=1).float() for x in (some, others)]
        reach = products.tile(*short) >= products.floor(width + 1, least)
        work[width] = width + 1 + EXACT_COST * float(reach.float().mean())
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
    edges = torch.tensor([*(levels / UNITS - 1e-6), np.inf], dtype=torch.float32, device="cpu")
    counts = torch.zeros(len(levels), dtype=torch.float64, device="cpu")
    for begin in range(0, len(nodes), products.cols_at_once):
        tile = products.tile(rows, products.rows(nodes[begin : begin + products.cols_at_once]))
        counts += torch.histogram(tile.flatten().cpu().clamp(max=1.5), edges).hist.double()
    at_least = counts.flip(0).cumsum(0).flip(0).numpy() - len(chosen)  # without the rows themselves
    return np.maximum(at_least, 0) / len(chosen) * len(nodes) / 2

