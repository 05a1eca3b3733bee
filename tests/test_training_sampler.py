"""Batches of groups: every picture once an epoch, groups whole, the same global batches for any number of processes, exact resuming."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sage.embed import Embeddings
from sage.training.data import Transform, read_training_set
from sage.training.sampler import LOOK_AHEAD, GroupBatchSampler, GroupPictures, deal, group_captions, pack

# Numbers of pictures of each caption of each group, turned into groups of rows in a scattered order.
COUNTS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def groups_of(counts):
    total = sum(map(sum, counts))
    rows = iter(np.random.default_rng(total).permutation(total).tolist())
    return [tuple(tuple(next(rows) for _ in range(number)) for number in group) for group in counts]


def epoch_of(groups, *args, epoch=0, **options):
    sampler = GroupBatchSampler(groups, *args, **options)
    for _ in range(epoch):
        list(sampler)
    return list(sampler)


@pytest.fixture
def vectors(monkeypatch):
    """Embeddings by caption, in place of an encoder's."""
    known = {"fox": [1, 0], "red fox": [0.8, 0.6], "hen": [0, 1], "xyzzy": [1, 0]}
    calls = []

    def embed_prompts(prompts, *args, **options):
        calls.append((prompts, args, options))
        rows = np.array([known[prompt] for prompt in prompts], np.float32)
        return Embeddings(rows, "by hand", np.array([prompt == "xyzzy" for prompt in prompts]))

    monkeypatch.setattr("sage.embed.embed_prompts", embed_prompts)
    return calls


def test_distinct_captions_are_grouped_by_the_planner(vectors):
    captions = ["hen", "fox", "red fox", "fox", "xyzzy"]
    assert sorted(group_captions(captions, similarity=0.7, cache=False)) == [((0,),), ((1, 3), (2,)), ((4,),)]  # xyzzy: unknown, alone
    assert vectors == [(["hen", "fox", "red fox", "xyzzy"], ("auto", None), {"progress": False, "device": "cpu", "cache": False})]


def test_groups_of_the_shipped_encoder(tmp_path):
    captions = ["a photo of a red fox", "a photo of a fox", "the stock market fell on monday", "a photo of a red fox"]
    found = group_captions(captions, cache=tmp_path)
    assert sorted(found) == [((0, 3), (1,)), ((2,),)] and list(tmp_path.glob("*.sqlite"))  # embeddings are kept


@pytest.mark.parametrize(
    ("captions", "options", "why"),
    [
        (["hen"], {}, "there is one caption"),
        (["hen", "hen"], {}, "there is one caption"),
        (["hen", "fox"], {"similarity": 0.9}, "no two of 2 captions are 0.9 alike"),
        (["fox", "red fox"], {"max_group_size": 1}, "max_group_size is 1"),
    ],
)
def test_no_groups_is_said(vectors, captions, options, why):
    with pytest.warns(UserWarning, match=rf"there are no groups \({why}\): training equals ordinary training"):
        found = group_captions(captions, **options)
    assert sorted(row for group in found for rows in group for row in rows) == list(range(len(captions)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_captions(["fox", "red fox", "hen"], similarity=0.7)


def test_dealing_by_hand():
    groups = [((0, 1, 2), (3,)), ((4,),)]
    seen = Counter()
    for epoch in range(400):
        instances = deal(groups, 0, epoch)
        assert sorted(map(len, instances)) == [1, 1, 1, 2] and (4,) in instances
        pair, = (members for members in instances if len(members) == 2)
        assert pair[1] == 3
        seen[pair[0]] += 1
        seen["last", instances.index((4,))] += 1
    assert all(100 < seen[row] < 167 for row in range(3))  # 133 each, ±3.5 standard deviations
    assert all(70 < seen["last", place] < 130 for place in range(4))
    assert deal(groups, 0, 5) == deal(groups, 0, 5) and deal(groups, 0, 5) != deal(groups, 0, 6) != deal(groups, 1, 6)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 5))
def test_an_epoch_deals_every_picture_once_and_no_caption_twice(counts, epoch):
    groups = groups_of(counts)
    caption_of = {row: (number, place) for number, group in enumerate(groups) for place, rows in enumerate(group) for row in rows}
    instances = deal(groups, 3, epoch)
    assert sorted(row for members in instances for row in members) == sorted(caption_of)
    for members in instances:
        captions = [caption_of[row] for row in members]
        assert len(set(captions)) == len(captions) and len({number for number, _ in captions}) == 1
    assert len(instances) == sum(max(group) for group in counts)  # as few, so as full, as can be


def test_packing_by_hand():
    assert pack([2, 3, 1, 4, 1], capacity=4, shards=1) == [[[0, 2, 4]], [[1]], [[3]]]
    assert pack([3, 1, 2, 3, 3], capacity=4, shards=2) == [[[0], [1, 2]], [[3], [4]]]  # into the emptiest
    assert pack([3, 3, 3], capacity=4, shards=2) == [[[0], [1]], [[2], []]]
    assert pack([], capacity=4, shards=2) == []
    waiting = [3, *[2] * LOOK_AHEAD, 1]  # the 1 would fit beside the 3, but lies too far ahead
    assert pack(waiting, capacity=4, shards=1)[0] == [[0]] and pack(waiting[1:], capacity=4, shards=1)[0] == [[0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=80), st.integers(6, 9), st.integers(1, 4))
def test_packing_keeps_within_room_and_leaves_nothing_out(sizes, capacity, shards):
    batches = pack(sizes, capacity, shards)
    assert sorted(thing for batch in batches for shard in batch for thing in shard) == list(range(len(sizes)))
    assert all(sum(sizes[thing] for thing in shard) <= capacity for batch in batches for shard in batch)
    assert all(len(batch) == shards for batch in batches) and all(shard for batch in batches[:-1] for shard in batch)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(4, 7), st.sampled_from([1, 2, 3]), st.integers(0, 3))
def test_an_epoch_has_every_picture_once_in_whole_groups(counts, batch_size, world_size, epoch):
    groups = groups_of(counts)
    processes = [epoch_of(groups, batch_size, 7, rank, world_size, epoch=epoch) for rank in range(world_size)]
    assert len({len(batches) for batches in processes}) == 1
    seen = [row for batches in processes for batch in batches if not batch.filler for row in batch.rows]
    assert sorted(seen) == sorted(row for group in groups for rows in group for row in rows)
    instances = set(deal(groups, 7, epoch))
    for number, together in enumerate(zip(*processes, strict=True)):
        assert {batch.global_images for batch in together} == {sum(len(batch.rows) for batch in together if not batch.filler)}
        for batch in together:
            assert (batch.epoch, batch.number) == (epoch, number) and 0 < len(batch.rows) <= batch_size
            assert not batch.filler or number == len(processes[0]) - 1
            members = {group: tuple(row for row, of in zip(batch.rows, batch.groups, strict=True) if of == group) for group in batch.groups}
            assert set(members.values()) <= instances  # whole, in the order of its captions
            assert [row for rows in members.values() for row in rows] == list(batch.rows)  # neighbours
    ids = [group for batches in processes for batch in batches if not batch.filler for group in set(batch.groups)]
    assert sorted(ids) == list(range(len(instances)))


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_processes_share_the_batches_of_one(counts, world_size, epoch):
    groups = groups_of(counts)
    whole = epoch_of(groups, 16, 5, shards=4, epoch=epoch)
    parts = [epoch_of(groups, 16 // world_size, 5, rank, world_size, shards=4, epoch=epoch) for rank in range(world_size)]
    for batch, *together in zip(whole, *parts, strict=True):
        real = [part for part in together if not part.filler]
        assert batch.rows == tuple(row for part in real for row in part.rows) and not batch.filler
        assert batch.groups == tuple(group for part in real for group in part.groups)
        assert {part.global_images for part in together} == {batch.global_images} == {len(batch.rows)}


def test_two_processes_are_one_with_two_shards_by_default():
    groups = groups_of([[1, 2], [1], [3, 1, 1], [2]])
    whole = epoch_of(groups, 8, shards=2)
    first, second = (epoch_of(groups, 4, 0, rank, 2) for rank in range(2))
    assert [batch.rows for batch in whole] == [a.rows + (() if b.filler else b.rows) for a, b in zip(first, second, strict=True)]


def test_a_process_without_pictures_repeats_some_with_weight_zero():
    first, second = (epoch_of([((0,), (1,), (2,))], 4, 0, rank, 2)[0] for rank in range(2))
    assert first.rows == second.rows == (0, 1, 2) and first.groups == second.groups == (0, 0, 0)
    assert (first.filler, second.filler) == (False, True) and first.global_images == second.global_images == 3


def test_batches_are_nearly_full():
    sizes = np.random.default_rng(0).integers(1, 5, 3000)
    rows = iter(range(int(sizes.sum())))
    batches = epoch_of([tuple((next(rows),) for _ in range(size)) for size in sizes], 8)
    assert sum(len(batch.rows) for batch in batches) / len(batches) > 7.9


def test_epochs_and_seeds_differ():
    groups = groups_of([[1, 2], [1], [3, 1], [2], [1, 1], [1], [1]])
    orders = [[batch.rows for batch in epoch_of(groups, 4, seed, epoch=epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert orders[1] == [batch.rows for batch in epoch_of(groups, 4, 0, epoch=1)]


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(0, 30))
def test_resuming_is_exact(counts, done):
    groups = groups_of(counts)

    def batches(sampler, number):
        found = []
        while len(found) < number:
            assert sampler.position < len(sampler)  # or nothing would come
            for batch in sampler:
                found.append(batch)
                if len(found) == number:
                    break
        return found

    straight = batches(GroupBatchSampler(groups, 4, 2), done + 12)
    begun = GroupBatchSampler(groups, 4, 2)
    assert batches(begun, done) == straight[:done]
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = GroupBatchSampler(groups, 4, 2)
    resumed.load_state_dict(state)
    assert batches(resumed, 12) == straight[done:]
    if done:
        ahead = GroupBatchSampler(groups, 4, 2)  # a loader with workers has taken more than was trained on
        batches(ahead, done + 5)
        assert ahead.state_dict(after=straight[done - 1]) == state


def test_resuming_with_another_number_of_processes():
    groups = groups_of([[1, 2], [1], [3, 1, 1], [2], [1, 1], [4, 2]])
    whole = GroupBatchSampler(groups, 8, shards=2)
    next(iter(whole))
    parts = [GroupBatchSampler(groups, 4, 0, rank, 2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(whole.state_dict())
    rest = [batch.rows for batch in whole]
    assert rest == [a.rows + (() if b.filler else b.rows) for a, b in zip(*parts, strict=True)]


def test_states_of_other_batches_are_refused():
    groups = groups_of([[1, 2], [1], [3, 1]])
    sampler = GroupBatchSampler(groups, 4)
    state = sampler.state_dict()
    assert {name: state[name] for name in ("epoch", "batch", "seed", "shards", "images_per_shard")} == {
        "epoch": 0, "batch": 0, "seed": 0, "shards": 1, "images_per_shard": 4}  # fmt: skip
    for other, what in (
        (GroupBatchSampler(groups, 4, 1), "seed was 0, is 1"),
        (GroupBatchSampler(groups, 4, 0, 0, 2), "shards was 1, is 2"),
        (GroupBatchSampler(groups, 5), "images_per_shard was 4, is 5"),
        (GroupBatchSampler(groups[:2], 4), "groups_sha256 was"),
    ):
        with pytest.raises(ValueError, match=f"load_state_dict: {what}"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"batch must be below the {len(sampler)} of epoch 0, got 99"):
        sampler.load_state_dict({**state, "batch": 99})
    with pytest.raises(TypeError, match="epoch must be an integer, got None"):
        sampler.load_state_dict({**state, "epoch": None})


@pytest.mark.parametrize(
    ("groups", "args", "options", "message"),
    [
        ([((0,), (1,), (2,)), ((3,),)], (2,), {}, "1 group of 2 cannot go into batch_size 2, .* use a batch_size of at least 3, or .* max_group_size=2"),
        ([((0,), (1,), (2,))], (4,), {"shards": 2}, r"batch_size 4 in 2 shards of 2, the largest has 3 captions; use a batch_size of at least 6"),
        ([((0,),)], (4, 0, 2, 2), {}, "rank must be below world_size 2, got 2"),
        ([((0,),)], (4, 0, 0, 2), {"shards": 3}, "shards must be a multiple of world_size 2 and divide the 8 pictures"),
        ([((0,),)], (4,), {"shards": 3}, "shards must be a multiple of world_size 1 and divide the 4 pictures"),
        ([((0,),)], (0,), {}, "batch_size must be at least 1, got 0"),
        ([], (4,), {}, "groups must hold at least one group, got none"),
        ([()], (4,), {}, r"groups\[0\] must hold at least one caption"),
        ([((0,), ())], (4,), {}, r"groups\[0\] must hold at least one caption, and each caption at least one picture"),
        ([((0,),), ((1, 0),)], (4,), {}, r"every picture once, but 0 comes again in groups\[1\]"),
        ([((0,), (0,))], (4,), {}, r"every picture once, but 0 comes again in groups\[0\]"),
        ([((-1,),)], (4,), {}, r"groups\[0\] must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_refusals(groups, args, options, message):
    with pytest.raises(ValueError, match=message):
        GroupBatchSampler(groups, *args, **options)


def test_workers_change_nothing(tmp_path):
    rows = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"caption {number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    pictures = GroupPictures(read_training_set(tmp_path), Transform(8, random_flip=True), seed=3)
    groups = [((0,), (1, 2)), ((3,),), ((4,), (5,))]

    def epochs(workers):
        sampler = GroupBatchSampler(groups, 3)
        return [item for _ in range(2) for item in DataLoader(pictures, sampler=sampler, batch_size=None, num_workers=workers)]

    plain, shared = epochs(0), epochs(2)
    assert len(pictures) == 6 and [item["batch"] for item in plain] == [item["batch"] for item in shared]
    for item, other in zip(plain, shared, strict=True):
        batch = item["batch"]
        assert torch.equal(item["pixel_values"], other["pixel_values"]) and item["pixel_values"].shape == (len(batch.rows), 3, 8, 8)
        assert item["captions"] == [f"caption {row}" for row in batch.rows]
        wanted = Transform(8, random_flip=True)(pictures.training_set.picture(batch.rows[0]), 3, batch.epoch, batch.rows[0])
        assert torch.equal(item["pixel_values"][0], wanted)
