"""Which prompts are alike enough to share: groups, and the plans made of them.

Prompts are grouped by the cosine similarity of their embeddings. A group is a clique: every two of its prompts are at
least `similarity` alike. Groups come from complete-linkage clustering with a size cap: again and again the two
clusters whose least similar pair is most similar are joined, as long as that pair reaches `similarity` and the joint
size the cap. When no two groups can be joined any more the groups are maximal.

The outcome depends on the set of prompts alone, never on their order or on the machine. Normalised embeddings are
rounded to multiples of 2⁻²⁵; their products are then integers below 2⁵³ in units of 2⁻⁵⁰, which float64 adds exactly
in any order, threads or not. Similarities are those sums rounded to six decimals: what differs by less is a tie, and
ties go by text.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sage.embed import Embeddings
from sage.plan import Leaf, Node, SharingPlan
from sage.plan_checks import fraction, integer, short, texts, threshold

__all__ = ["group", "medoid", "plan_prompts", "similarity_matrix", "tree_plan"]

UNITS = 1_000_000  # similarities are integers in millionths
APART = -2 * UNITS  # below every similarity: these two clusters must not be joined
GRID = 2.0**25  # see the module docstring; a product of two such rows is at most 2⁵⁰ and a little
BLOCK = 1024  # rows of the similarity matrix computed at once


def group(
    embeddings: np.ndarray, keys: Sequence[str], similarity: float = 0.6, max_size: int = 8
) -> list[tuple[int, ...]]:
    """Part prompts into groups in which every two are at least `similarity` alike.

    **Deterministic and independent of the order of the input.**

    Args:
        embeddings: [n, d], n ≥ 1, any floating dtype; finite, no row all zero, of any length.
        keys: n texts, the prompts; they settle ties.
        similarity: least cosine similarity of any two members, in (−1, 1], compared to six decimals.
        max_size: most members of a group, ≥ 1.

    Returns:
        Groups as ascending input indices, a partition of all n, in the order of their first member. No two of them
        could be joined within `similarity` and `max_size`.

    Notes:
        Holds an n × n matrix of 4-byte integers; time grows with n² as long as few prompts tie.
    """
    clusters = _cluster(embeddings, keys, similarity, integer(max_size, "group: max_size", 1))
    return sorted(tuple(sorted(members)) for members, _ in clusters)


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
    total = _similarities(_on_grid(rows, "medoid: embeddings")).sum(axis=1, dtype=np.int64)
    best = min(range(len(members)), key=lambda i: (-total[i], keys[members[i]], rows[i].tobytes()))
    return members[best]


def similarity_matrix(embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarities as grouping sees them: float64 [n, n], six decimals."""
    return _similarities(_on_grid(embeddings, "similarity_matrix: embeddings")) / UNITS


def plan_prompts(
    prompts: Sequence[str],
    embeddings: "np.ndarray | Embeddings",
    *,
    share: float = 0.4,
    similarity: float = 0.6,
    max_group_size: int = 8,
    images_per_prompt: int = 1,
    seeds: Sequence[int] | None = None,
    alone: Sequence[bool] | None = None,
    encoder_name: str = "",
) -> SharingPlan:
    """The flat plan for prompts: groups share a fraction of the calls, then every image goes on alone.

    A prompt given n times is one prompt with n images per `images_per_prompt`: images of one prompt do not share, as
    they would come out equal. Image index k of each prompt of a group shares trunk k, and the medoid of the prompts
    that have an image k represents it.

    Args:
        prompts: n texts, at least one.
        embeddings: [n, d], or what `embed_prompts` returned, which then also says `alone` and `encoder_name`. Rows of
            equal prompts must be equal.
        share: fraction of the calls that a group shares, in [0, 1]; 0: none, 1: all, and then its images are equal.
        similarity: least cosine similarity of two members of a group, in (−1, 1].
        max_group_size: most prompts in a group.
        images_per_prompt: images made of each of the n prompts.
        seeds: one per image, in the order of the leaves; None leaves them open.
        alone: bool [n]; prompts that must not be grouped.
        encoder_name: for the record.

    Returns:
        SharingPlan: leaves in the order of the prompts, the images of each prompt together.
    """
    share = fraction(share, "plan_prompts: share")
    return _plan(_Request("plan_prompts", prompts, embeddings, images_per_prompt, seeds, alone, encoder_name),
                 similarity, max_group_size, lambda height: share)


def tree_plan(
    prompts: Sequence[str],
    embeddings: "np.ndarray | Embeddings",
    *,
    share: tuple[float, float] = (0.2, 0.6),
    similarity: float = 0.6,
    max_group_size: int = 8,
    images_per_prompt: int = 1,
    seeds: Sequence[int] | None = None,
    alone: Sequence[bool] | None = None,
    encoder_name: str = "",
) -> SharingPlan:
    """The tree plan for prompts: inside a group, the less alike, the earlier they part.

    Groups are those of `plan_prompts`. A node of a group's complete-linkage dendrogram shares until

        until(h) = low + (high − low) · (h − similarity) / (1 − similarity)

    h the cosine similarity of its least similar pair of prompts, with or without an image of the index in question.
    Nodes that would part at the same time as their parent are
    joined with it, so `share=(s, s)` is the flat plan of share s.

    Args:
        share: (low, high), the shares of pairs just at `similarity` and of equal ones, 0 ≤ low ≤ high ≤ 1.

    The other arguments and the result are those of `plan_prompts`.
    """
    if not isinstance(share, (tuple, list)) or len(share) != 2:
        raise ValueError(f"tree_plan: share must be two numbers (low, high), got {share!r}")
    low, high = (fraction(value, f"tree_plan: share[{number}]") for number, value in enumerate(share))
    if low > high:
        raise ValueError(f"tree_plan: share must be (low, high) with low <= high, got ({low}, {high})")
    least = _millionths(similarity, "tree_plan: similarity")

    def until(height: int) -> float:
        return low + (high - low) * ((height - least) / (UNITS - least) if least < UNITS else 1.0)

    return _plan(_Request("tree_plan", prompts, embeddings, images_per_prompt, seeds, alone, encoder_name),
                 similarity, max_group_size, until)


def _cluster(embeddings, keys, similarity, max_size) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """Groups, each with its dendrogram: merges (a, b, height) of the clusters that hold inputs a and b, in order."""
    keys = texts(keys, "group: keys")
    least = _millionths(similarity, "group: similarity")
    grid = _on_grid(embeddings, "group: embeddings", len(keys))
    order = sorted(range(len(keys)), key=lambda i: (keys[i], grid[i].tobytes()))
    linkage = _similarities(grid[order])
    linkage[linkage < least] = APART
    clusters = {i: ([order[i]], []) for i in range(len(order))}
    for i, j, height in _merges(linkage, max_size):
        members, merges = clusters[i]
        other_members, other_merges = clusters.pop(j)
        merges += [*other_merges, (members[0], other_members[0], height)]
        members += other_members
    return list(clusters.values())


def _merges(linkage: np.ndarray, max_size: int) -> list[tuple[int, int, int]]:
    """Complete-linkage merges (i, j, height), i < j, highest first; the joint cluster goes on as i.

    Args:
        linkage: int32 [n, n], symmetric, APART where two must not meet. Overwritten: the entry of two clusters is
            the similarity of their least similar pair.
    """
    merges: list[tuple[int, int, int]] = []
    sizes = np.ones(len(linkage), dtype=np.int64)
    np.fill_diagonal(linkage, APART)
    if max_size == 1:
        return merges
    nearest = linkage.argmax(axis=1)
    best = linkage.max(axis=1)
    while True:
        i = int(best.argmax())
        if best[i] == APART:
            return merges
        j = int(linkage[i].argmax())  # the first of the best, so ties go by canonical order
        merges.append((i, j, int(best[i])))
        sizes[i] += sizes[j]
        joint = np.minimum(linkage[i], linkage[j])
        joint[sizes + sizes[i] > max_size] = APART
        joint[[i, j]] = APART
        linkage[i] = linkage[:, i] = joint
        linkage[j] = linkage[:, j] = best[j] = APART
        # Entries only ever fall, so a row's maximum can move only if it was held by i or j and fell.
        nearest[nearest == j] = i
        stale = (nearest == i) & (joint < best)
        stale[i] = True
        rows = np.flatnonzero(stale)
        nearest[rows] = linkage[rows].argmax(axis=1)
        best[rows] = linkage[rows, nearest[rows]]


def _on_grid(embeddings: Any, name: str, num_rows: int | None = None) -> np.ndarray:
    """Normalised rows in whole multiples of 2⁻²⁵: float64 [n, d] of integers. A row depends on nothing but itself."""
    rows = np.asarray(embeddings)
    if rows.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be numbers, got dtype {rows.dtype}")
    wanted = "[n, d]" if num_rows is None else f"[{num_rows}, d]"
    if rows.ndim != 2 or 0 in rows.shape or (num_rows is not None and len(rows) != num_rows):
        raise ValueError(f"{name} must be {wanted} with n ≥ 1 and d ≥ 1, one row per prompt, got {list(rows.shape)}")
    rows = np.ascontiguousarray(rows, dtype=np.float64)
    _refuse_rows(~np.isfinite(rows).all(axis=1), f"{name} must be finite, but rows {{}} hold NaN or infinity")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    _refuse_rows(largest[:, 0] == 0, f"{name} must not be zero, but rows {{}} are; such prompts have no direction")
    rows = rows / largest  # no overflow in the squares
    return np.rint(rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True)) * GRID)


def _millionths(similarity: Any, name: str) -> int:
    """A threshold in the units that similarities are compared in."""
    return round(threshold(similarity, name) * UNITS)


def _similarities(grid: np.ndarray) -> np.ndarray:
    """int32 [n, n]: cosine similarities in millionths, exact sums rounded once."""
    similarities = np.empty((len(grid), len(grid)), dtype=np.int32)
    for first in range(0, len(grid), BLOCK):
        similarities[first : first + BLOCK] = np.rint(grid[first : first + BLOCK] @ grid.T * (UNITS / GRID**2))
    return similarities


def _refuse_rows(bad: np.ndarray, message: str) -> None:
    if bad.any():
        raise ValueError(message.format(short(np.flatnonzero(bad).tolist())))



class _Request:
    """The checked arguments of a plan: distinct prompts with their vectors, and the leaves made of them."""

    def __init__(self, op, prompts, embeddings, images_per_prompt, seeds, alone, encoder_name):
        prompts = texts(prompts, f"{op}: prompts")
        if isinstance(embeddings, Embeddings):
            alone = embeddings.unknown if alone is None else alone
            encoder_name = encoder_name or embeddings.encoder
            embeddings = embeddings.vectors
        alone = np.zeros(len(prompts), bool) if alone is None else np.asarray(alone)
        if alone.shape != (len(prompts),) or alone.dtype != bool:
            raise ValueError(f"{op}: alone must be bool [{len(prompts)}], one per prompt, got {alone.dtype} "
                             f"{list(alone.shape)}")
        vectors = np.asarray(embeddings)
        if vectors.ndim != 2 or len(vectors) != len(prompts):
            raise ValueError(f"{op}: embeddings must be [{len(prompts)}, d], one row per prompt, got "
                             f"{list(vectors.shape)}")
        positions = defaultdict(list)
        for position, prompt in enumerate(prompts):
            positions[prompt].append(position)
        self.op, self.encoder_name = op, encoder_name
        self.leaves = _leaves(op, prompts, integer(images_per_prompt, f"{op}: images_per_prompt", 1), seeds)
        self.alone = {prompt for prompt, places in positions.items() if alone[places].any()}
        self.prompts = [prompt for prompt in positions if prompt not in self.alone]
        self.vectors = [_one_vector(op, prompt, vectors[positions[prompt]]) for prompt in self.prompts]


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


@dataclass
class _Part:
    """A cluster while a tree grows from its leaves towards the root."""

    prompts: list[int]  # every prompt of the cluster
    present: list[int]  # those that have the image the tree is for
    until: float = 1.0
    children: list[Node] = field(default_factory=list)


class _Trees:
    """Grows, out of a group's merges, the tree over one image of each of its prompts."""

    def __init__(self, request: _Request, until: Callable[[int], float]):
        self.keys, self.vectors, self.until = request.prompts, np.array(request.vectors), until
        self.leaf_of = {(leaf.prompt, leaf.image_index): number for number, leaf in enumerate(request.leaves)}
        self.medoids: dict[tuple[int, ...], int] = {}  # the same for every image that all prompts have

    def tree(self, members: list[int], merges: list[tuple[int, int, int]], image: int) -> Node | None:
        """The root over image `image` of the members; None when no member has one."""
        present = {member: [member] if (self.keys[member], image) in self.leaf_of else [] for member in members}
        part_of = {member: _Part([member], present[member]) for member in members}
        for a, b, height in merges:
            joint = self._join(part_of[a], part_of[b], self.until(height), image)
            part_of.update(dict.fromkeys(joint.prompts, joint))
        root = part_of[members[0]]
        return self._node(root, image) if root.present else None

    def _join(self, a: _Part, b: _Part, until: float, image: int) -> _Part:
        joint = _Part(a.prompts + b.prompts, a.present + b.present, until)
        if not a.present or not b.present:  # nothing to join: the other side stays what it is
            side = a if a.present else b
            joint.until, joint.children = side.until, side.children
            return joint
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


def _plan(request: _Request, similarity: float, max_group_size: int, until: Callable[[int], float]) -> SharingPlan:
    """Cluster the distinct prompts, and for each group and image index grow a tree; everyone else runs alone."""
    max_group_size = integer(max_group_size, f"{request.op}: max_group_size", 1)
    _millionths(similarity, f"{request.op}: similarity")  # even when nobody is to be grouped
    trees = _Trees(request, until)
    groups = _cluster(trees.vectors, request.prompts, similarity, max_group_size) if request.prompts else []
    images = max(leaf.image_index for leaf in request.leaves) + 1
    roots = [trees.tree(*group, image) for group in groups for image in range(images)]
    roots = [root for root in roots if root is not None]
    return SharingPlan.tree(request.leaves, roots, encoder=request.encoder_name, similarity=similarity)
