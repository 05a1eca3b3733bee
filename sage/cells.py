"""Which pairs of prompts are alike enough, for so many prompts that looking at all pairs takes too long.

k-means (faiss) parts the vectors into cells, every vector probes the cells whose centres are most alike to it, and only pairs in a
probed cell are looked at; those are computed exactly, as `sage.threshold_graph` does, so no pair below the threshold comes out. Some
above may be missed: how many cells are probed is chosen on a sample whose pairs are all known, and the share of pairs found is then
measured on another sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from sage.threshold_graph import Bounds, Products
from sage_kernels.grouping import similarities

MOST_PROBES = 64  # cells a vector may probe
SAMPLE = 400  # vectors whose pairs are all computed, once to choose, once to measure
POINTS_PER_CELL = 64  # that k-means learns from
SEED = 0


class Cells(NamedTuple):
    """k-means cells of nodes.

    Args:
        probes: int32 [m, p], the cells that each node probes, the most alike first; the first is the one it lies in.
        count: number of cells.
        recall: share of the pairs found, measured on a sample.
    """

    probes: np.ndarray
    count: int
    recall: float


def find_cells(products: Products, nodes: np.ndarray, least: int, recall: float) -> Cells:
    """Cells of `nodes`, and as many probes as find the share `recall` of the pairs that reach `least`.

    Raises:
        ModuleNotFoundError: faiss is not installed.
    """
    centres = _centres(products, nodes)
    probes = _probes(products, nodes, centres)
    rng = np.random.default_rng(SEED)
    first, second = (np.sort(rng.choice(len(nodes), min(SAMPLE, len(nodes)), replace=False)) for _ in range(2))
    ranks = _ranks(products, nodes, probes, first, least)
    wanted = min(1.0, recall + (1 - recall) / 4)  # the other sample may be a little worse
    found = np.searchsorted(np.sort(ranks), np.arange(1, probes.shape[1] + 1)) / max(len(ranks), 1)
    enough = np.flatnonzero(found >= wanted)
    used = int(enough[0]) + 1 if len(enough) else probes.shape[1]
    if len(ranks) == 0:
        used = 1
    probes = np.ascontiguousarray(probes[:, :used])
    ranks = _ranks(products, nodes, probes, second, least)
    return Cells(probes, len(centres), float((ranks < used).mean()) if len(ranks) else 1.0)


def _centres(products: Products, nodes: np.ndarray) -> torch.Tensor:
    """float32 [k, d], directions; k grows with the root of the number of nodes."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'search="approximate" needs faiss, which is not installed: pip install "sage-diffusion[grouping]", or use search="exact"'
        ) from error
    count = int(max(1, min(2 * np.sqrt(len(nodes)), len(nodes) // POINTS_PER_CELL)))
    chosen = nodes[np.sort(np.random.default_rng(SEED).choice(len(nodes), min(len(nodes), count * POINTS_PER_CELL), replace=False))]
    points = products.rows(chosen).cpu().numpy()
    faiss.omp_set_num_threads(products.threads)
    kmeans = faiss.Kmeans(points.shape[1], count, niter=8, seed=SEED, spherical=True, verbose=False)
    kmeans.train(points)
    return torch.from_numpy(kmeans.centroids).to(products.device)


def _probes(products: Products, nodes: np.ndarray, centres: torch.Tensor) -> np.ndarray:
    """int32 [m, p]: the cells with the most alike centres, the most alike first."""
    most = min(MOST_PROBES, len(centres))
    probes = np.empty((len(nodes), most), dtype=np.int32)
    for begin in range(0, len(nodes), products.rows_at_once):
        tile = products.tile(products.rows(nodes[begin : begin + products.rows_at_once]), centres)
        probes[begin : begin + len(tile)] = tile.topk(most, dim=1).indices.int().cpu().numpy()
    return probes


def _ranks(products: Products, nodes: np.ndarray, probes: np.ndarray, sample: np.ndarray, least: int) -> np.ndarray:
    """For every pair that reaches `least` and has one end in the sample: with how many probes, less one, it is found.

    A pair is found if either end probes the cell of the other. One that is never found has the number of probes.
    """
    ranks, rows, floor = [], products.rows(nodes[sample]), products.floor(products.grid.shape[1], least)
    for begin in range(0, len(nodes), products.rows_at_once):
        others = np.arange(begin, min(begin + products.rows_at_once, len(nodes)))
        tile = products.tile(rows, products.rows(nodes[others]))
        at_row, at_col = (at.cpu().numpy() for at in (tile >= floor).nonzero(as_tuple=True))
        a, b = sample[at_row], others[at_col]
        reaches = (a != b) & (similarities(products.grid, products.squares, nodes[a], nodes[b], products.threads) >= least)
        a, b = a[reaches], b[reaches]
        ranks.append(np.minimum(_rank(probes[a], probes[b, 0]), _rank(probes[b], probes[a, 0])))
    return np.concatenate(ranks)


def _rank(probes: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """[m, p], [m] → [m]: the place of a cell among the probes; p if it is not there."""
    hit = probes == cells[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), probes.shape[1])


def cell_edges(
    products: Products, nodes: np.ndarray, cells: Cells, least: int, on_rows: Callable[[int], None] | None = None
) -> Iterator[np.ndarray]:
    """The pairs of `nodes` that reach `least` and of which one probes the other's cell; a pair may come twice.

    Args, yields: those of `sage.threshold_graph.exact_edges`.
    """
    by_cell = np.argsort(cells.probes[:, 0], kind="stable")
    ends = np.cumsum(np.bincount(cells.probes[:, 0], minlength=cells.count))
    probing = np.argsort(cells.probes.ravel(), kind="stable") // cells.probes.shape[1]
    probing_ends = np.cumsum(np.bincount(cells.probes.ravel(), minlength=cells.count))
    bounds = Bounds(products, nodes, least)
    for cell in range(cells.count):
        inside = by_cell[ends[cell - 1] if cell else 0 : ends[cell]]
        askers = probing[probing_ends[cell - 1] if cell else 0 : probing_ends[cell]]
        for begin in range(0, len(inside), products.cols_at_once):
            some = inside[begin : begin + products.cols_at_once]
            columns = bounds.rows[torch.from_numpy(some).to(products.device)]
            for first in range(0, len(askers), products.rows_at_once):
                others = askers[first : first + products.rows_at_once]
                tile = products.tile(bounds.rows[torch.from_numpy(others).to(products.device)], columns)
                yield products.pairs(tile, nodes[others], nodes[some], bounds.floor, least, ordered=False)
        if on_rows is not None:
            on_rows(len(inside))
