"""Which groups go into one pipeline call, so that the denoiser is launched few times, and is full when it is.

At call s a pack of groups has R_s rows, the sum over its groups, and goes through the denoiser in ⌈R_s / max_nodes⌉ launches: only
the last of them may be partly empty. Groups of one shape fill whole launches together, in the trunk and after it. So groups are put
in order of their shape, and this order is cut into packs of at most `MOST_PICTURES` pictures per row of a launch: where the launches
of all packs together are fewest, by dynamic programming over the cuts. Packs that are no cut of this order could do with fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sage.plan import SharingPlan
from sage.plan_checks import integer, short

MOST_PICTURES = 8  # of a pack, per row that a launch may have: bounds what a call keeps of every picture
MOST_CUTS = 512  # places looked at for the beginning of a pack; beyond, cuts lie some groups apart


def packs(
    plan: SharingPlan, max_nodes: int | None, num_calls: int = 20, *, roots: Sequence[int] | None = None, pieces: bool = True
) -> list[list[int]]:
    """Part the roots of a plan into packs, each for one pipeline call.

    Args:
        max_nodes: the most rows of a denoiser launch, guidance copies not counted; None: all roots are one pack.
        num_calls: S, denoiser calls that launches are counted for; a plan resolved for another number is about as well packed.
        roots: indices into `plan.roots` that are to run; None: all.
        pieces: whether the rows of a call may go through in several launches; if not, a pack has at most `max_nodes` pictures (a
            cache in the denoiser needs all rows of a call together), and packs are as few as best-fit-decreasing makes them.

    Returns:
        Lists of roots, ascending in each; the packs in the order of their first root. With pieces, no other cut of the order of
        shapes into packs of up to MOST_PICTURES · max_nodes pictures has fewer launches; from max_nodes = 65 on, cuts are looked at
        every ⌈max_nodes / 64⌉ groups. A group that is larger than a pack may be comes alone.
    """
    chosen = np.arange(len(plan.roots)) if roots is None else _chosen(roots, len(plan.roots))
    if len(chosen) == 0:
        return []
    if max_nodes is None:
        return [chosen.tolist()]
    max_nodes = min(integer(max_nodes, "packs: max_nodes", 1), len(plan.leaves))
    sizes = np.array([len(plan.roots[root].members) for root in chosen])
    if not pieces:
        made = _best_fit(sizes, max_nodes)
    else:
        rows = _rows(plan, num_calls)[chosen]
        order = np.lexsort([*rows.T[::-1], sizes])
        made = [order[begin:end] for begin, end in _cuts(rows[order], sizes[order], max_nodes)]
    return sorted(sorted(chosen[pack].tolist()) for pack in made)


def _chosen(roots: Sequence[int], count: int) -> np.ndarray:
    """int64, ascending. Raises ValueError for what is no set of roots."""
    chosen = sorted(integer(root, "packs: roots", 0) for root in roots)
    if len(set(chosen)) < len(chosen) or (chosen and chosen[-1] >= count):
        raise ValueError(f"packs: roots must be distinct indices below {count}, got {short(chosen)}")
    return np.array(chosen, dtype=np.int64)


def launches(plan: SharingPlan, packed: Sequence[Sequence[int]], max_nodes: int, num_calls: int = 20) -> int:
    """Denoiser launches of all packs, each of at most `max_nodes` rows."""
    rows = _rows(plan, num_calls)
    return sum(int((-(-rows[list(pack)].sum(axis=0) // max_nodes)).sum()) for pack in packed)


def _rows(plan: SharingPlan, num_calls: int) -> np.ndarray:
    """int64 [roots, S]: the rows of each root at each call."""
    change = np.zeros((len(plan.roots), num_calls + 1), dtype=np.int64)
    root_of = plan.root_of
    for start, end, node in plan.intervals(num_calls):
        change[root_of[node.members[0]], [start, end]] += 1, -1
    return change.cumsum(axis=1)[:, :-1]


def _cuts(rows: np.ndarray, sizes: np.ndarray, max_nodes: int) -> list[tuple[int, int]]:
    """(begin, end) of every pack, over roots in their order: the fewest launches, then the most packs: pictures come sooner.

    Args:
        rows: [n, S].
        sizes: [n], pictures.
    """
    count, most = len(rows), MOST_PICTURES * max_nodes
    pictures = np.concatenate([[0], sizes.cumsum()])
    places = np.unique([*range(0, count, max(1, -(-most // MOST_CUTS))), count])
    wide = np.flatnonzero(np.diff(pictures[places]) > most)  # too much for a pack: cut between all of its roots
    places = np.unique(np.concatenate([places, *(np.arange(places[at], places[at + 1]) for at in wide)]))
    total = np.concatenate([np.zeros((1, rows.shape[1]), dtype=np.int64), rows.cumsum(axis=0)])[places]
    pictures = pictures[places]
    firsts = np.searchsorted(pictures, pictures - most)
    pack_bonus = 1 / (len(places) + 1)  # of all packs together less than a launch
    cost, begin = np.zeros(len(places)), np.zeros(len(places), dtype=np.int64)
    for end in range(1, len(places)):
        first = min(int(firsts[end]), end - 1)
        there = -(-(total[end] - total[first:end]) // max_nodes)
        through = cost[first:end] + there.sum(axis=1) - pack_bonus
        best = int(through.argmin())
        cost[end], begin[end] = through[best], first + best
    found, end = [], len(places) - 1
    while end > 0:
        found.append((int(places[begin[end]]), int(places[end])))
        end = int(begin[end])
    return found


def _best_fit(sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Bins of at most `most` pictures: the largest root first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for root in np.argsort(-sizes, kind="stable").tolist():
        fits = [number for number, left in enumerate(room) if left >= sizes[root]]
        if not fits:
            bins.append([])
            room.append(max(most, int(sizes[root])))
            fits = [len(bins) - 1]
        best = min(fits, key=room.__getitem__)
        bins[best].append(root)
        room[best] -= int(sizes[root])
    return [np.array(pack) for pack in bins]
