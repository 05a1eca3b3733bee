"""Plans of least expected loss, against all plans there are."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.budget import PRESETS, budget_plan, expected_loss
from sage.embed import Embeddings
from sage.loss import LossTable
from sage.plan import SharingPlan
from sage.plans import _by_height, plan_prompts, tree_plan
from sage.similarity import similarity_matrix
from sage_kernels.grouping import UNITS
from sage_kernels.prices import split_prices, split_prices_python

CALLS, MOST = 4, 0.75  # small enough to try all plans: nothing is shared in the last call
TIGHT = dict(similarity=0.1, max_group_size=4, num_calls=CALLS, most=MOST)
GROUPS = dict(similarity=0.1, max_group_size=4)
seeds = st.integers(0, 2**32)


def problem(seed: int, most: int = 6, least: int = 1) -> tuple[list[str], np.ndarray, LossTable]:
    """A few prompts around two centres, and a table."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(least, most + 1))
    vectors = rng.standard_normal((2, 6))[rng.integers(0, 2, count)] + rng.choice([0.3, 0.8]) * rng.standard_normal((count, 6))
    table = LossTable.power(float(rng.choice([0.01, 1.0, 50.0])), float(rng.uniform(0.3, 3)), float(rng.uniform(1, 3)))
    return [f"prompt {i}" for i in rng.permutation(count)], vectors, table


def dendrograms(vectors: np.ndarray, similarity: float, cap: int) -> list:
    """Complete linkage, written naively: a leaf is a number, a node (left, right)."""
    alike = similarity_matrix(vectors)
    clusters = [((i,), i) for i in range(len(vectors))]
    while True:
        pairs = [(alike[np.ix_(a[0], b[0])].min(), a, b) for a, b in itertools.combinations(clusters, 2) if len(a[0] + b[0]) <= cap]
        pairs = [pair for pair in pairs if pair[0] >= similarity]
        if not pairs:
            return [tree for _, tree in clusters]
        _, a, b = max(pairs, key=lambda pair: pair[0])
        clusters = [cluster for cluster in clusters if cluster not in (a, b)] + [(a[0] + b[0], (a[1], b[1]))]


def leaves_of(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves_of(tree[0]) + leaves_of(tree[1])


def all_plans(vectors: np.ndarray, loss: LossTable, similarity: float, cap: int) -> set[tuple[int, float]]:
    """(rows, loss) of every plan that splits dendrograms from their roots, in whole calls, before the last."""
    alike, last = similarity_matrix(vectors), CALLS - 1

    def under(tree, start):
        if isinstance(tree, int):
            return {(CALLS - start, 0.0)}
        inside = leaves_of(tree)
        height = alike[np.ix_(inside, inside)].min()
        found = set()
        for end in range(start, last + 1):
            own = len(inside) * float(loss(height, end / CALLS) - loss(height, start / CALLS))
            for (rows, lost), (more, lost_more) in itertools.product(under(tree[0], end), under(tree[1], end)):
                found.add((end - start + rows + more, round(own + lost + lost_more, 10)))
        return found

    total = {(0, 0.0)}
    for tree in dendrograms(vectors, similarity, cap):
        total = {(a + c, round(b + d, 10)) for (a, b), (c, d) in itertools.product(total, under(tree, 0))}
    return total


def rows_and_loss(plan: SharingPlan, vectors: np.ndarray, loss: LossTable, calls: int = CALLS) -> tuple[int, float]:
    return plan.cost(calls).nfe, float(expected_loss(plan, vectors, loss, calls).sum())


@given(seed=seeds, share=st.floats(0.01, 1.5))
@settings(max_examples=60, deadline=None)
def test_at_every_price_no_plan_is_better(seed, share):
    prompts, vectors, loss = problem(seed)
    price = share * float(loss.loss.max())
    plan = budget_plan(prompts, vectors, quality=price, loss=loss, **TIGHT)
    rows, lost = rows_and_loss(plan, vectors, loss)
    best = min(other_lost + price * other_rows / CALLS for other_rows, other_lost in all_plans(vectors, loss, 0.1, 4))
    assert lost + price * rows / CALLS == pytest.approx(best, rel=1e-6, abs=1e-7 * price)


@given(seed=seeds, budget=st.floats(0.2, 1.0))
@settings(max_examples=60, deadline=None)
def test_budgets_are_met_to_the_row_and_on_the_hull_by_the_best(seed, budget):
    prompts, vectors, loss = problem(seed)
    plans = all_plans(vectors, loss, 0.1, 4)
    independent = len(prompts) * CALLS
    allowed = math.floor(budget * independent + 1e-9)
    if allowed < min(rows for rows, _ in plans):
        with pytest.raises(ValueError, match="budget must be at least [01]"):
            budget_plan(prompts, vectors, budget=budget, loss=loss, **TIGHT)
        return
    rows, lost = rows_and_loss(budget_plan(prompts, vectors, budget=budget, loss=loss, **TIGHT), vectors, loss)
    assert rows == allowed
    best = min(lost for rows, lost in plans if rows <= allowed)
    before = [lost for rows, lost in plans if rows <= allowed - 2]  # a group of four pools three splits at most
    assert best - 1e-7 * loss.loss.max() <= lost <= (min(before) if before else math.inf) + 1e-7 * loss.loss.max()


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_more_budget_never_takes_from_a_picture(seed):
    prompts, vectors, loss = problem(seed, 10)
    options = dict(loss=loss, similarity=0.0, max_group_size=8, num_calls=8)
    independent = len(prompts) * 8
    plans = []
    for rows in range(1, independent + 1):
        try:
            plans.append(budget_plan(prompts, vectors, budget=rows / independent, **options))
        except ValueError:
            assert not plans
    assert plans[-1].cost(8).nfe == independent
    for less, more in itertools.pairwise(plans):
        assert more.cost(8).nfe == less.cost(8).nfe + 1
        assert (expected_loss(more, vectors, loss, 8) <= expected_loss(less, vectors, loss, 8) + 1e-7 * loss.loss.max()).all()
        for fine, coarse in zip(more.resolve(8).members, less.resolve(8).members):
            assert all(any(set(node) <= set(other) for other in coarse) for node in fine)


@given(seed=seeds, share=st.floats(0.0, 0.9))
@settings(max_examples=60, deadline=None)
def test_at_the_loss_of_a_flat_or_tree_plan_it_costs_no_more(seed, share):
    prompts, vectors, loss = problem(seed, 20, 2)
    for other in (plan_prompts(prompts, vectors, share=share, **GROUPS), tree_plan(prompts, vectors, share=(share / 2, share), **GROUPS)):
        at_loss = expected_loss(other, vectors, loss, 10).mean()
        plan = budget_plan(prompts, vectors, at_loss=at_loss, loss=loss, num_calls=10, most=0.9, **GROUPS)
        assert expected_loss(plan, vectors, loss, 10).mean() <= at_loss + 1e-6 * loss.loss.max()
        assert plan.cost(10).nfe <= other.cost(10).nfe + GROUPS["max_group_size"] - 2  # at most a pool is cut in two


def test_on_many_prompts_it_saves_more_than_a_flat_plan_of_the_same_loss():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 32))[rng.integers(0, 20, 300)] + 0.6 * rng.standard_normal((300, 32))
    prompts = [f"{i}" for i in range(300)]
    flat = plan_prompts(prompts, vectors)
    at_loss = expected_loss(flat, vectors).mean()
    same_groups = budget_plan(prompts, vectors, at_loss=at_loss, similarity=0.6, max_group_size=8)
    wider = budget_plan(prompts, vectors, at_loss=at_loss)
    assert wider.cost(20).nfe <= same_groups.cost(20).nfe <= flat.cost(20).nfe
    assert max(expected_loss(plan, vectors).mean() for plan in (wider, same_groups)) <= at_loss * (1 + 1e-6)


def partition(plan: SharingPlan) -> set:
    """The nodes as sets of prompts and images, with where they part."""
    return {(frozenset((plan.leaves[i].prompt, plan.leaves[i].image_index) for i in node.members), node.until)
            for root in plan.roots for node, _ in root.walk()}  # fmt: skip


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_prompts_does_not_matter(seed):
    prompts, vectors, loss = problem(seed, 20)
    vectors[len(vectors) // 2 :] = np.rint(vectors[len(vectors) // 2 :] * 0.5) + 0.25  # ties
    for aim in (dict(budget=0.7), dict(quality=0.05 * loss.loss.max()), dict(at_loss=0.02 * loss.loss.max())):
        options = dict(loss=loss, similarity=0.0, max_group_size=8, most=1.0, **aim)
        try:
            expected = partition(budget_plan(prompts, vectors, **options))
        except ValueError:
            continue
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        assert partition(budget_plan([prompts[i] for i in order], vectors[order], **options)) == expected


def test_every_image_of_a_prompt_has_a_tree_of_its_own():
    prompts, vectors, loss = problem(3, 12, 12)
    options = dict(quality=0.05 * loss.loss.max(), loss=loss, similarity=0.0)
    once = partition(budget_plan(prompts, vectors, **options))
    thrice = partition(budget_plan(prompts, vectors, images_per_prompt=3, **options))
    assert {(frozenset((prompt, image) for prompt, _ in node), until) for node, until in once for image in range(3)} == thrice
    plan = budget_plan(prompts, vectors, images_per_prompt=3, budget=0.7, loss=loss, similarity=0.0)
    assert plan.cost(20).nfe == math.floor(0.7 * 36 * 20 + 1e-9)
    assert expected_loss(plan, vectors, loss, images_per_prompt=3).shape == (36,)


@given(seed=seeds, price=st.floats(1e-3, 0.3))
@settings(max_examples=40, deadline=None)
def test_at_a_price_a_group_does_not_depend_on_the_others(seed, price):
    prompts, vectors, loss = problem(seed, 12, 2)
    _, others, _ = problem(seed + 1, 12, 2)
    options = dict(quality=price * loss.loss.max(), loss=loss, similarity=0.1, max_group_size=4)
    alone = partition(budget_plan(prompts, vectors, **options))
    apart = np.concatenate([np.pad(vectors, ((0, 0), (0, 6))), np.pad(others, ((0, 0), (6, 0)))])  # the sets are orthogonal
    names = [f"other {i}" for i in range(len(others))]
    beside = partition(budget_plan([*prompts, *names], apart, **options))
    assert alone == {(node, until) for node, until in beside if not any(prompt.startswith("other") for prompt, _ in node)}


@pytest.mark.parametrize("make", [plan_prompts, tree_plan, functools.partial(budget_plan, quality="balanced")])
def test_all_pairs_are_looked_at_unless_it_is_asked_otherwise(make, monkeypatch):
    monkeypatch.setattr("sage.grouping.EXACT_MOST", {"cpu": 1, "cuda": 1})  # "auto" would take likely pairs
    searches = []
    make(["a", "b", "c"], np.ones((3, 3)), on_groups=searches.append)
    assert [found.search for found in searches] == ["exact"]
    for prompts in (["a", "b"], ["a"]):
        with pytest.raises(ValueError, match="search must be one of 'auto', 'exact', 'approximate', got 'best'"):
            make(prompts, np.ones((len(prompts), 3)), search="best", alone=np.ones(len(prompts), bool))


@given(share=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), similarity=st.floats(-0.99, 1.0),
       height=st.integers(-UNITS, UNITS + 3))  # fmt: skip
def test_a_share_by_similarity_stays_in_its_range(share, similarity, height):
    low, high = share
    assert low <= _by_height("tree_plan", share, similarity)(height) <= high


def test_prompts_given_twice_share_among_their_second_images():
    prompts, vectors, loss = problem(3, 8, 8)
    twice, rows = [*prompts, *prompts[:3]], [*range(8), 0, 1, 2]
    at_loss = 0.2 * expected_loss(plan_prompts(twice, vectors[rows], share=0.8, similarity=0.0), vectors[rows], loss).mean()
    for aim in (dict(budget=0.8), dict(at_loss=at_loss)):
        plan = budget_plan(twice, vectors[rows], loss=loss, similarity=0.0, **aim)
        for root in plan.roots:
            assert len({plan.leaves[member].image_index for member in root.members}) == 1
    assert expected_loss(plan, vectors[rows], loss).mean() <= at_loss * (1 + 1e-6)
    less = plan.cost(20).nfe - 1
    worse = budget_plan(twice, vectors[rows], loss=loss, similarity=0.0, budget=less / (11 * 20))
    assert expected_loss(worse, vectors[rows], loss).mean() > at_loss * (1 - 1e-6)  # so `at_loss` is the cheapest


def test_different_prompts_part_though_they_are_alike():
    vectors = np.ones((5, 3))
    plan = budget_plan(list("abcde"), vectors, quality="fast", loss=LossTable.power(1, 1, 1))
    assert plan.resolve(20).rows == [1] * 16 + [5] * 4
    assert budget_plan(list("abcde"), vectors, quality=0, num_calls=20, most=1.0).resolve(20).rows == [1] * 19 + [5]
    assert budget_plan(list("abcde"), vectors, quality="fast", num_calls=1).resolve(1).rows == [5]
    assert budget_plan(list("abcde"), vectors, quality="fast", most=0.0).roots == SharingPlan.independent(plan.leaves).roots


def test_unknown_and_lone_prompts_run_alone():
    known = Embeddings(np.ones((4, 3), np.float32), "someone", np.array([False, True, False, False]))
    plan = budget_plan(list("abcd"), known, quality="fast")
    assert [root.members for root in plan.roots] == [(0, 2, 3), (1,)] and plan.encoder == "someone" and plan.similarity == 0.3
    assert budget_plan(list("abcd"), known, quality="fast", alone=np.ones(4, bool)).cost(20).nfe == 80
    one = budget_plan(["a"], np.ones((1, 3)), budget=1.0, seeds=[7])
    assert one.cost(20).nfe == 20 and one.leaves[0].seed == 7 and expected_loss(one, np.ones((1, 3))).tolist() == [0.0]


def test_presets_are_in_order_and_no_matter_of_the_number_of_calls():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((8, 16))[rng.integers(0, 8, 60)] + 0.5 * rng.standard_normal((60, 16))
    prompts = [f"{i}" for i in range(60)]
    costs = [budget_plan(prompts, vectors, quality=name).cost(20).nfe for name in ("high", "balanced", "fast")]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[2]
    assert PRESETS["high"] < PRESETS["balanced"] < PRESETS["fast"]
    assert partition(budget_plan(prompts, vectors, quality="balanced", num_calls=40)) == partition(
        budget_plan(prompts, vectors, quality="balanced", num_calls=20))  # fmt: skip
    more = rng.standard_normal((10, 16)) + 20 * np.eye(16)[0]
    alone = partition(budget_plan(prompts, vectors, quality="balanced", similarity=0.5))
    beside = partition(budget_plan([*prompts, *map(str, range(100, 110))], np.concatenate([vectors, -more]), quality="balanced",
                                   similarity=0.5))  # fmt: skip
    assert alone <= beside


@pytest.mark.parametrize("given, message", [
    ({}, "exactly one of budget, quality, at_loss must be given, got none"),
    ({"budget": 0.5, "quality": "fast"}, "exactly one of .* got budget, quality"),
    ({"quality": "best"}, "quality must be 'high', 'balanced', 'fast' or a price, got 'best'"),
    ({"quality": -1.0}, "quality must be finite and at least 0, got -1.0"),
    ({"at_loss": math.nan}, "at_loss must be finite"),
    ({"budget": 0.0}, r"budget must be in \(0, 1\], got 0.0"),
    ({"budget": 1.5}, r"budget must be in \(0, 1\]"),
    ({"budget": 0.05}, "budget must be at least 0.3600 .* similarity=0.3, max_group_size=32, most=0.8, got 0.05; a lower similarity"),
    ({"budget": 0.5, "num_calls": 0}, "num_calls must be at least 1"),
    ({"budget": 0.5, "max_group_size": 0}, "max_group_size must be at least 1"),
    ({"budget": 0.5, "most": 2.0}, r"most must be in \[0, 1\]"),
    ({"budget": 0.5, "similarity": 3.0}, "similarity must be in"),
    ({"budget": 0.5, "alone": [True]}, "alone must be bool"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        budget_plan(list("abcde"), np.ones((5, 3)), **given)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="budget must be a number, got 'half'"):
        budget_plan(["a"], np.ones((1, 3)), budget="half")
    with pytest.raises(TypeError, match="loss must be a sage.loss.LossTable or None, got float"):
        budget_plan(["a"], np.ones((1, 3)), budget=0.5, loss=0.1)
    plan = plan_prompts(["a", "b"], np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"embeddings must be \[n, d\] with n · images_per_prompt = 2"):
        expected_loss(plan, np.ones((3, 3)))


def test_the_loss_of_a_tree_adds_up_along_the_path():
    loss = LossTable.power(2.0, 1.0, 2.0)
    angles = np.array([0.0, 0.3, 1.2])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    plan = tree_plan(["a", "b", "c"], vectors, share=(0.0, 1.0), similarity=0.0)
    root = plan.roots[0]
    inner = next(node for node in root.children if len(node.members) == 2)
    calls = 1000
    first, second = round(root.until * calls) / calls, round(inner.until * calls) / calls
    whole = similarity_matrix(vectors)
    of_root = loss(whole.min(), first)
    expected = [of_root + loss(whole[0, 1], second) - loss(whole[0, 1], first)] * 2 + [of_root]
    assert expected_loss(plan, vectors, loss, calls) == pytest.approx(expected, rel=1e-9)


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_prices_are_the_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    count, calls = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    parents = np.array([int(rng.integers(i + 1, count)) if i + 1 < count and rng.random() < 0.9 else -1 for i in range(count)], np.int32)
    gains = np.rint(rng.standard_normal((count, calls)) * rng.choice([1, 10]))
    prices = split_prices(parents, gains)
    assert prices.shape == gains.shape
    child = np.flatnonzero(parents >= 0)
    assert (prices[parents[child]] >= prices[child]).all()
    closed = [chosen for chosen in itertools.product([0, 1], repeat=count) if all(chosen[parents[i]] >= chosen[i] for i in child)]
    for call in range(calls):
        for price in [*set(prices[:, call].tolist()), float(rng.standard_normal())]:
            best = max(np.dot(chosen, gains[:, call] - price) for chosen in closed)
            assert np.dot(prices[:, call] > price, gains[:, call] - price) == pytest.approx(best, abs=1e-9)
            assert np.dot(prices[:, call] >= price, gains[:, call] - price) == pytest.approx(best, abs=1e-9)


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_compiled_and_python_prices_are_equal(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 400))
    reach = int(rng.choice([1, 3, 400]))  # chains, bushes, stars
    parents = np.array([min(i + int(rng.integers(1, reach + 1)), count - 1) for i in range(count - 1)] + [-1] * (count > 0), np.int32)
    gains = rng.standard_normal((count, 3))
    gains[:, 1] = np.rint(gains[:, 1])  # ties
    assert (split_prices(parents, gains) == split_prices_python(parents, gains)).all()
