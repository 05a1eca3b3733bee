"""Packs: whole groups, as few launches as any cut of their order has, full where shapes allow it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage import packing
from sage.packing import launches, packs
from sage.plan import Leaf, SharingPlan


def flat(sizes, share=0.4, shares=None) -> SharingPlan:
    """A group of each size, in this order."""
    ends = list(itertools.accumulate(sizes))
    groups = [tuple(range(end - size, end)) for size, end in zip(sizes, ends)]
    return SharingPlan.flat([Leaf(f"prompt {i}") for i in range(ends[-1])], groups, shares or share)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30), nodes=st.integers(1, 8), pieces=st.booleans())
@settings(max_examples=80, deadline=None)
def test_packs_are_a_partition_within_the_bounds(sizes, nodes, pieces):
    plan = flat(sizes)
    made = packs(plan, nodes, pieces=pieces)
    assert sorted(root for pack in made for root in pack) == list(range(len(plan.roots)))
    assert made == sorted(sorted(pack) for pack in made)
    for pack in made:
        pictures = sum(len(plan.roots[root].members) for root in pack)
        assert pictures <= nodes * (packing.MOST_PICTURES if pieces else 1) or len(pack) == 1


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=7), nodes=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_of_the_order_has_fewer_launches(sizes, nodes, seed):
    rng = np.random.default_rng(seed)
    plan = flat(sizes, shares=[float(share) for share in rng.choice([0.2, 0.5, 0.8], len(sizes))])
    ours = launches(plan, packs(plan, nodes, 10), nodes, 10)
    shape = [(len(root.members), [sum(root.members[0] <= node.members[0] <= root.members[-1] for start, end, node in plan.intervals(10)
              if start <= call < end) for call in range(10)]) for root in plan.roots]  # fmt: skip
    order = sorted(range(len(plan.roots)), key=lambda root: (shape[root], root))
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        ends = [*(place + 1 for place, cut in enumerate(cuts) if cut), len(order)]
        parts = [order[begin:end] for begin, end in zip([0, *ends], ends)]
        fits = all(len(part) == 1 or sum(shape[root][0] for root in part) <= packing.MOST_PICTURES * nodes for part in parts)
        assert not fits or launches(plan, parts, nodes, 10) >= ours


def test_groups_of_one_shape_fill_every_launch():
    plan = flat([3] * 32 + [1] * 16 + [8] * 16)
    made = packs(plan, 16)
    rows = plan.cost(20).nfe
    assert launches(plan, made, 16) * 16 == rows  # not a row is empty
    one_call_each = launches(plan, [[root] for root in range(len(plan.roots))], 16)
    assert launches(plan, made, 16) < one_call_each / 4


def test_without_pieces_pictures_fill_calls():
    plan = flat([5, 4, 4, 3, 3, 2, 2, 1])
    made = packs(plan, 8, pieces=False)
    assert sorted(sum(len(plan.roots[root].members) for root in pack) for pack in made) == [8, 8, 8]
    assert packs(flat([9, 2]), 4, pieces=False) == [[0], [1]]


def test_some_roots_only_and_everything_at_once():
    plan = flat([2, 2, 2, 2])
    assert packs(plan, None) == [[0, 1, 2, 3]]
    assert packs(plan, 2, roots=[3, 1]) == [[1, 3]]
    assert packs(plan, 2, roots=[]) == []


def test_launches_of_many_groups_are_full_with_cuts_some_groups_apart():
    rng = np.random.default_rng(0)
    plan = flat(rng.integers(1, 9, 3000).tolist())
    for nodes in (64, 512):
        made = packs(plan, nodes)
        assert sum(map(len, made)) == 3000
        assert launches(plan, made, nodes) < 1.06 * plan.cost(20).nfe / nodes + 20  # of full launches, and one partly empty a call


def test_what_is_too_large_for_a_pack_comes_alone_with_cuts_some_groups_apart(monkeypatch):
    monkeypatch.setattr(packing, "MOST_PICTURES", 1)
    monkeypatch.setattr(packing, "MOST_CUTS", 4)  # every 4 groups for packs of 16 pictures
    plan = flat([1] * 8 + [9, 9, 2, 20] + [1] * 5 + [40, 17, 16])
    made = packs(plan, 16)
    assert sorted(root for pack in made for root in pack) == list(range(len(plan.roots)))
    for pack in made:
        assert sum(len(plan.roots[root].members) for root in pack) <= 16 or len(pack) == 1


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="packs: max_nodes must be at least 1, got 0"):
        packs(flat([1]), 0)
    for roots in ([0, 0, 1], [-1], [99]):
        with pytest.raises(ValueError, match="packs: roots must be"):
            packs(flat([1, 2]), 4, roots=roots)
    with pytest.raises(TypeError, match="packs: roots must be an integer, got 0.7"):
        packs(flat([1, 2]), None, roots=[0.7])
    assert packs(flat([1, 2]), 2**62) == [[0, 1]]
