"""Groups to plans: the checked arguments of a request, and the trees that grow from a group's merges."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sage.embed import Embeddings
from sage.grouping import Group, Groups, check_search, find_groups, medoid
from sage.plan import Leaf, Node, SharingPlan
from sage.plan_checks import integer, texts
from sage.similarity import as_numbers, in_millionths

Merges = list[tuple[int, int, int]]  # (a, b, height): the clusters that hold inputs a and b are joined, in order


class PlanRequest:
    """The checked arguments of a plan: distinct prompts with their vectors, their groups, and the leaves made of them.

    Args:
        op: the function that was called, for errors. The others are those of `plan_prompts`, and are checked even when nobody is to be
            grouped.

    Attributes:
        leaves: the requested images, those of each prompt together.
        prompts: the distinct prompts that may be grouped, in the order of their first place.
        vectors: one row for each of `prompts`.
        images: most images that a prompt has.
        groups: a partition of `prompts`, as indices into them.
    """

    def __init__(
        self, op, prompts, embeddings, similarity, max_group_size, images_per_prompt, seeds, alone, encoder_name, search, on_groups
    ):
        prompts = texts(prompts, f"{op}: prompts")
        if isinstance(embeddings, Embeddings):
            alone = embeddings.unknown if alone is None else alone
            encoder_name = encoder_name or embeddings.encoder
            embeddings = embeddings.vectors
        alone = np.zeros(len(prompts), bool) if alone is None else np.asarray(alone)
        if alone.shape != (len(prompts),) or alone.dtype != bool:
            raise ValueError(f"{op}: alone must be bool [{len(prompts)}], one per prompt, got {alone.dtype} "
                             f"{list(alone.shape)}")
        vectors = as_numbers(embeddings, f"{op}: embeddings")
        if vectors.ndim != 2 or len(vectors) != len(prompts):
            raise ValueError(f"{op}: embeddings must be [{len(prompts)}, d], one row per prompt, got "
                             f"{list(vectors.shape)}")
        positions = defaultdict(list)
        for position, prompt in enumerate(prompts):
            positions[prompt].append(position)
        self.op, self.encoder_name, self.similarity = op, encoder_name, similarity
        self.leaves = _leaves(op, prompts, integer(images_per_prompt, f"{op}: images_per_prompt", 1), seeds)
        self.images = max(leaf.image_index for leaf in self.leaves) + 1
        apart = {prompt for prompt, places in positions.items() if alone[places].any()}
        self.prompts = [prompt for prompt in positions if prompt not in apart]
        self.vectors = [_one_vector(op, prompt, vectors[positions[prompt]]) for prompt in self.prompts]
        self.groups = self._grouped(max_group_size, search, on_groups)

    def _grouped(self, max_group_size: int, search: str, on_groups: Callable[[Groups], None] | None) -> list[Group]:
        """The groups of `prompts`; `on_groups` is told how they were found."""
        in_millionths(self.similarity, f"{self.op}: similarity")
        max_group_size = integer(max_group_size, f"{self.op}: max_group_size", 1)
        check_search(self.op, search, 1.0)
        if not self.prompts:
            return []
        found = find_groups(np.array(self.vectors), self.prompts, self.similarity, max_group_size, search=search, op=self.op)
        if on_groups is not None:
            on_groups(found)
        return found.groups

    def plan(self, roots: Iterable[Node]) -> SharingPlan:
        """The plan over all leaves; those under none of the roots run alone."""
        return SharingPlan.tree(self.leaves, list(roots), encoder=self.encoder_name, similarity=self.similarity)


def _leaves(op: str, prompts: list[str], images_per_prompt: int, seeds: Any) -> list[Leaf]:
    total = len(prompts) * images_per_prompt
    if seeds is None:
        seeds = [None] * total
    elif isinstance(seeds, (str, bytes)) or not isinstance(seeds, (Sequence, np.ndarray)) or len(seeds) != total:
        got = len(seeds) if isinstance(seeds, (Sequence, np.ndarray)) else repr(seeds)
        raise ValueError(f"{op}: seeds must hold one seed per image, {total} ({len(prompts)} prompts × "
                         f"{images_per_prompt}), got {got}")
    images = defaultdict(int)
    leaves = []
    for prompt in (prompt for prompt in prompts for _ in range(images_per_prompt)):
        leaves.append(Leaf(prompt, images[prompt], seeds[len(leaves)]))
        images[prompt] += 1
    return leaves


def _one_vector(op: str, prompt: str, vectors: np.ndarray) -> np.ndarray:
    """The vector of a prompt given several times."""
    if len(vectors) > 1 and not np.allclose(vectors, vectors[0], rtol=0, atol=1e-3 * np.abs(vectors).max()):
        raise ValueError(f"{op}: embeddings of equal prompts must be equal, but those of {prompt!r} differ")
    return min(vectors, key=lambda vector: vector.tobytes())  # whichever came first


def sides(members: Sequence[int], merges: Merges) -> list[tuple[int, int]]:
    """What each merge joins: numbers below n are places in `members`, n + k is the cluster that merge k made."""
    cluster, inside = {}, []
    for place, member in enumerate(members):
        cluster[member] = place
        inside.append([member])
    joined = []
    for a, b, _ in merges:
        left, right = cluster[a], cluster[b]
        joined.append((left, right))
        cluster.update(dict.fromkeys(inside[left] + inside[right], len(inside)))
        inside.append(inside[left] + inside[right])
    return joined


@dataclass
class _Part:
    """A cluster while a tree grows from its leaves towards the root."""

    present: list[int]  # the prompts of the cluster that have the image which the tree is for
    until: float = 1.0
    children: list[Node] = field(default_factory=list)


class Trees:
    """Grows, out of a group's merges, the tree over one image of each of its prompts."""

    def __init__(self, request: PlanRequest):
        self.keys, self.vectors = request.prompts, np.array(request.vectors)
        self.leaf_of = {(leaf.prompt, leaf.image_index): number for number, leaf in enumerate(request.leaves)}
        self.medoids: dict[tuple[int, ...], int] = {}  # the same for every image that all prompts have

    def present(self, members: Sequence[int], image: int) -> list[int]:
        """The members that have an image of this number."""
        return [member for member in members if (self.keys[member], image) in self.leaf_of]

    def tree(self, members: Sequence[int], merges: Merges, untils: Sequence[float], image: int) -> Node | None:
        """The root over image `image` of the members; None when no member has one.

        Args:
            members, merges: a group; see `sage.grouping`.
            untils: until when the cluster of each merge runs as one row, never above that of a merge inside it. Clusters that
                part when their parent does are no nodes of their own.
            image: the number of the image.
        """
        present = set(self.present(members, image))
        parts = [_Part([member] if member in present else []) for member in members]
        for (left, right), until in zip(sides(members, merges), untils, strict=True):
            parts.append(self._join(parts[left], parts[right], until, image))
        return self._node(parts[-1], image) if present else None

    def _join(self, a: _Part, b: _Part, until: float, image: int) -> _Part:
        if not a.present or not b.present:  # nothing to join: the other side stays what it is
            return a if a.present else b
        joint = _Part(a.present + b.present, until)
        for side in (a, b):  # a side that parts at the same time is no node of its own
            joint.children += side.children if side.until == until else [self._node(side, image)]
        return joint

    def _node(self, part: _Part, image: int) -> Node:
        leaves = [self.leaf_of[self.keys[member], image] for member in part.present]
        if len(leaves) == 1:
            return Node.single(leaves[0])
        prompts = tuple(sorted(part.present))
        if prompts not in self.medoids:
            self.medoids[prompts] = medoid(self.vectors, prompts, self.keys)
        representative = self.leaf_of[self.keys[self.medoids[prompts]], image]
        return Node(leaves, representative, part.until, part.children if part.until < 1.0 else ())
