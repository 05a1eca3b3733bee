"""Every way to split the dendrograms of some groups, node by node and call by call, and which of them pay most."""

import math
from collections.abc import Iterator

import numpy as np

from sage.grouping import Group
from sage.loss import LossTable
from sage.plan import Node
from sage.similarity import similarity_matrix
from sage.trees import Trees, sides
from sage_kernels.grouping import UNITS
from sage_kernels.prices import split_prices

EXACT = 28  # losses are whole multiples of the largest over about 2²⁸, so that millions of them add without rounding


class Dendrogram:
    """One image of a group: the merges that join two prompts which have such an image, in their order.

    Attributes:
        merge_of: the number of each node's merge.
        parents, sizes, heights: parent node or -1; pictures; similarity of the least similar pair in millionths.
    """

    def __init__(self, group: Group, image: int, trees: Trees):
        members, merges = self.members, self.merges = group
        self.image = image
        self.merge_of, self.parents, self.sizes, self.heights = [], [], [], []
        present = set(trees.present(members, image))
        alike = None  # as of the merges, if all prompts are there
        if 1 < len(present) < len(members):
            alike = np.rint(similarity_matrix(trees.vectors[members]) * UNITS).astype(np.int64)
        inside = [[place] if member in present else [] for place, member in enumerate(members)]
        node_of = [-1] * len(members)
        for number, (left, right) in enumerate(sides(members, merges)):
            joint = inside[left] + inside[right]
            inside.append(joint)
            if inside[left] and inside[right]:
                height = merges[number][2] if alike is None else int(alike[np.ix_(joint, joint)].min())
                node_of.append(self._node(number, len(joint), height, node_of[left], node_of[right]))
            else:
                node_of.append(node_of[left] if inside[left] else node_of[right])

    def _node(self, merge: int, size: int, height: int, *children: int) -> int:
        node = len(self.parents)
        for child in children:
            if child >= 0:
                self.parents[child] = node
        self.merge_of.append(merge)
        self.parents.append(-1)
        self.sizes.append(size)
        self.heights.append(height)
        return node


class Forest:
    """The trees of all images of some groups, by their first prompt in the order of texts, then by image.

    Attributes:
        parents: int32 [n], a later node or -1, over the n nodes of all trees.
        sizes, heights: int64 [n]; see `Dendrogram`.
        start, length: int64 [n], the first node of a node's tree and the number of its nodes.
    """

    def __init__(self, trees: Trees, groups: list[Group], images: int):
        self._trees = trees
        groups = sorted(groups, key=lambda group: min(trees.keys[member] for member in group.members))
        grown = [Dendrogram(group, image, trees) for group in groups if len(group.members) > 1 for image in range(images)]
        self.trees = [tree for tree in grown if tree.parents]
        lengths = np.array([len(tree.parents) for tree in self.trees], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        self.start, self.length = np.repeat(starts, lengths), np.repeat(lengths, lengths)
        self.parents = np.array([parent for tree in self.trees for parent in tree.parents], dtype=np.int32)
        self.parents[self.parents >= 0] += self.start[self.parents >= 0].astype(np.int32)
        self.sizes = np.array([size for tree in self.trees for size in tree.sizes], dtype=np.int64)
        self.heights = np.array([height for tree in self.trees for height in tree.heights], dtype=np.int64)

    def roots(self, untils: np.ndarray) -> Iterator[Node]:
        """The roots of a plan in which node v runs as one row until untils[v]; pictures that share with nobody may be missing."""
        nodes = iter(untils.tolist())
        for tree in self.trees:
            of_merge = dict(zip(tree.merge_of, nodes))
            root = self._trees.tree(tree.members, tree.merges, [of_merge.get(k, 1.0) for k in range(len(tree.merges))], tree.image)
            yield from root.children if root.until == 0.0 else [root]


class Splits:
    """All splits of a forest's n nodes at the first m of S calls, most precious first; from call m on all are split.

    Equal prices go by tree, then later calls first, then parents first. So the first splits of the list, however many, are a plan:
    a node that is split stays so, and its parent is split with it.

    Attributes:
        most: n · m, the number of splits.
        prices: float64 [n · m], falling, in units of the loss.
    """

    def __init__(self, forest: Forest, loss: LossTable, num_calls: int, shared_calls: int):
        n, m = len(forest.parents), shared_calls
        self.most, self._shape = n * m, (n, m)
        self._unit = 2.0 ** (math.frexp(float(loss.loss.max()) * num_calls)[1] - EXACT)
        lost = self._lost(forest, loss, num_calls)
        below = np.flatnonzero(forest.parents >= 0)
        gains = lost.copy()
        np.subtract.at(gains, forest.parents[below], lost[below])
        self._unsplit = float(lost[forest.parents < 0].sum())  # what is lost before the first split
        self._scale = num_calls  # losses are of a call, times S
        prices = np.maximum.accumulate(split_prices(forest.parents, gains), axis=1)  # rounding could let them fall
        calls_left, nodes_left = np.arange(m)[::-1], forest.start + forest.length - 1 - np.arange(n)
        place = (forest.start * m + nodes_left)[:, None] + calls_left * forest.length[:, None]
        in_place, node_of = np.empty(n * m), np.empty(n * m, dtype=np.int64)
        in_place[place], node_of[place] = prices, np.arange(n)[:, None]
        order = np.argsort(-in_place, kind="stable")
        self.prices, self._nodes = in_place[order] * self._unit, node_of[order]
        in_place[place] = gains
        self._gains = in_place[order]

    def _lost(self, forest: Forest, loss: LossTable, num_calls: int) -> np.ndarray:
        """float64 [n, m]: what the pictures of a node lose if it runs through a call as one row, times S, in whole units."""
        edges = np.arange(self._shape[1] + 1) / num_calls
        per_picture = np.diff(loss(forest.heights[:, None] / UNITS, edges), axis=1) * (num_calls / self._unit)
        return forest.sizes[:, None] * np.rint(np.maximum(per_picture, 0.0))

    def dearer_than(self, price: float) -> int:
        """How many splits have a price above this one."""
        return int(np.count_nonzero(self.prices > price))

    def losing_at_most(self, loss: float) -> int:
        """The fewest splits after which all pictures together lose no more than this, but for rounding."""
        remaining = self._unsplit - np.cumsum(np.concatenate([[0.0], self._gains]))
        rounding = self.most  # a node rounds by less than a unit for each picture and call
        return min(int(np.count_nonzero(remaining > loss * self._scale / self._unit + rounding)), self.most)

    def shared(self, count: int) -> np.ndarray:
        """int64 [n]: how many calls each node runs as one row after the first `count` splits."""
        return self._shape[1] - np.bincount(self._nodes[:count], minlength=self._shape[0])
