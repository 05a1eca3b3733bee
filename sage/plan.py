"""Which leaves run together at each denoiser call.

A `SharingPlan` says, for the images of one request, which of them share denoising and for how long. It is plain data:
it can be printed, drawn, saved as JSON and checked before any GPU time is spent. `SharingPlan.resolve` turns the
fractions of a plan into denoiser calls; the `ResolvedPlan` is all that schedulers and hooks see.

Words: a `leaf` is one requested image, a `node` a set of leaves that runs as one row, a `root` a node present at the
first call, `B` the number of leaves, `S` the number of denoiser calls, `R_s` the rows at call s. Cost is
nfe = Σ_s R_s, denoiser rows evaluated. Copies for guidance are counted separately: with classifier-free guidance
every row is evaluated twice, shared or not, so the saving is the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sage import plan_json
from sage.plan_checks import check_types, fraction, integer, items, short
from sage.resolved import ResolvedPlan

__all__ = ["Cost", "Leaf", "Node", "ResolvedPlan", "SharingPlan"]

MAX_DEPTH = 64  # deeper than any useful schedule has calls, shallow enough for every recursive visitor


@dataclass(frozen=True)
class Leaf:
    """One requested image: prompt, number among the images of that prompt, and seed (None: derived when it runs)."""

    prompt: str
    image_index: int = 0
    seed: int | None = None

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise TypeError(f"Leaf: prompt must be a str, got {self.prompt!r}")
        object.__setattr__(self, "image_index", integer(self.image_index, "Leaf: image_index", 0))
        if self.seed is not None:
            seed = integer(self.seed, "Leaf: seed")
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"Leaf: seed must fit in 64 bits, got {seed}")
            object.__setattr__(self, "seed", seed)


@dataclass(frozen=True)
class Node:
    """A set of leaves that runs as one row.

    Args:
        members: leaf indices; kept sorted.
        representative: the member whose noise the row uses. A child may have another one than its parent.
        until: fraction of the denoiser calls, counted from the first, up to which the node runs as one row.
            1.0: never parts; a single leaf always has 1.0.
        children: at least two nodes that part `members` between them, each with a larger `until`; empty exactly when
            `until` is 1. Kept in the order of their smallest leaf.
    """

    members: tuple[int, ...]
    representative: int
    until: float
    children: tuple["Node", ...] = ()

    def __post_init__(self):
        members = tuple(sorted(integer(m, "Node: members", 0) for m in items(self.members, "Node: members")))
        if not members:
            raise ValueError("Node: members must name at least one leaf, got none")
        if len(set(members)) != len(members):
            raise ValueError(f"Node: members must be distinct, got {short(members)}")
        representative = integer(self.representative, "Node: representative")
        if representative not in members:
            raise ValueError(
                f"Node: representative must be one of the members {short(members)}, got {representative}"
            )
        until = fraction(self.until, "Node: until")
        children = tuple(items(self.children, "Node: children"))
        for child in children:
            if not isinstance(child, Node):
                raise TypeError(f"Node: children must be Node, got {child!r}")
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "representative", representative)
        object.__setattr__(self, "until", until)
        object.__setattr__(self, "children", tuple(sorted(children, key=lambda child: child.members)))
        self._check_children()

    def _check_children(self) -> None:
        if not self.children:
            if self.until < 1.0 and len(self.members) == 1:
                raise ValueError(f"Node: until of a single leaf must be 1.0, got {self.until} for leaf "
                                 f"{self.members[0]}")
            if self.until < 1.0:
                raise ValueError(f"Node: until is {self.until} but there are no children to part into; add children, "
                                 f"or use until=1.0 for members {short(self.members)} that never part")
            return
        if self.until == 1.0:
            raise ValueError(f"Node: until is 1.0 (never parts), so children must be empty, got {len(self.children)}")
        if len(self.children) == 1:
            raise ValueError("Node: children must be at least two nodes, got 1; a node that does not part needs none")
        parts = sorted(m for child in self.children for m in child.members)
        if tuple(parts) != self.members:
            raise ValueError(f"Node: children must partition members {short(self.members)}, got "
                             f"{[short(child.members) for child in self.children]}")
        for child in self.children:
            if child.until <= self.until:
                raise ValueError(f"Node: until must increase down the tree, got {child.until} for child "
                                 f"{short(child.members)} of a node with {self.until}")

    @classmethod
    def single(cls, leaf: int) -> "Node":
        """The node of one leaf, which runs alone to the last call."""
        return cls((leaf,), leaf, 1.0)

    def renamed(self, names: "Mapping[int, int] | Sequence[int]") -> "Node":
        """This tree with leaf i called names[i]."""
        members = tuple(names[member] for member in self.members)
        return Node(members, names[self.representative], self.until, tuple(child.renamed(names) for child in self.children))

    def walk(self) -> Iterator[tuple["Node", int]]:
        """Every node of this tree with its depth, parents before children, children in order."""
        stack = [(self, 0)]
        while stack:
            node, depth = stack.pop()
            yield node, depth
            stack.extend((child, depth + 1) for child in reversed(node.children))


class Cost(NamedTuple):
    """Denoiser rows evaluated with and without sharing, guidance copies not counted; `saving` below 1 (and below 0 if steps back
    cost more than sharing saves)."""

    nfe: int
    nfe_independent: int
    saving: float


@dataclass(frozen=True)
class SharingPlan:
    """Which leaves share, under which representative, and for what fraction of the denoiser calls.

    Args:
        leaves: the requested images, B of them, at least one.
        roots: nodes that partition all leaves; kept in the order of their smallest leaf. A leaf that shares with
            nobody is a root of its own.
        encoder: name of what embedded the prompts, for the record; "" when nothing did.
        similarity: the least cosine similarity inside a group, for the record; None when nothing was measured.
    """

    leaves: tuple[Leaf, ...]
    roots: tuple[Node, ...]
    encoder: str = ""
    similarity: float | None = None

    def __post_init__(self):
        leaves = tuple(items(self.leaves, "SharingPlan: leaves"))
        roots = tuple(items(self.roots, "SharingPlan: roots"))
        check_types(leaves, Leaf, "leaves")
        check_types(roots, Node, "roots")
        if not leaves:
            raise ValueError("SharingPlan: leaves must hold at least one Leaf, got none")
        if not isinstance(self.encoder, str):
            raise TypeError(f"SharingPlan: encoder must be a str, got {self.encoder!r}")
        _check_partition(len(leaves), roots)
        for number, root in enumerate(roots):
            if any(depth > MAX_DEPTH for _, depth in root.walk()):
                raise ValueError(f"SharingPlan: roots[{number}] has more than {MAX_DEPTH} branches on one path")
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "roots", tuple(sorted(roots, key=lambda root: root.members)))
        if self.similarity is not None:
            object.__setattr__(self, "similarity", _similarity(self.similarity))

    @classmethod
    def flat(
        cls,
        leaves: Sequence[Leaf],
        groups: Sequence[Sequence[int]],
        share: float | Sequence[float],
        representatives: Sequence[int] | None = None,
        *,
        encoder: str = "",
        similarity: float | None = None,
    ) -> "SharingPlan":
        """Groups that run as one row for a fraction `share` of the calls, then every leaf alone.

        Args:
            leaves: the requested images.
            groups: disjoint groups of leaf indices; a leaf in no group runs alone.
            share: fraction in [0, 1], one for all groups or one per group. 0: nothing is shared. 1: never parts.
            representatives: one leaf index per group. Default: the member that is first by prompt, seed, image index.

        Returns:
            The plan; groups of one are leaves that run alone.
        """
        leaves = tuple(items(leaves, "SharingPlan.flat: leaves"))
        check_types(leaves, Leaf, "leaves")
        groups = [_group(group, number, len(leaves)) for number, group in enumerate(items(groups, "groups"))]
        shares = _per_group(share, len(groups))
        if representatives is None:
            representatives = [min(group, key=lambda index: _leaf_order(leaves[index])) for group in groups]
        elif len(items(representatives, "SharingPlan.flat: representatives")) != len(groups):
            raise ValueError(f"SharingPlan.flat: representatives must hold one leaf per group, {len(groups)}, "
                             f"got {len(representatives)}")
        roots = []
        for group, representative, until in zip(groups, representatives, shares, strict=True):
            children = tuple(map(Node.single, group)) if until < 1.0 else ()
            roots.append(Node(group, representative, until, children) if len(group) > 1 else Node.single(group[0]))
        return cls.tree(leaves, roots, encoder=encoder, similarity=similarity)

    @classmethod
    def tree(
        cls, leaves: Sequence[Leaf], roots: Sequence[Node], *, encoder: str = "", similarity: float | None = None
    ) -> "SharingPlan":
        """A plan of explicit nodes, nested as deep as wanted; a leaf in no root runs alone."""
        check_types(items(roots, "SharingPlan.tree: roots"), Node, "roots")
        named = {member for root in roots for member in root.members}
        alone = [Node.single(index) for index in range(len(leaves)) if index not in named]
        return cls(tuple(leaves), (*roots, *alone), encoder, similarity)

    @classmethod
    def independent(cls, leaves: Sequence[Leaf]) -> "SharingPlan":
        """The plan in which nobody shares."""
        return cls.tree(leaves, ())

    def subset(self, roots: Sequence[int]) -> tuple["SharingPlan", np.ndarray]:
        """The part of the plan under some of its roots, as a plan of its own (to pack groups into calls).

        Args:
            roots: indices into `self.roots`, distinct, in any order.

        Returns:
            The smaller plan, and int64 [B']: the index in `self.leaves` of each of its leaves, ascending.
        """
        chosen = [integer(root, "SharingPlan.subset: roots", 0) for root in items(roots, "SharingPlan.subset: roots")]
        if not chosen or len(set(chosen)) != len(chosen) or max(chosen) >= len(self.roots):
            raise ValueError(f"SharingPlan.subset: roots must be distinct indices below {len(self.roots)}, at least "
                             f"one, got {short(chosen)}")
        original = sorted(member for root in chosen for member in self.roots[root].members)
        renumber = {index: position for position, index in enumerate(original)}
        nodes = tuple(self.roots[root].renamed(renumber) for root in chosen)
        plan = SharingPlan(tuple(self.leaves[i] for i in original), nodes, self.encoder, self.similarity)
        return plan, np.array(original, dtype=np.int64)

    def trunks(self, roots: Sequence[int] | None = None) -> list[Node]:
        """The nodes that run first, of some roots (default: all): each root, or what it parts into before the first call."""
        chosen = self.roots if roots is None else [self.roots[root] for root in roots]
        found, stack = [], list(reversed(chosen))
        while stack:
            node = stack.pop()
            if node.until > 0:
                found.append(node)
            stack.extend(reversed(node.children if node.until == 0 else ()))
        return found

    @property
    def root_of(self) -> np.ndarray:
        """int64 [B]: index of the root (the group, or the lone leaf) that each leaf belongs to."""
        root_of = np.empty(len(self.leaves), dtype=np.int64)
        for number, root in enumerate(self.roots):
            root_of[list(root.members)] = number
        return root_of

    def resolve(self, num_calls: int, boundaries: Sequence[bool] | None = None) -> "ResolvedPlan":
        """The plan in denoiser calls.

        A node parts before call floor(until · S + 0.5). When that is inside a step of the solver, it parts at the next
        boundary. A node that parts at all (until < 1) does so before the last call at the latest, so two leaves never
        come out equal because of rounding alone. A node left no call of its own is skipped.

        Args:
            num_calls: S, calls of the denoiser (and of `scheduler.step`), which need not be the number of steps.
            boundaries: bool [S]; whether rows may multiply after each call. Default: after every call.

        Returns:
            ResolvedPlan: partitions of the leaves for S calls, each refining the one before.
        """
        intervals = sorted(self.intervals(num_calls, boundaries), key=lambda interval: interval[2].members[0])
        edges = [*sorted({start for start, _, _ in intervals}), num_calls]
        members, chosen = [], []
        for first, end in pairwise(edges):
            running = [node for start, stop, node in intervals if start <= first < stop]
            members += [tuple(node.members for node in running)] * (end - first)
            chosen += [tuple(node.representative for node in running)] * (end - first)
        return ResolvedPlan(len(self.leaves), num_calls, tuple(members), tuple(chosen))

    def intervals(self, num_calls: int, boundaries: Sequence[bool] | None = None) -> list[tuple[int, int, Node]]:
        """(first call, end, node) of every node that runs, parents first; see `resolve`."""
        num_calls = integer(num_calls, "SharingPlan.resolve: num_calls", 1)
        allowed = _branch_calls(num_calls, boundaries)
        intervals = []
        stack = [(root, 0) for root in self.roots]
        while stack:
            node, start = stack.pop()
            end = _branch_call(node.until, num_calls, allowed)
            if end > start:
                intervals.append((start, end, node))
            stack.extend((child, max(start, end)) for child in node.children)
        return intervals

    def cost(self, num_calls: int, boundaries: Sequence[bool] | None = None, branch_back: int = 0) -> Cost:
        """Denoiser rows with and without sharing for S calls, those of `branch_back` (see `sage.sample`) included."""
        resolved = self.resolve(num_calls, boundaries)
        nfe = sum(resolved.rows_made(integer(branch_back, "SharingPlan.cost: branch_back", 0)))
        return Cost(nfe, resolved.nfe_independent, 1.0 - nfe / resolved.nfe_independent)

    def describe(self, num_calls: int = 20, max_groups: int | None = None) -> str:
        """The plan as text: every group as a tree with prompts, representatives and shares, then the totals."""
        from sage.drawing import describe

        return describe(self, num_calls, max_groups)

    def plot(self, path: str | Path, num_calls: int = 20, max_leaves: int = 60) -> None:
        """Draw the plan into an image file, a lane per leaf and a cell per call. Needs matplotlib."""
        from sage.drawing import plot

        plot(self, path, num_calls, max_leaves)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        return plan_json.write(self)

    @classmethod
    def from_json(cls, text: str) -> "SharingPlan":
        """The plan that `to_json` wrote. Unknown versions and malformed text raise ValueError naming the place."""
        return plan_json.read(text)

    def save(self, path: str | Path) -> None:
        """Write `to_json` into a file, UTF-8."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SharingPlan":
        """Read a file that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _branch_calls(num_calls: int, boundaries: Sequence[bool] | None) -> np.ndarray:
    """Ascending calls before which rows may multiply: call 0, and each call after a boundary."""
    if boundaries is None:
        return np.arange(num_calls)
    allowed = np.asarray(boundaries)
    if allowed.shape != (num_calls,) or allowed.dtype != bool:
        raise ValueError(f"SharingPlan.resolve: boundaries must be bool [{num_calls}], got {allowed.dtype} "
                         f"{list(allowed.shape)}")
    return np.flatnonzero(np.concatenate([[True], allowed[:-1]]))


def _branch_call(until: float, num_calls: int, allowed: np.ndarray) -> int:
    """The call before which a node parts; S for one that never does."""
    if until == 1.0:
        return num_calls
    position = np.searchsorted(allowed, math.floor(until * num_calls + 0.5))
    return int(allowed[min(position, len(allowed) - 1)])


def _leaf_order(leaf: Leaf) -> tuple:
    return leaf.prompt, leaf.seed is not None, leaf.seed or 0, leaf.image_index


def _group(group: Any, number: int, num_leaves: int) -> tuple[int, ...]:
    """One group of `SharingPlan.flat`, checked before its representative is looked up."""
    name = f"SharingPlan.flat: groups[{number}]"
    members = tuple(integer(member, name, 0) for member in items(group, name))
    if not members or max(members) >= num_leaves:
        raise ValueError(f"{name} must hold leaf indices below {num_leaves}, at least one, got {short(members)}")
    return members


def _per_group(share: Any, num_groups: int) -> list[float]:
    if isinstance(share, (Sequence, np.ndarray)) and not isinstance(share, str) and np.ndim(share):
        if len(share) != num_groups:
            raise ValueError(f"SharingPlan.flat: share must be one number or one per group, {num_groups}, "
                             f"got {len(share)}")
        return [fraction(value, f"SharingPlan.flat: share[{number}]") for number, value in enumerate(share)]
    return [fraction(share, "SharingPlan.flat: share")] * num_groups


def _check_partition(num_leaves: int, roots: Sequence[Node]) -> None:
    owner: dict[int, int] = {}
    for number, root in enumerate(roots):
        for member in root.members:
            if member >= num_leaves:
                raise ValueError(f"SharingPlan: roots[{number}] names leaf {member}, but there are {num_leaves} leaves")
            if member in owner:
                raise ValueError(f"SharingPlan: roots must not overlap, but leaf {member} is in roots[{owner[member]}] "
                                 f"and roots[{number}]")
            owner[member] = number
    missing = [index for index in range(num_leaves) if index not in owner]
    if missing:
        raise ValueError(f"SharingPlan: roots must hold every leaf, but leaves {short(missing)} are in none")


def _similarity(value: Any) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"SharingPlan: similarity must be a number or None, got {value!r}")
    if not -1.0 <= value <= 1.0:
        raise ValueError(f"SharingPlan: similarity must be in [-1, 1], got {value}")
    return float(value)
