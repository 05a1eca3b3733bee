"""A run of the native loop, call by call: everything that `branch_step` is told, on the device before the loop starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sage.plan import ResolvedPlan, SharingPlan
from sage.rows import PlanRows, Rows
from sage_kernels import CoefficientTable
from sage_kernels.coefficients import PARTED, PARTING, branch_rows

BRANCH_DRAWS = 1 << 30  # added to a call's number in the counter of branch noise: no solver's own draw has so large a call
HOW = ("mean", "representative")  # what a node's guidance and negative conditions are, of its members'


class State(NamedTuple):
    """What goes from call to call, a row per node; an older part of the history may still have fewer."""

    sample: torch.Tensor  # [R, ...]
    model_input: torch.Tensor | None  # [k·R, ...]; None after the last call
    history: tuple[torch.Tensor, ...] = ()  # m1, m2, m3, ...: what the solver stored, newest first
    last_sample: torch.Tensor | None = None  # [R, ...]


class Parting(NamedTuple):
    """A root of the plan that parts after a call, and where its state is then."""

    root: int  # index into the plan's roots
    row: int  # output row of the call
    history: list[int]  # the rows of m1, m2, m3 as they are after the call


class Guidance:
    """The guidance scale of every node at every call.

    Args:
        scales: float64 [S, B], of every leaf at every call.
        how: "mean" or "representative": a node has its members' mean, or its representative's.
    """

    def __init__(self, scales: np.ndarray, how: str):
        self._scales, self._how = scales, how

    def at(self, s: int, rows: Rows) -> np.ndarray:
        """float64 [R_s]"""
        if self._how == "representative":
            return self._scales[s][rows.representatives.numpy()]
        labels = rows.labels.numpy()
        return np.bincount(labels, weights=self._scales[s]) / np.bincount(labels)


class Call:
    """One denoiser call and the `branch_step` after it. Output rows are the nodes of the next call (the leaves, after the last).

    A row draws its noise, and takes its table row, as its parent node does: children of one node part by their conditions
    alone. Under branch noise they take `branch_rows`, and noise of their own.

    Attributes:
        row: of the table.
        number: of the call, from the table's first.
        rows: the nodes that the denoiser is called for.
        parent, history_parent, step, guidance, seed, draw, model_input: see `branch_step` (there `call` for `draw`), [R_{s+1}];
            `history_parent` has one for all that the state keeps.
        representative: int32 [R_{s+1}], the leaf whose noise each output row uses.
        partings: the roots that part after it.
    """

    def __init__(self, schedule: Schedule, s: int, parent: np.ndarray, ancestors: Sequence[np.ndarray], kinds: np.ndarray):
        plan, device = schedule.plan, schedule.device
        representative, parts = plan.representatives(s)[parent], kinds & PARTING != 0
        if parts.any():
            representative = np.where(parts, plan.representatives(s + 1), representative)
        ints = dict(dtype=torch.int32, device=device)
        self.row, self.rows = schedule.first + s, schedule.partitions.at(s)
        self.number = self.row - first_call(schedule.table)
        self.parent = torch.tensor(parent, **ints)
        self.history_parent = tuple(torch.tensor(index, **ints) for index in ancestors)
        self.representative = torch.tensor(representative, **ints)
        self.step = torch.tensor(self.row + len(schedule.table) * kinds, **ints)
        guidance, seeds = schedule.guidance, schedule.seeds
        scales = None if guidance is None else guidance.at(s, self.rows)[parent]
        self.guidance = None if scales is None else torch.tensor(scales, dtype=torch.float32, device=device)
        self.seed = None if seeds is None else seeds[torch.from_numpy(np.array(representative))].to(device)
        self.draw = None if seeds is None else torch.tensor(self.row + BRANCH_DRAWS * parts, **ints)
        self.model_input = None if s == plan.num_calls - 1 else "single" if guidance is None else "double"
        self.partings: list[Parting] = []


class Schedule:
    """The calls of one run.

    Args:
        plan: over B leaves; resolved on the calls from `first` on.
        table: one row per call.
        first: the table row of the first call that runs; the table's own first unless the leaves join a trunk.
        guidance: None: the denoiser is called for one row per node.
        seeds: int64 [B]; None: no Philox noise.
        branching: rows that part take the kinds of `branch_rows`; otherwise all take kind 0.
        back: r, calls that the rows which part are taken back by; see `sage.step_back`.

    Attributes:
        kept: how many stored samples the state keeps: the solver's m1, m2, ..., and r older ones for a step back.
        leaves_plan: the plan as given.
        boundaries: bool [S], whether a group may part after each call.
        plan: the plan in denoiser calls; as it has become, where a probe parts groups early.
        calls: a `Call` for each.
    """

    def __init__(
        self,
        plan: SharingPlan,
        table: CoefficientTable,
        first: int,
        guidance: Guidance | None,
        seeds: torch.Tensor | None,
        branching: bool,
        device: torch.device,
        back: int = 0,
    ):
        self.leaves_plan, self.boundaries = plan, [bool(stage == 0) for stage in table.stage[first:]]
        self.table, self.first, self.guidance, self.seeds, self.device = table, first, guidance, seeds, device
        self.back, self.kept, self._branching = back, table.history + back if table.history else 0, branching
        self.calls: list[Call] = []
        self.follow(plan.resolve(len(table) - first, self.boundaries), 0)

    def follow(self, plan: ResolvedPlan, begin: int) -> None:
        """Make the calls from `begin` on by another plan, which is the one so far in the calls before."""
        self.plan, self.partitions = plan, PlanRows(plan)
        partings, first = _partings(self.leaves_plan, plan), self.first
        stored = min(first - first_call(self.table), self.table.history)  # m1, m2, ... that a trunk brings, a row per node
        ancestors = [np.arange(plan.rows[0])] * max(stored - 1, 0)
        del self.calls[begin:]
        for s in range(plan.num_calls):
            parent = _parent(plan, s)
            # m1 has the rows that the state has now, m2 those of a call earlier: one more generation back.
            ancestors = [parent, *(index[parent] for index in ancestors)][: min(stored + s, self.kept)]
            if s >= begin:
                kinds = kinds_of_rows(plan, s) if self._branching else np.zeros_like(parent)
                self.calls.append(Call(self, s, parent, ancestors, kinds))
                for root, row in partings.get(s, ()):
                    rows = [row, *(int(index[row]) for index in ancestors)][: self.table.history]
                    self.calls[s].partings.append(Parting(root, row, rows))
            if self.back and plan.branches_after(s):  # a step back leaves all of the history with a row per node
                ancestors = [np.arange(len(parent))] * len(ancestors)


def coefficient_rows(table: CoefficientTable, branch_noise: float, device: torch.device) -> torch.Tensor:
    """float32 [S, 16]; under branch noise [4·S, 16], the rows of every kind (see `branch_rows`).

    Raises:
        NotImplementedError: the solver has no rows for branch noise.
    """
    if branch_noise == 0:
        return table.tensor(device)
    return torch.from_numpy(branch_rows(table, branch_noise).astype(np.float32)).to(device)


def first_call(table: CoefficientTable) -> int:
    """The first table row that runs: those before the step that it begins at are zero."""
    return int(table.rows.any(axis=1).argmax())


def kinds_of_rows(plan: ResolvedPlan, s: int) -> np.ndarray:
    """int64 [R_{s+1}]: the kind of each output row of call s, see `branch_rows`."""
    parting = _parting(plan, s)
    parted = _parting(plan, s - 1)[_parent(plan, s)] if s > 0 else np.zeros_like(parting)
    return PARTING * parting + PARTED * parted


def _parting(plan: ResolvedPlan, s: int) -> np.ndarray:
    """int64 [R_{s+1}], 0 or 1: whether the node that each output row of call s comes from parts there."""
    parting = np.zeros_like(_parent(plan, s))
    parting[plan.parted(s)] = 1
    return parting


def _parent(plan: ResolvedPlan, s: int) -> np.ndarray:
    """int64 [R_{s+1}]: the node of call s that each row after it comes from."""
    return plan.labels(s) if s == plan.num_calls - 1 else plan.parent(s)


def _partings(plan: SharingPlan, resolved: ResolvedPlan) -> dict[int, list[tuple[int, int]]]:
    """Call → (root, output row of its first leaf) of every root that parts after it, having run as one row."""
    roots, partings = {root.members: number for number, root in enumerate(plan.roots)}, {}
    for s in range(resolved.num_calls - 1):
        if resolved.branches_after(s):
            after, labels = set(resolved.members[s + 1]), resolved.labels(s + 1)
            parted = [members for members in resolved.members[s] if members in roots and members not in after]
            partings[s] = [(roots[members], int(labels[members[0]])) for members in parted]
    return partings
