"""Which prompts are evaluated: read, grouped as `sage generate` groups them, and put in order, group after group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sage.planning import Grouping, embed
from sage.plans import plan_prompts
from sage.prompts import KNOWN_KEYS, InputError, PromptSet, read_prompts
from sage.seeds import leaf_seed

if TYPE_CHECKING:
    from sage.embed import Embeddings
    from sage.emoji.scenes import Scene

__all__ = ["Asked", "Source", "ask", "read_source"]


@dataclass(frozen=True)
class Source:
    """Prompts as they were read, each once.

    Args:
        prompts: with what their lines say.
        records: scenes of the embedded model's benchmark, one per prompt; None for a file.
        repeated: lines that were left out because they repeat a prompt.
    """

    prompts: PromptSet
    records: Sequence[Scene] | None = None
    repeated: int = 0


def read_source(path: str | None, with_images: bool, held_out: bool = False) -> Source:
    """Read a file of prompts, or the benchmark of the embedded model for None.

    Args:
        with_images: whether there is a folder of pictures, so that lines of JSONL may name an "image".
        held_out: of the benchmark, the scenes of emoji that the model never saw.

    Raises:
        InputError: as `sage.prompts.read_prompts`; "image" on some lines only, or without leave; no benchmark in this installation.
    """
    if path is None:
        return _benchmark(held_out)
    if held_out:
        raise InputError("--held-out chooses among the benchmark's prompts, and PROMPTS are given; leave one of them out.")
    found = read_prompts(path, (*KNOWN_KEYS, "image"))
    if found.images is not None and not with_images:
        raise InputError(f'{found.source}: lines name an "image", but no folder of pictures is given; give --images FOLDER, or leave the '
                         "key out.")
    if found.images is not None and None in found.images:
        raise InputError(f'{found.source}: {sum(image is not None for image in found.images)} of {len(found)} lines name an "image"; '
                         "name one on every line, or on none.")
    kept = sorted({prompt: row for row, prompt in reversed(list(enumerate(found.prompts)))}.values())
    return Source(_rows(found, kept), repeated=len(found) - len(kept))


def _rows(prompts: PromptSet, rows: Sequence[int]) -> PromptSet:
    """Some lines of a prompt set, in the order given."""
    columns = {name: getattr(prompts, name) for name in ("prompts", "negative_prompts", "seeds", "images")}
    return replace(prompts, **{name: None if column is None else tuple(column[row] for row in rows) for name, column in columns.items()})


def _benchmark(held_out: bool) -> Source:
    import sage.emoji

    scenes = list(sage.emoji.benchmark(held_out=held_out))
    name = "the embedded model's benchmark" + (", held out" if held_out else "")
    return Source(PromptSet(name, tuple(scene.caption for scene in scenes)), scenes)


@dataclass(frozen=True)
class Asked:
    """The evaluated prompts, group after group; picture i is number i % images of prompt i // images.

    Args:
        prompts: n texts.
        groups: rows of `prompts`, consecutive; loners, if they are evaluated, are groups of one.
        medoids: the row of each group whose noise it shares.
        images: pictures of each prompt, each with a seed of its own.
        seeds: n · images.
        negatives: one per prompt, or None.
        rows: where the prompts stand in what was read.
        read: distinct prompts that were read.
        grouped: how many of them have a neighbour.
        embeddings: of the n prompts.
        similarity, max_group_size: that the groups were found with.
    """

    prompts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    medoids: tuple[int, ...]
    images: int
    seeds: tuple[int, ...]
    negatives: tuple[str | None, ...] | None
    rows: tuple[int, ...]
    read: int
    grouped: int
    embeddings: Embeddings
    similarity: float = 0.6
    max_group_size: int = 8

    @property
    def pictures(self) -> int:
        return len(self.prompts) * self.images

    @property
    def grouped_share(self) -> float:
        """The share of prompts with a neighbour, of all that were read."""
        return self.grouped / self.read

    @property
    def picture_prompts(self) -> list[str]:
        """[pictures]: each one's prompt."""
        return [prompt for prompt in self.prompts for _ in range(self.images)]

    def clusters(self) -> list[list[int]]:
        """Pictures by group, all images of all members: what is resampled together."""
        return [[row * self.images + k for row in group for k in range(self.images)] for group in self.groups]

    def sets(self) -> list[list[int]]:
        """Pictures that share a trunk: of one group, one image number; group after group."""
        return [[row * self.images + k for row in group] for group in self.groups for k in range(self.images)]

    def single(self) -> Asked:
        """The same prompts with one picture each."""
        return replace(self, images=1, seeds=self.seeds[:: self.images])

    def chunks(self, pictures: int) -> list[list[int]]:
        """Numbers of consecutive groups that are drawn together: as many as have about so many pictures, at least one."""
        parts: list[list[int]] = [[]]
        filled = 0
        for number, group in enumerate(self.groups):
            if parts[-1] and filled + len(group) * self.images > pictures:
                parts.append([])
                filled = 0
            parts[-1].append(number)
            filled += len(group) * self.images
        return parts


def ask(source: Source, *, images: int, seed: int, similarity: float, max_group_size: int, limit: int | None, everyone: bool,
        pipe: Any = None, progress: bool = False) -> Asked:
    """Embed and group prompts, and keep those to be evaluated.

    Args:
        images: pictures of each prompt.
        seed: base of the pictures' seeds, and of the choice of groups under `limit`.
        similarity, max_group_size: as for `sage.plans.plan_prompts`.
        limit: most prompts; whole groups, chosen at random by the seed. None: all.
        everyone: keep prompts that have no neighbour.

    Raises:
        InputError: fewer than two groups.
    """
    prompts = source.prompts.prompts
    embeddings = embed(source.prompts, Grouping(), pipe, progress)
    plan = plan_prompts(prompts, embeddings, share=0.5, similarity=similarity, max_group_size=max_group_size)
    roots = [(root.members, root.representative) for root in plan.roots]
    grouped = sum(len(members) for members, _ in roots if len(members) > 1)
    chosen = _chosen([root for root in roots if everyone or len(root[0]) > 1], limit, seed)
    if sum(len(members) > 1 for members, _ in chosen) < 2:
        raise InputError(f"{source.prompts.source}: {grouped} of {len(prompts)} prompts have a neighbour at similarity {similarity:g}, in "
                         f"{sum(len(m) > 1 for m, _ in roots)} groups, of which fewer than two are evaluated; give more prompts, a lower "
                         "--similarity or a higher --limit.")
    rows = [row for members, _ in chosen for row in members]
    place = {row: new for new, row in enumerate(rows)}
    kept = _rows(source.prompts, rows)
    seeds = [leaf_seed(seed, prompt, k) if kept.seeds is None else kept.seeds[row] + k
             for row, prompt in enumerate(kept.prompts) for k in range(images)]
    vectors = replace(embeddings, vectors=embeddings.vectors[np.array(rows)], unknown=embeddings.unknown[np.array(rows)])
    return Asked(kept.prompts, tuple(tuple(place[row] for row in members) for members, _ in chosen),
                 tuple(place[medoid] for _, medoid in chosen), images, tuple(seeds), kept.negative_prompts, tuple(rows), len(prompts),
                 grouped, vectors, similarity, max_group_size)


def _chosen(roots: list, limit: int | None, seed: int) -> list:
    """All groups, or some at random until the next would be too many; in their old order."""
    if limit is None or sum(len(members) for members, _ in roots) <= limit:
        return roots
    kept, filled = [], 0
    for number in np.random.default_rng(seed).permutation(len(roots)).tolist():
        if filled + len(roots[number][0]) <= limit:
            kept.append(number)
            filled += len(roots[number][0])
    return [roots[number] for number in sorted(kept)]
