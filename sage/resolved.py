"""A sharing plan in denoiser calls: what schedulers, hooks and loops see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sage.plan_checks import integer, short

Nodes = tuple[tuple[tuple[int, ...], int], ...]  # (members, representative) of each


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan in denoiser calls: partitions P_0 … P_{S−1} of the leaves, each refining the one before.

    Row i of call s is node i of P_s; nodes are in the order of their smallest leaf.

    Args:
        num_leaves: B.
        num_calls: S.
        members: per call, per node, its leaf indices, ascending.
        node_representatives: per call, per node, the leaf whose noise the row uses.
    """

    num_leaves: int
    num_calls: int
    members: tuple[tuple[tuple[int, ...], ...], ...]
    node_representatives: tuple[tuple[int, ...], ...]

    @cached_property
    def rows(self) -> list[int]:
        """R_s of every call."""
        return [len(nodes) for nodes in self.members]

    @cached_property
    def nfe(self) -> int:
        """Denoiser rows evaluated, Σ_s R_s; guidance copies not counted."""
        return sum(self.rows)

    @property
    def nfe_independent(self) -> int:
        """Denoiser rows without sharing, B · S."""
        return self.num_leaves * self.num_calls

    @property
    def saving(self) -> float:
        """Fraction of the denoiser rows that sharing avoids."""
        return 1.0 - self.nfe / self.nfe_independent

    def labels(self, call: int) -> np.ndarray:
        """int64 [B]: the node (row) of each leaf at a call."""
        labels = np.empty(self.num_leaves, dtype=np.int64)
        for number, members in enumerate(self.members[self._call(call)]):
            labels[list(members)] = number
        return labels

    def representatives(self, call: int) -> np.ndarray:
        """int64 [R_s]: the representative leaf of each node at a call."""
        return np.array(self.node_representatives[self._call(call)], dtype=np.int64)

    def rep_of(self, call: int) -> np.ndarray:
        """int64 [B]: the representative of each leaf's node at a call."""
        return self.representatives(call)[self.labels(call)]

    def parent(self, call: int) -> np.ndarray:
        """int64 [R_{s+1}]: for each node of call s + 1, the node of call s it comes from. Needs 0 ≤ s < S − 1."""
        call = self._call(call)
        if call == self.num_calls - 1:
            raise ValueError(f"ResolvedPlan.parent: call must be below {call}, the last one, got {call}")
        first = [members[0] for members in self.members[call + 1]]
        return self.labels(call)[first]

    def parted(self, call: int) -> np.ndarray:
        """int64 [n]: the rows of call + 1 that come from a node which parts between the two; none after the last call."""
        if self._call(call) == self.num_calls - 1:
            return np.zeros(0, dtype=np.int64)
        parent = self.parent(call)
        return np.flatnonzero(np.bincount(parent)[parent] > 1)

    def rows_made(self, branch_back: int = 0) -> list[int]:
        """Rows of every denoiser call made, in order, where the rows that part step back by `branch_back` calls.

        Each call s has R_s; where nodes part after it, the last min(branch_back, s + 1) calls are then made again for `parted(s)`.
        """
        made = []
        for call, rows in enumerate(self.rows):
            made.append(rows)
            if self.branches_after(call):
                made += [len(self.parted(call))] * min(branch_back, call + 1)
        return made

    def children(self, call: int, node: int) -> Nodes:
        """The nodes that a node of a call parts into at the first later call where its leaves are in several; () if they never are."""
        if not 0 <= integer(node, "ResolvedPlan: node") < len(self.members[self._call(call)]):
            raise ValueError(f"ResolvedPlan: node must be in [0, {self.rows[call]}), the rows of call {call}, got {node}")
        leaves = list(self.members[call][node])
        for later in range(call + 1, self.num_calls):
            if self.members[later] is self.members[later - 1]:
                continue
            rows = np.unique(self.labels(later)[leaves])
            if len(rows) > 1:
                return tuple((self.members[later][row], self.node_representatives[later][row]) for row in rows)
        return ()

    def parted_before(self, call: int, nodes: Sequence[int]) -> "ResolvedPlan":
        """The plan in which some nodes of a call part before it, into their `children`, instead of later.

        All calls before it, the other nodes, and where the children themselves part, stay as they are.

        Args:
            call: in [0, S).
            nodes: rows of that call.

        Raises:
            ValueError: `call` or one of `nodes` is out of range, or one of them never parts.
        """
        parted: dict[tuple[int, ...], Nodes] = {}
        for node in nodes:
            children = self.children(call, node)
            parted[self.members[call][node]] = children
            if not children:
                raise ValueError(
                    f"ResolvedPlan.parted_before: nodes must part later, but leaves {short(self.members[call][node])} of call {call} "
                    "stay together to the last; name only nodes that have children"
                )
        members, chosen = list(self.members), list(self.node_representatives)
        known: dict[int, tuple] = {}  # id of a partition → what becomes of it: calls that have one object in common still do
        for later in range(call, self.num_calls):
            before = self.members[later]
            if id(before) not in known:
                known[id(before)] = _replaced(before, self.node_representatives[later], parted)
            members[later], chosen[later] = known[id(before)]
        return ResolvedPlan(self.num_leaves, self.num_calls, tuple(members), tuple(chosen))

    def branches_after(self, call: int) -> bool:
        """Whether rows multiply between this call and the next."""
        call = self._call(call)
        return call < self.num_calls - 1 and self.rows[call + 1] > self.rows[call]

    def branch_call(self, leaf: int) -> int:
        """The first call at which the leaf runs alone; S when it never does."""
        if not 0 <= integer(leaf, "ResolvedPlan.branch_call: leaf") < self.num_leaves:
            raise ValueError(f"ResolvedPlan.branch_call: leaf must be in [0, {self.num_leaves}), got {leaf}")
        return int(self._branch_calls[leaf])

    @cached_property
    def _branch_calls(self) -> np.ndarray:
        calls = np.full(self.num_leaves, self.num_calls, dtype=np.int64)
        for call in reversed(range(self.num_calls)):
            calls[[members[0] for members in self.members[call] if len(members) == 1]] = call
        return calls

    def _call(self, call: int) -> int:
        if not 0 <= integer(call, "ResolvedPlan: call") < self.num_calls:
            raise ValueError(f"ResolvedPlan: call must be in [0, {self.num_calls}), got {call}")
        return int(call)


def _replaced(members: tuple, representatives: tuple, parted: Mapping[tuple[int, ...], Nodes]) -> tuple[tuple, tuple]:
    """A partition (its nodes' members, their representatives) with some nodes replaced by others; the same objects if it has none."""
    if not any(node in parted for node in members):
        return members, representatives
    nodes: list = []
    for node, representative in zip(members, representatives):
        nodes += parted.get(node, [(node, representative)])
    return tuple(zip(*sorted(nodes)))
