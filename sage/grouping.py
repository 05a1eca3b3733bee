"""Which prompts are alike enough to share: groups, and how they grew.

Prompts are grouped by the cosine similarity of their embeddings. A group is a clique: every two of its prompts are at
least `similarity` alike. Groups come from complete-linkage clustering with a size cap: again and again the two
clusters whose least similar pair is most similar are joined, as long as that pair reaches `similarity` and the joint
size the cap. When no two groups can be joined any more the groups are maximal. Ahead of it, equal vectors fill whole groups.

The outcome depends on the set of prompts alone, never on their order or on the machine: similarities are exact
(`sage.similarity`), and those that are equal after rounding to millionths are ties, which go by text. (An approximate search finds
fewer pairs, and which ones may depend on the machine.)

Clustering looks at the edges of the threshold graph only (`sage.threshold_graph`, `sage_kernels.grouping`): memory grows with the
prompts and the edges. Where far more pairs are alike than groups can use, edges are found in rounds, from the most alike down: a
group that has reached the cap can change no more, so its prompts are left out of the next round, which begins anew with the others:
their groups grow as they did, and further. The outcome is that of one round, if the search is exact.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from sage.cells import cell_edges, find_cells
from sage.plan_checks import fraction, integer, short, texts
from sage.similarity import all_pairs, in_millionths, on_grid, similarity_matrix
from sage.threshold_graph import Products, exact_edges, similarity_counts
from sage_kernels.grouping import UNITS, complete_linkage

__all__ = ["Group", "Groups", "find_groups", "group", "medoid", "similarity_matrix"]

SEARCHES = ("auto", "exact", "approximate")
EXACT_MOST = {"cpu": 200_000, "cuda": 3_000_000}  # prompts up to which "auto" looks at every pair
GPU_FROM = 20_000  # prompts from which "auto" takes a GPU, if there is one
EDGES_A_ROUND = 20_000_000  # 40 bytes each, and at least this many
EDGES_PER_PROMPT = 32
MOST_EDGES = 300_000_000
LEVELS = 64  # similarities at which a round may end


class Group(NamedTuple):
    """A group and its dendrogram.

    Args:
        members: input indices, the first by text first.
        merges: (a, b, height), in order: the clusters that hold inputs a and b are joined; height is the similarity of the joint
            cluster's least similar pair, in millionths.
    """

    members: list[int]
    merges: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Groups:
    """What `find_groups` returns.

    Args:
        groups: a partition of the inputs that could be grouped, in no particular order; a prompt without neighbour is a group of one.
        search: "exact" or "approximate".
        recall: share of the pairs, among those asked for, that the search found: 1.0, or the least of all rounds' samples.
        num_edges: pairs that the clustering was given, over all rounds; an approximate search may give one twice.
        rounds: how often pairs were searched.
    """

    groups: list[Group]
    search: str
    recall: float
    num_edges: int
    rounds: int


def group(
    embeddings: np.ndarray, keys: Sequence[str], similarity: float = 0.6, max_group_size: int = 8, *, search: str = "exact",
    device: str | torch.device = "auto", progress: bool = False,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Part prompts into groups in which every two are at least `similarity` alike.

    **Deterministic and independent of the order of the input.**

    Args:
        embeddings: [n, d], n ≥ 1, any floating dtype; finite, no row all zero, of any length.
        keys: n texts, the prompts; they settle ties.
        similarity: least cosine similarity of any two members, in (−1, 1], compared to six decimals.
        max_group_size: most members of a group, ≥ 1.
        search, device, progress: see `find_groups`.

    Returns:
        Groups as ascending input indices, a partition of all n, in the order of their first member. No two of them
        could be joined within `similarity` and `max_group_size`, if the search was exact.
    """
    found = find_groups(embeddings, keys, similarity, max_group_size, search=search, device=device, progress=progress, op="group")
    return sorted(tuple(sorted(members)) for members, _ in found.groups)


def find_groups(
    embeddings: np.ndarray,
    keys: Sequence[str],
    similarity: float = 0.6,
    max_group_size: int = 8,
    *,
    search: str = "exact",
    recall: float = 0.97,
    device: str | torch.device = "auto",
    progress: bool = False,
    op: str = "find_groups",
) -> Groups:
    """`group`, with the way each group grew.

    Args:
        embeddings, keys, similarity, max_group_size: those of `group`.
        search: "exact": all pairs are looked at. "approximate": only likely ones (needs faiss); no pair below `similarity` gets
            into a group then either, but groups may be smaller than they could be, and may depend on the machine. "auto": exact
            up to 200,000 prompts, or 3 million on a GPU.
        recall: share of the pairs that an approximate search aims at finding, in [0, 1].
        device: where products are made; "auto": a GPU for many prompts, if there is one.
        progress: show a bar.
        op: what errors call this function.

    Returns:
        Groups.

    Raises:
        ValueError, TypeError: an argument is out of range, or embeddings are not finite or zero; before anything is computed.
        ModuleNotFoundError: "approximate" without faiss.
        RuntimeError: so many pairs are alike that their edges would not fit in memory.
    """
    keys = texts(keys, f"{op}: keys")
    least, max_group_size = in_millionths(similarity, f"{op}: similarity"), integer(max_group_size, f"{op}: max_group_size", 1)
    recall, device = check_search(op, search, recall), choose_device(op, device, len(keys))
    max_group_size = min(max_group_size, len(keys))
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    grid = on_grid(embeddings, f"{op}: embeddings", len(keys), order)
    _settle_ties(order, grid, keys)
    return cluster(grid, order, least, max_group_size, search, recall, device, progress)


def cluster(
    grid: np.ndarray, order: np.ndarray, least: int, max_group_size: int, search: str, recall: float, device: str | torch.device,
    progress: bool,
) -> Groups:  # fmt: skip
    """The groups of prompts in canonical order.

    Args:
        grid: int32 [n, d] on the grid.
        order: int64 [n]; what the groups call the rows.
        least: similarity in millionths.
        The others: those of `find_groups`.
    """
    device = choose_device("cluster", device, len(grid))
    search = _search(search, len(grid), device)
    clustering = _Clustering(Products(grid, device), max_group_size, search, recall, progress)
    groups = _grown(order.tolist(), clustering.run(least))
    return Groups(groups, search, min(clustering.recalls, default=1.0), clustering.num_edges, clustering.rounds)


def medoid(embeddings: np.ndarray, members: Sequence[int], keys: Sequence[str]) -> int:
    """The member with the highest mean similarity to the members; ties go by key.

    Args:
        embeddings: [n, d], as for `group`.
        members: indices into embeddings and keys, at least one.
        keys: n texts.

    Returns:
        One of `members`.
    """
    members = [integer(member, "medoid: members", 0) for member in members]
    if not members or max(members) >= len(keys):
        raise ValueError(f"medoid: members must be indices below {len(keys)}, at least one, got {short(members)}")
    rows = np.asarray(embeddings)[members]
    total = all_pairs(on_grid(rows, "medoid: embeddings")).sum(axis=1, dtype=np.int64)
    best = min(range(len(members)), key=lambda i: (-total[i], keys[members[i]], rows[i].tobytes()))
    return members[best]


def check_search(op: str, search: str, recall: float) -> float:
    """Refuse an unknown search or a recall out of range."""
    if search not in SEARCHES:
        raise ValueError(f"{op}: search must be one of {', '.join(map(repr, SEARCHES))}, got {search!r}")
    return fraction(recall, f"{op}: recall")


def _settle_ties(order: np.ndarray, grid: np.ndarray, keys: list[str]) -> None:
    """Put rows of one text in the order of their vectors; `order` [n] and `grid` [n, d] are in that of the texts, and are changed."""
    first = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or keys[order[end]] != keys[order[first]]:
            if end - first > 1:
                same = sorted(range(first, end), key=lambda i: grid[i].tobytes())
                order[first:end], grid[first:end] = order[same], grid[same]
            first = end


def choose_device(op: str, device: str | torch.device, count: int) -> torch.device:
    """The device that products of so many prompts are made on. Raises ValueError for one that torch cannot use."""
    if device is None or device == "auto":
        device = "cuda" if count >= GPU_FROM and torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f'{op}: device must be "auto" or one that torch can use here, got {device!r} ({error})') from error
    return torch.device(device)


def _search(search: str, count: int, device: torch.device) -> str:
    if search != "auto":
        return search
    if count <= EXACT_MOST.get(device.type, EXACT_MOST["cpu"]):
        return "exact"
    if importlib.util.find_spec("faiss") is not None:
        return "approximate"
    warnings.warn(
        f'comparing all pairs of {count:,} prompts, which may take long; pip install "sage-diffusion[grouping]" for a search that '
        "looks at likely pairs only",
        stacklevel=4,
    )
    return "exact"


class _Clustering:
    """Complete linkage over the rows of a grid, in as many rounds as memory asks for.

    Attributes:
        recalls: of the approximate searches.
        num_edges, rounds: so far.
    """

    def __init__(self, products: Products, max_group_size: int, search: str, recall: float, progress: bool):
        self.products, self.max_group_size, self.search, self.recall, self.progress = products, max_group_size, search, recall, progress
        self.recalls: list[float] = []
        self.num_edges = self.rounds = 0

    def run(self, least: int) -> list[tuple[int, int, int]]:
        """The merges, (kept, gone, similarity), those of each cluster in order."""
        count = len(self.products.grid)
        if self.max_group_size == 1:
            return []
        merges = _equal_vectors(self.products.grid, self.max_group_size)
        nodes = np.setdiff1d(np.arange(count, dtype=np.int32), [node for merge in merges for node in merge[:2]]).astype(np.int32)
        level = UNITS + 1
        while len(nodes) > 1 and level > least:
            level = self._next_level(nodes, least, level)
            found = complete_linkage(count, self._edges(nodes, level), self.max_group_size).tolist()
            full = None if level == least else _full(found, self.max_group_size)
            merges += found if full is None else [merge for merge in found if merge[0] in full]
            nodes = nodes if full is None else np.setdiff1d(nodes, list(full)).astype(np.int32)
            self.rounds += 1
        return merges

    def _next_level(self, nodes: np.ndarray, least: int, above: int) -> int:
        """The lowest similarity, at least `least` and well below `above`, that memory has room for the edges of."""
        room = max(EDGES_A_ROUND, EDGES_PER_PROMPT * len(nodes))
        if len(nodes) * (len(nodes) - 1) // 2 <= room:
            return least
        top = UNITS if above > UNITS else above - max(1, (above - least) // 8)
        levels = np.unique(np.linspace(least, top, LEVELS).astype(np.int64))
        counts = similarity_counts(self.products, nodes, levels)
        for most in (room, MOST_EDGES // 2):
            fits = np.flatnonzero(counts <= most)
            if len(fits):
                return int(levels[fits[0]])
        return top

    def _edges(self, nodes: np.ndarray, least: int) -> list[np.ndarray]:
        parts = []
        with tqdm(total=len(nodes), desc="comparing prompts", unit="prompt", disable=not self.progress) as bar:
            if self.search == "approximate":
                cells = find_cells(self.products, nodes, least, self.recall)
                self.recalls.append(cells.recall)
                found = cell_edges(self.products, nodes, cells, least, bar.update)
            else:
                found = exact_edges(self.products, nodes, least, bar.update)
            edges = 0
            for part in found:
                parts.append(part)
                edges += len(part)
                if edges > MOST_EDGES:
                    raise RuntimeError(
                        f"more than {MOST_EDGES:,} pairs of prompts are at least {least / UNITS} alike: too many to keep; ask for a "
                        "higher similarity or a smaller max_group_size, or group parts of the prompts"
                    )
        self.num_edges += edges
        return parts


def _equal_vectors(grid: np.ndarray, max_group_size: int) -> list[tuple[int, int, int]]:
    """Merges that fill whole groups with rows that are equal, in their order; what is left of them goes its way."""
    weights = np.random.default_rng(0).integers(1, 2**63, grid.shape[1], dtype=np.int64)
    digests = np.concatenate([grid[begin : begin + 4096].astype(np.int64) @ weights for begin in range(0, len(grid), 4096)])
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.diff(digests[order], prepend=digests[order[0]] - 1))
    merges: list[tuple[int, int, int]] = []
    for begin, end in pairwise([*starts.tolist(), len(order)]):
        if end - begin < max_group_size:
            continue
        alike: dict[bytes, list[int]] = {}
        for node in order[begin:end].tolist():
            alike.setdefault(grid[node].tobytes(), []).append(node)
        for same in alike.values():
            for first in range(0, len(same) - max_group_size + 1, max_group_size):
                merges += [(same[first], node, UNITS) for node in same[first + 1 : first + max_group_size]]
    return merges


def _full(merges: list[list[int]], max_group_size: int) -> set[int]:
    """The nodes of the clusters that have reached the cap."""
    members: dict[int, list[int]] = {}
    for kept, gone, _ in merges:
        members.setdefault(kept, [kept]).extend(members.pop(gone, [gone]))
    return {node for nodes in members.values() if len(nodes) == max_group_size for node in nodes}


def _grown(names: list[int], merges: list) -> list[Group]:
    """The groups that merges of nodes make; node i is called names[i]."""
    clusters = {node: Group([name], []) for node, name in enumerate(names)}
    for kept, gone, height in merges:
        other = clusters.pop(gone)
        cluster = clusters[kept]
        cluster.merges.extend([*other.merges, (names[kept], names[gone], height)])
        cluster.members.extend(other.members)
    return list(clusters.values())
