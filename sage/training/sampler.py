"""Batches of whole groups, the same ones however many processes share the work.

    groups = group_captions(pictures.captions, similarity=0.6, max_group_size=4)
    sampler = GroupBatchSampler(groups, batch_size=16, seed=0)
    loader = DataLoader(GroupPictures(pictures, transform), sampler=sampler, batch_size=None, num_workers=4)
    for batch in sampler: batch.rows, batch.groups, batch.global_images         # one epoch

Captions are grouped by the planner that sampling uses. In each epoch the pictures are dealt into group instances: those of a caption
are shuffled, and the k-th of every member of a group makes instance k, so that each picture comes once per epoch and no instance holds
two pictures of one caption (DESIGN: image k of each prompt shares trunk k).

A global batch is packed for a number of `shards`, each of at most batch_size · world_size / shards pictures, and the processes get
equal numbers of shards, in order. So two processes with batch_size=8 see what one process with batch_size=16, shards=2 sees: the same
pictures, groups and order. Nothing is random but by (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sage.plan_checks import integer, items, texts
from sage.prompts import count
from sage.training.data import TrainingSet, Transform, draw

__all__ = ["GroupBatch", "GroupBatchSampler", "GroupPictures", "deal", "group_captions", "pack"]

LOOK_AHEAD = 64  # group instances that a batch may pass over, looking for one that fits

CaptionGroup = tuple[tuple[int, ...], ...]  # for each caption of a group the pictures that have it


def group_captions(
    captions: Sequence[str],
    *,
    similarity: float = 0.6,
    max_group_size: int = 8,
    encoder: str = "auto",
    pipe: Any = None,
    device: Any = "cpu",
    search: str = "auto",
    cache: str | Path | bool | None = True,
    progress: bool = False,
) -> list[CaptionGroup]:
    """Group the distinct captions of a training set as `sage.plan_prompts` groups prompts.

    Args:
        captions: one per picture.
        similarity, max_group_size, search: as for `sage.plan_prompts`; sizes are counted in captions.
        encoder, pipe, device, cache, progress: as for `sage.embed_prompts`.

    Returns:
        A partition of the pictures: for each group, for each of its captions, the indices of the pictures that have it, ascending.
        A caption that is like no other is a group of one. Warns if all are.
    """
    from sage.embed import embed_prompts
    from sage.plans import plan_prompts

    pictures: dict[str, list[int]] = {}
    for index, caption in enumerate(texts(captions, "group_captions: captions")):
        pictures.setdefault(caption, []).append(index)
    distinct = list(pictures)
    embeddings = embed_prompts(distinct, encoder, pipe, progress=progress, device=device, cache=cache)
    plan = plan_prompts(distinct, embeddings, similarity=similarity, max_group_size=max_group_size, search=search)
    if all(len(root.members) == 1 for root in plan.roots):
        why = "there is one caption" if len(distinct) == 1 else f"no two of {len(distinct)} captions are {similarity:g} alike"
        if len(distinct) > 1 and max_group_size == 1:
            why = "max_group_size is 1"
        warnings.warn(f"group_captions: there are no groups ({why}): training equals ordinary training, nothing learns to share",
                      stacklevel=2)  # fmt: skip
    return [tuple(tuple(pictures[distinct[member]]) for member in root.members) for root in plan.roots]


def deal(groups: Sequence[CaptionGroup], seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The group instances of an epoch, in random order: each at most one picture per caption, each picture in one of them.

    Args:
        groups: what `group_captions` returned.
        seed, epoch: what the order depends on, beside the groups.

    Returns:
        Pictures of each instance, in the order of the group's captions.
    """
    instances = []
    for number, group in enumerate(groups):
        shuffled = [sorted(pictures, key=lambda picture: (draw("deal", seed, epoch, picture), picture)) for pictures in group]
        for k in range(max(map(len, shuffled))):
            members = tuple(pictures[k] for pictures in shuffled if k < len(pictures))
            instances.append((draw("order", seed, epoch, number, k), number, k, members))
    return [members for *_, members in sorted(instances)]


def pack(sizes: Sequence[int], capacity: int, shards: int) -> list[list[list[int]]]:
    """Pack things in their order into batches of `shards` bins, each thing whole, into the emptiest bin of the first batch it fits.

    A batch passes over at most `LOOK_AHEAD` things that do not fit; they come first in the next one. Only in the last batch may bins
    stay empty, where fewer things than bins are left.

    Args:
        sizes: of n things, 1 ≤ size ≤ capacity.
        capacity: of a bin.
        shards: bins in a batch.

    Returns:
        Batches of bins of indices into `sizes`.
    """
    batches, waiting = [], deque(range(len(sizes)))
    while waiting:
        bins: list[list[int]] = [[] for _ in range(shards)]
        room, passed = [capacity] * shards, []
        while waiting and any(room) and len(passed) < LOOK_AHEAD:
            thing = waiting.popleft()
            emptiest = max(range(shards), key=room.__getitem__)  # the first of several
            if sizes[thing] > room[emptiest]:
                passed.append(thing)
                continue
            bins[emptiest].append(thing)
            room[emptiest] -= sizes[thing]
        waiting.extendleft(reversed(passed))
        batches.append(bins)
    return batches


@dataclass(frozen=True)
class GroupBatch:
    """What one process trains on in one step.

    Attributes:
        rows: n indices of pictures, n ≤ batch_size, at least one; those of a group are neighbours.
        groups: for each row the number of its group instance, unique in the epoch and the same for any number of processes; seed the
            noise of a group by it. Not numbered from 0 in the batch.
        global_images: pictures of this step in all processes together; divide summed losses by it.
        filler: this process has nothing left in this step, the last of an epoch. Its rows repeat another process's, so that it can go
            through the step with the others: with weight 0.
        epoch, number: which batch of which epoch, from 0.
    """

    rows: tuple[int, ...]
    groups: tuple[int, ...]
    global_images: int
    filler: bool
    epoch: int
    number: int


class GroupBatchSampler:
    """The batches of one process, epoch by epoch: each iteration is one epoch, or what is left of it.

    Args:
        groups: what `group_captions` returned.
        batch_size: most pictures of a batch of this process. It is often less, as groups are not split.
        seed: of the dealing and the order.
        rank, world_size: which of how many processes.
        shards: in how many parts global batches are packed, a multiple of `world_size`; None: `world_size`.

    Raises:
        ValueError: a group has more captions than a shard has pictures, or an argument is out of range or does not fit the others.
        TypeError: an argument is of the wrong kind.

    Notes:
        Do not pass the loader to `accelerator.prepare`, which would split batches a second time. A loader with workers takes batches
        ahead: name the last one that was trained on in `state_dict`.
    """

    def __init__(
        self,
        groups: Sequence[CaptionGroup],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        shards: int | None = None,
    ):
        op = "GroupBatchSampler"
        batch_size, self.seed = integer(batch_size, f"{op}: batch_size", 1), integer(seed, f"{op}: seed")
        self.rank, self.world_size = integer(rank, f"{op}: rank", 0), integer(world_size, f"{op}: world_size", 1)
        self.shards = self.world_size if shards is None else integer(shards, f"{op}: shards", 1)
        if self.rank >= self.world_size:
            raise ValueError(f"{op}: rank must be below world_size {self.world_size}, got {self.rank}")
        images = batch_size * self.world_size
        if self.shards % self.world_size or images % self.shards:
            raise ValueError(f"{op}: shards must be a multiple of world_size {self.world_size} and divide the {images} pictures of a "
                             f"global batch, got {self.shards}")  # fmt: skip
        self.batch_size, self.capacity = batch_size, images // self.shards
        self.groups = _checked(groups, op)
        self._check_sizes(op)
        self._digest = hashlib.sha256(json.dumps(self.groups).encode()).hexdigest()
        self.epoch, self.position = 0, 0  # of the batch that comes next
        self._packed_epoch: tuple[int, list] | None = None

    def _check_sizes(self, op: str) -> None:
        """Refuse groups that no shard has room for."""
        sizes = [len(group) for group in self.groups]
        large, largest = sum(size > self.capacity for size in sizes), max(sizes)
        if large:
            parts = self.shards // self.world_size
            shard = f"batch_size {self.batch_size}" + (f" in {parts} shards of {self.capacity}" if parts > 1 else "")
            raise ValueError(f"{op}: {count(large, 'group')} of {len(sizes)} cannot go into {shard}, the largest has {largest} captions; "
                             f"use a batch_size of at least {largest * parts}, or group with max_group_size={self.capacity}")  # fmt: skip

    def __len__(self) -> int:
        """Batches in the current epoch, those already handed out too."""
        return self.num_batches(self.epoch)

    def num_batches(self, epoch: int) -> int:
        """Batches in an epoch, the same in all processes; it may differ by a few from epoch to epoch, as groups fall otherwise."""
        return len(self._packed(epoch))

    def __iter__(self) -> Iterator[GroupBatch]:
        epoch, packed = self.epoch, self._packed(self.epoch)
        for number in range(self.position, len(packed)):
            self.epoch, self.position = _after(epoch, number, len(packed))
            yield self._batch(epoch, number, packed[number])

    def _packed(self, epoch: int) -> list[list[list[tuple[int, tuple[int, ...]]]]]:
        """Batches of shards of (number, pictures) of group instances; those of one epoch are kept."""
        if self._packed_epoch is None or self._packed_epoch[0] != epoch:
            instances = list(enumerate(deal(self.groups, self.seed, epoch)))
            batches = pack([len(rows) for _, rows in instances], self.capacity, self.shards)
            self._packed_epoch = epoch, [[[instances[i] for i in shard] for shard in batch] for batch in batches]
        return self._packed_epoch[1]

    def _batch(self, epoch: int, number: int, shards: list[list[tuple[int, tuple[int, ...]]]]) -> GroupBatch:
        """This process's part of a global batch."""
        parts = self.shards // self.world_size
        instances = [instance for shard in shards[self.rank * parts : (self.rank + 1) * parts] for instance in shard]
        filler = not instances
        if filler:
            instances = shards[0][:1]
        rows = tuple(row for _, members in instances for row in members)
        groups = tuple(instance for instance, members in instances for _ in members)
        images = sum(len(members) for shard in shards for _, members in shard)
        return GroupBatch(rows, groups, images, filler, epoch, number)

    def state_dict(self, after: GroupBatch | None = None) -> dict[str, Any]:
        """Where to go on: plain data, for JSON.

        Args:
            after: the last batch that was trained on; None: the last that was handed out, which is another one if a loader with workers
                took it ahead.
        """
        epoch, batch = self.epoch, self.position
        if after is not None:
            epoch, batch = _after(after.epoch, after.number, self.num_batches(after.epoch))
        return {"epoch": epoch, "batch": batch, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a sampler of the same groups, seed and packing was; the number of processes may be another.

        Raises:
            ValueError: the state is of other batches; says in what they differ.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(f"GroupBatchSampler.load_state_dict: {name} was {state.get(name)!r}, is {value!r}: the batches would not "
                                 "be those of the run that is resumed; use its data and settings")  # fmt: skip
        epoch = integer(state.get("epoch"), "GroupBatchSampler.load_state_dict: epoch", 0)
        batch = integer(state.get("batch"), "GroupBatchSampler.load_state_dict: batch", 0)
        if batch >= self.num_batches(epoch):
            raise ValueError(f"GroupBatchSampler.load_state_dict: batch must be below the {self.num_batches(epoch)} of epoch {epoch}, "
                             f"got {batch}")  # fmt: skip
        self.epoch, self.position = epoch, batch

    def _settings(self) -> dict[str, Any]:
        """What decides the global batches."""
        return {"seed": self.seed, "shards": self.shards, "images_per_shard": self.capacity, "groups_sha256": self._digest}


def _after(epoch: int, number: int, num_batches: int) -> tuple[int, int]:
    """Epoch and number of the batch that follows."""
    return (epoch, number + 1) if number + 1 < num_batches else (epoch + 1, 0)


def _checked(groups: Any, op: str) -> list[CaptionGroup]:
    """Groups as tuples; refused if they are empty or hold a picture twice."""
    seen: set[int] = set()
    checked = []
    for number, group in enumerate(items(groups, f"{op}: groups")):
        name = f"{op}: groups[{number}]"
        captions = [tuple(integer(row, name, 0) for row in items(pictures, name)) for pictures in items(group, name)]
        rows = [row for pictures in captions for row in pictures]
        if not captions or not all(captions):
            raise ValueError(f"{name} must hold at least one caption, and each caption at least one picture, got {captions}")
        if len(set(rows)) != len(rows) or not seen.isdisjoint(rows):
            twice = next(row for row in rows if rows.count(row) > 1 or row in seen)
            raise ValueError(f"{op}: groups must name every picture once, but {twice} comes again in groups[{number}]")
        seen.update(rows)
        checked.append(tuple(captions))
    if not checked:
        raise ValueError(f"{op}: groups must hold at least one group, got none")
    return checked


class GroupPictures(torch.utils.data.Dataset):
    """Whole batches, for `DataLoader(GroupPictures(...), sampler=GroupBatchSampler(...), batch_size=None)`, with any number of workers.

    Args:
        training_set: the pictures.
        transform: makes them tensors.
        seed: of what is random in the transform.
    """

    def __init__(self, training_set: TrainingSet, transform: Transform, seed: int = 0):
        self.training_set, self.transform, self.seed = training_set, transform, seed

    def __len__(self) -> int:
        return len(self.training_set)

    def __getitem__(self, batch: GroupBatch) -> dict[str, Any]:
        """`pixel_values` float32 [n, 3, R, R], `captions` (n texts) and `batch` itself."""
        pictures = ((row, self.training_set.picture(row)) for row in batch.rows)
        pixels = torch.stack([self.transform(picture, self.seed, batch.epoch, row) for row, picture in pictures])
        return {"pixel_values": pixels, "captions": [self.training_set.captions[row] for row in batch.rows], "batch": batch}
