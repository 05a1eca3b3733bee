"""What a denoiser row must be worth for a node of a tree to be split at a call.

The prices are the isotonic regression of the gains: of all numbers that never rise from a parent to its child, those nearest to the
gains in the mean square. Cut at any price, they give the splits that gain most after paying this price for each, where a node can
be split only where its parent is. From the leaves up each node pools with the blocks below it, the one of greatest mean first,
while that mean is above its own.
"""

from heapq import heappop, heappush

import numpy as np

from sage_kernels import grouping

__all__ = ["split_prices", "split_prices_python"]


def split_prices(parents: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """The price below which each node is split at each call.

    Args:
        parents: int32 [n]; the number of each node's parent, greater than its own, or -1.
        gains: float64 [n, S], finite; what splitting the node at the call gains by itself.

    Returns:
        float64 [n, S]: no price exceeds the parent's, and if no gain falls from a call to the next, no price does. All nodes of a
        block have the very same price. Calls do not depend on each other.
    """
    parents, gains = np.ascontiguousarray(parents, np.int32), np.ascontiguousarray(gains, np.float64)
    if parents.ndim != 1 or gains.ndim != 2 or len(parents) != len(gains):
        raise ValueError(f"split_prices: wanted parents [n] and gains [n, S], got {list(parents.shape)} and {list(gains.shape)}")
    below = np.arange(len(parents))
    if ((parents != -1) & ((parents <= below) | (parents >= len(parents)))).any():
        raise ValueError("split_prices: parents must be -1 or greater than the node's own number and below n")
    return (split_prices_python if grouping.core is None else grouping.core.split_prices)(parents, gains)


def split_prices_python(parents: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """`split_prices` where no compiler was."""
    if len(parents):
        columns = [_pooled(parents.tolist(), gains[:, call].tolist()) for call in range(gains.shape[1])]
        return np.array(columns, dtype=np.float64).reshape(gains.shape[::-1]).T.copy()
    return np.zeros_like(gains)


def _pooled(parents: list[int], total: list[float]) -> list[float]:
    """The prices of one call; `total`, the gains, is overwritten."""
    mean, count, into = list(total), [1] * len(parents), list(range(len(parents)))
    below: list[list[tuple[float, int]]] = [[] for _ in parents]  # heaps of (−mean, block); a block is called by its top node
    for node, parent in enumerate(parents):
        heap = below[node]
        while heap and -heap[0][0] > mean[node]:
            _, block = heappop(heap)
            into[block] = node
            total[node] += total[block]
            count[node] += count[block]
            mean[node] = total[node] / count[node]
            heap = _melded(heap, below[block])
        below[node] = heap
        if parent >= 0:
            heappush(below[parent], (-mean[node], node))
    for node in reversed(range(len(parents))):
        mean[node] = mean[into[node]]
    return mean


def _melded(one: list[tuple[float, int]], other: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """One heap of two; the longer is overwritten."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    for block in shorter:
        heappush(longer, block)
    return longer
