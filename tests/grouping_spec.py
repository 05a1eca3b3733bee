"""What grouping is, written plainly: dense NumPy, n × n. Imports nothing of the package."""

import numpy as np

GRID, UNITS = 2.0**25, 1_000_000
APART = -2 * UNITS


def on_grid(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors in whole multiples of 2⁻²⁵."""
    rows = np.asarray(vectors, dtype=np.float64)
    rows = rows / np.abs(rows).max(axis=1, keepdims=True)
    return np.rint(rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True)) * GRID).astype(np.int64)


def similarities(vectors: np.ndarray) -> np.ndarray:
    """[n, n] in millionths, from exact integer products over the vectors' lengths on the grid."""
    grid = on_grid(vectors)
    products = grid @ grid.T
    squares = products.diagonal().astype(np.float64)
    return np.rint(products.astype(np.float64) * UNITS / np.sqrt(squares[:, None] * squares)).astype(np.int64)


def merges(vectors: np.ndarray, keys: list[str], similarity: float, max_size: int) -> list[tuple[list[int], list[int], int]]:
    """Complete linkage: (kept cluster, other cluster, similarity of their least similar pair), in order.

    First, equal vectors fill whole groups in the order of their keys; then again and again the two clusters whose least similar
    pair is most similar are joined, ties to the cluster with the first member, then to the other with the first.
    """
    grid, alike, least = on_grid(vectors), similarities(vectors), round(similarity * UNITS)
    order = sorted(range(len(keys)), key=lambda i: (keys[i], grid[i].astype(np.int32).tobytes()))
    clusters, found = [[i] for i in order], []
    if max_size == 1:
        return found
    for first in range(len(order)):
        same = [i for i in order if (grid[i] == grid[order[first]]).all()]
        if same[0] == order[first]:
            for begin in range(0, len(same) - max_size + 1, max_size):
                full = same[begin : begin + max_size]
                found += [(full[:k], [full[k]], int(alike[full[0], full[0]])) for k in range(1, max_size)]
                clusters = [c for c in clusters if c[0] not in full]
    while True:
        joins = []
        for a, one in enumerate(clusters):
            for b in range(a + 1, len(clusters)):
                if len(one) + len(clusters[b]) <= max_size:
                    joins.append((-int(alike[np.ix_(one, clusters[b])].min()), a, b))
        if not joins or -min(joins)[0] < least:
            return found
        height, a, b = min(joins)
        found.append((list(clusters[a]), list(clusters[b]), -height))
        clusters[a] = clusters[a] + clusters.pop(b)


def groups(vectors: np.ndarray, keys: list[str], similarity: float, max_size: int) -> list[tuple[int, ...]]:
    """The partition that the merges end in: ascending indices, in the order of the first."""
    cluster_of = {i: (i,) for i in range(len(keys))}
    for kept, other, _ in merges(vectors, keys, similarity, max_size):
        joint = tuple(sorted(kept + other))
        cluster_of.update(dict.fromkeys(joint, joint))
    return sorted(set(cluster_of.values()))
