"""Which groups go into one pipeline call: as many as fill the denoiser while every group is still one row."""

from __future__ import annotations

from collections.abc import Sequence

from sage.plan import SharingPlan

MOST_PICTURES = 8  # of a call, per row that its first denoiser call may have: bounds what a call keeps of every picture


def next_pack(plan: SharingPlan, open_roots: Sequence[int], max_nodes: int, pieces: bool = True) -> list[int]:
    """Choose the next roots to run in one call: in order, whole groups, skipping those that do not fit.

    A shared trunk is one row, so `max_nodes` groups fill the denoiser at the first calls; their members, more than
    `max_nodes` as soon as the groups part, go through it in pieces (`max_rows` of `sage.enable`).

    Args:
        open_roots: indices into `plan.roots` that are still to run, at least one.
        max_nodes: the most rows of a denoiser call, guidance copies not counted.
        pieces: whether the members may go through in pieces; if not, no more pictures than `max_nodes` are chosen.

    Returns:
        Some of `open_roots`. A group that never fits (one that is larger than all pictures together may be) comes alone.
    """
    chosen: list[int] = []
    rows, pictures = max_nodes, MOST_PICTURES * max_nodes if pieces else max_nodes
    for number in open_roots:
        size, first_rows = len(plan.roots[number].members), len(plan.trunks([number]))
        if chosen and (first_rows > rows or size > pictures):
            continue
        chosen.append(number)
        rows, pictures = rows - first_rows, pictures - size
        if rows <= 0 or pictures <= 0:
            break
    return chosen
