"""Groups of prompts, and the plans made of them, against brute force."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.embed import Embeddings
from sage.grouping import group, medoid, similarity_matrix
from sage.plans import plan_prompts, tree_plan

ROUNDING = 1e-6  # similarities are compared to six decimals


def random_vectors(seed: int, most: int = 24) -> np.ndarray:
    """A few clusters with equal vectors, opposite ones and near-ties among them."""
    rng = np.random.default_rng(seed)
    count, width = int(rng.integers(1, most + 1)), int(rng.integers(1, 7))
    centres = rng.standard_normal((4, width))
    vectors = centres[rng.integers(0, 4, count)] + rng.choice([0.0, 0.3, 1.0]) * rng.standard_normal((count, width))
    kind = rng.integers(0, 4)
    if kind == 0:
        vectors = np.rint(vectors) + (np.rint(vectors) == 0).all(axis=1, keepdims=True)  # many exact ties
    if kind == 1:
        vectors[rng.integers(0, count)] *= -1e6
    return vectors.astype(rng.choice([np.float32, np.float64]))


def cosines(vectors: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, dtype=np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def groups_by_key(vectors, keys, similarity, max_size) -> set[frozenset[str]]:
    return {frozenset(keys[i] for i in members) for members in group(vectors, keys, similarity, max_size)}


cases = {"seed": st.integers(0, 2**32), "similarity": st.sampled_from([-0.5, 0.0, 0.3, 0.6, 0.9, 1.0]),
         "max_size": st.integers(1, 9)}


@given(**cases)
@settings(max_examples=200, deadline=None)
def test_groups_are_maximal_cliques_within_the_cap(seed, similarity, max_size):
    vectors = random_vectors(seed)
    keys = [f"prompt {i}" for i in range(len(vectors))]
    cosine = cosines(vectors)
    groups = group(vectors, keys, similarity, max_size)
    assert sorted(i for members in groups for i in members) == list(range(len(vectors)))
    assert groups == sorted(tuple(sorted(members)) for members in groups)
    for members in groups:
        assert len(members) <= max_size
        assert cosine[np.ix_(members, members)].min() >= similarity - ROUNDING
    for i, one in enumerate(groups):
        for other in groups[:i]:
            joint = one + other
            assert len(joint) > max_size or cosine[np.ix_(joint, joint)].min() < similarity + ROUNDING


@given(**cases)
@settings(max_examples=100, deadline=None)
def test_groups_do_not_depend_on_the_order(seed, similarity, max_size):
    vectors = random_vectors(seed)
    keys = [f"prompt {i % 7} {i}" for i in range(len(vectors))]
    expected = groups_by_key(vectors, keys, similarity, max_size)
    for shuffle in range(3):
        order = random.Random(shuffle).sample(range(len(keys)), len(keys))
        assert groups_by_key(vectors[order], [keys[i] for i in order], similarity, max_size) == expected


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_medoid_is_the_most_central_member_in_any_order(seed):
    vectors = random_vectors(seed)
    keys = [f"{i}" for i in range(len(vectors))]
    rng = random.Random(seed)
    members = rng.sample(range(len(keys)), rng.randint(1, len(keys)))
    chosen = medoid(vectors, members, keys)
    means = cosines(vectors)[np.ix_(members, members)].mean(axis=1)
    assert means[members.index(chosen)] >= means.max() - ROUNDING
    assert medoid(vectors, members[::-1], keys) == chosen


def test_medoid_ties_go_by_text():
    assert medoid(np.eye(3), [0, 1, 2], ["b", "a", "c"]) == 1
    assert medoid(np.eye(2), [0, 1], ["z", "y"]) == 1


def test_similarities_are_the_same_whatever_else_is_embedded():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1500, 384)).astype(np.float32) + 1
    whole = similarity_matrix(vectors)
    assert np.abs(whole - cosines(vectors)).max() < 0.6 * ROUNDING
    assert (whole == whole.T).all() and (whole.diagonal() == 1).all()
    some = rng.permutation(1500)[:37]
    assert (similarity_matrix(vectors[some]) == whole[np.ix_(some, some)]).all()
    assert (similarity_matrix(vectors[some] * 2.0 ** rng.integers(-300, 300, (37, 1))) == whole[np.ix_(some, some)]).all()


def test_pairs_just_at_the_threshold_group_and_just_below_do_not():
    for similarity in (0.6, -0.25, 0.999999):
        angle = np.arccos(similarity)
        for step, expected in ((0.0, 1), (1e-9, 1), (2e-5, 2)):
            vectors = np.array([[1.0, 0.0], [np.cos(angle + step), np.sin(angle + step)]])
            if np.cos(angle) - np.cos(angle + step) > ROUNDING or expected == 1:
                assert len(group(vectors, ["a", "b"], similarity)) == expected, (similarity, step)


def test_equal_prompts_vectors_fill_groups_to_the_cap():
    groups = group(np.ones((20, 5), np.float32), [f"{i:02}" for i in range(20)], 1.0, 8)
    assert [len(members) for members in groups] == [8, 8, 4]
    assert groups[0] == tuple(range(8))


def test_one_prompt_and_integer_embeddings():
    assert group(np.ones((1, 3)), ["a"]) == [(0,)]
    assert group(np.array([[1, 0], [2, 0], [0, 3]]), ["a", "b", "c"]) == [(0, 1), (2,)]


def test_thousands_of_prompts_take_about_a_second():
    rng = np.random.default_rng(1)
    words = rng.standard_normal((40, 384))
    vectors = words[rng.integers(0, 20, 1632)] + words[rng.integers(20, 40, 1632)]
    vectors = (vectors + 0.5 * rng.standard_normal(vectors.shape)).astype(np.float32)
    start = time.perf_counter()
    groups = group(vectors, [f"{i}" for i in range(1632)], 0.6)
    assert time.perf_counter() - start < 10  # about half a second on an idle core; a slow or busy machine passes too
    assert 1632 / len(groups) > 2


PROMPTS = ["red fox", "boat", "blue fox", "red fox", "old boat", "moon"]
VECTORS = np.array([[1, 0, 0], [0, 1, 0], [0.9, 0, 0.1], [1, 0, 0], [0.1, 1, 0], [0, 0, 1]])


def test_plan_of_repeated_prompts_and_several_images():
    plan = plan_prompts(PROMPTS, VECTORS, share=0.3, images_per_prompt=2, encoder_name="hand", seeds=range(100, 112))
    assert [leaf.prompt for leaf in plan.leaves] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [leaf.image_index for leaf in plan.leaves] == [0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 0, 1]
    assert [leaf.seed for leaf in plan.leaves] == list(range(100, 112))
    assert (plan.encoder, plan.similarity) == ("hand", 0.6)
    shared = [root.members for root in plan.roots if len(root.members) > 1]
    assert shared == [(0, 4), (1, 5), (2, 8), (3, 9)]  # image k of each; images 2 and 3 of "red fox" run alone
    assert {root.until for root in plan.roots if len(root.members) > 1} == {0.3}


def test_images_of_one_prompt_never_share():
    plan = plan_prompts(["fox"] * 5, np.ones((5, 3)), images_per_prompt=3)
    assert plan.resolve(10).rows == [15] * 10
    assert [leaf.image_index for leaf in plan.leaves] == list(range(15))


@given(seed=st.integers(0, 2**32), images=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_plan_does_not_depend_on_the_order_of_the_prompts(seed, images):
    rng = random.Random(seed)
    vectors = random_vectors(seed, 12)
    chosen = [rng.randrange(len(vectors)) for _ in range(len(vectors))]  # with repeats

    def shape(order, make, share):
        prompts = [f"prompt {i}" for i in order]
        plan = make(prompts, vectors[order], share=share, images_per_prompt=images, max_group_size=4)
        name = [(leaf.prompt, leaf.image_index) for leaf in plan.leaves]
        assert len(set(name)) == len(name)
        resolved = plan.resolve(20)
        return [{(frozenset(name[i] for i in members), name[representative]) for members, representative
                 in zip(resolved.members[call], resolved.representatives(call), strict=True)} for call in range(20)]

    for make, share in ((plan_prompts, 0.4), (tree_plan, (0.1, 0.8))):
        assert shape(chosen, make, share) == shape(rng.sample(chosen, len(chosen)), make, share)


@given(seed=st.integers(0, 2**32), images=st.integers(1, 2), similarity=st.sampled_from([-0.5, 0.2, 0.6, 1.0]))
@settings(max_examples=100, deadline=None)
def test_tree_plan_parts_the_less_alike_earlier(seed, images, similarity):
    vectors = random_vectors(seed)
    rng = random.Random(seed)
    chosen = [rng.randrange(len(vectors)) for _ in range(len(vectors))]
    prompts, rows = [f"prompt {i:02}" for i in chosen], vectors[chosen]
    options = {"similarity": similarity, "images_per_prompt": images}
    tree = tree_plan(prompts, rows, share=(0.2, 0.7), **options)
    alike = similarity_matrix(rows)
    for root in tree.roots:
        for node, _ in root.walk():
            if len(node.members) > 1:
                places = [leaf // images for leaf in node.members]
                least = alike[np.ix_(places, places)].min()
                wanted = 0.2 + 0.5 * ((least - similarity) / (1 - similarity) if similarity < 1 else 1)
                # Where a prompt has no image of this index, it still counts for when the others part.
                assert node.until <= wanted + 1e-9
                assert node.until == pytest.approx(wanted) or len(set(prompts)) < len(prompts)
    flat = plan_prompts(prompts, rows, share=0.4, **options)
    assert flat == tree_plan(prompts, rows, share=(0.4, 0.4), **options)
    assert {root.members for root in flat.roots} == {root.members for root in tree.roots}


def test_each_group_parts_by_its_own_similarity():
    vectors = np.array([[1.0, 0], [0.8, 0.6], [-1, 0], [-1, 0.01], [0, -1]])
    plan = plan_prompts(list("abcde"), vectors, share=(0.2, 0.6), similarity=0.6)
    assert [(root.members, round(root.until, 3)) for root in plan.roots] == [((0, 1), 0.4), ((2, 3), 0.6), ((4,), 1.0)]
    alike = similarity_matrix(vectors)[2, 3]
    assert plan.roots[1].until == 0.2 + (0.6 - 0.2) * (alike - 0.6) / 0.4
    assert plan_prompts(list("abcde"), vectors, share=(0.3, 0.3)) == plan_prompts(list("abcde"), vectors, share=0.3)


def test_shares_at_the_ends():
    alone = plan_prompts(PROMPTS, VECTORS, share=0)
    assert alone.cost(20).saving == 0
    equal = plan_prompts(PROMPTS, VECTORS, share=1)
    assert equal.resolve(20).rows == [4] * 20
    assert tree_plan(PROMPTS, VECTORS, share=(0, 1)).cost(20).saving > 0


def test_prompts_that_must_stay_alone():
    alone = np.array([False, False, True, False, False, False])
    plan = plan_prompts(PROMPTS, VECTORS, alone=alone)
    assert [root.members for root in plan.roots if len(root.members) > 1] == [(1, 4)]
    found = Embeddings(VECTORS.astype(np.float32), "some encoder", alone)
    assert plan_prompts(PROMPTS, found).roots == plan.roots
    assert plan_prompts(PROMPTS, found).encoder == "some encoder"
    nobody = plan_prompts(PROMPTS, np.zeros((6, 3)), alone=[True] * 6)  # their embeddings need mean nothing
    assert nobody.resolve(3).rows == [6, 6, 6]


NAN, ZERO = VECTORS.copy(), VECTORS.copy()
NAN[4, 1], ZERO[2] = np.nan, 0


@pytest.mark.parametrize(("make", "message"), [
    (lambda: group(NAN, PROMPTS), r"group: embeddings must be finite, but rows \[4\]"),
    (lambda: group(np.full((6, 3), np.inf), PROMPTS), "must be finite, but rows"),
    (lambda: group(ZERO, PROMPTS), r"group: embeddings must not be zero, but rows \[2\]"),
    (lambda: group(VECTORS[:5], PROMPTS), r"must be \[6, d\].*got \[5, 3\]"),
    (lambda: group(VECTORS[0], PROMPTS), r"must be \[6, d\].*got \[3\]"),
    (lambda: group(VECTORS[:, :0], PROMPTS), r"d ≥ 1.*got \[6, 0\]"),
    (lambda: group(VECTORS.astype(str), PROMPTS), "must be numbers"),
    (lambda: group(VECTORS > 0, PROMPTS), "must be numbers, got ndarray of dtype bool"),
    (lambda: group(VECTORS[:0], []), "keys must hold at least one prompt"),
    (lambda: group(VECTORS, "abcdef"), "keys must be a sequence of str"),
    (lambda: group(VECTORS, [1, 2, 3, 4, 5, 6]), r"keys\[0\] must be a str"),
    (lambda: group(VECTORS, PROMPTS, -1.0), r"similarity must be in \(-1, 1\], got -1.0"),
    (lambda: group(VECTORS, PROMPTS, 1.1), r"similarity must be in \(-1, 1\]"),
    (lambda: group(VECTORS, PROMPTS, float("nan")), r"similarity must be in \(-1, 1\], got nan"),
    (lambda: group(VECTORS, PROMPTS, "0.6"), "similarity must be a number"),
    (lambda: group(VECTORS, PROMPTS, 0.6, 0), "max_group_size must be at least 1"),
    (lambda: group(VECTORS, PROMPTS, 0.6, 2.5), "max_group_size must be an integer"),
    (lambda: medoid(VECTORS, [], PROMPTS), "members must be indices below 6, at least one"),
    (lambda: medoid(VECTORS, [6], PROMPTS), "members must be indices below 6"),
    (lambda: similarity_matrix(ZERO), "similarity_matrix: embeddings must not be zero"),
    (lambda: plan_prompts([], VECTORS[:0]), "plan_prompts: prompts must hold at least one"),
    (lambda: plan_prompts(PROMPTS, VECTORS[:4]), r"embeddings must be \[6, d\]"),
    (lambda: plan_prompts(PROMPTS, NAN), "must be finite"),
    (lambda: plan_prompts(PROMPTS, VECTORS, share=1.4), r"plan_prompts: share must be in \[0, 1\], got 1.4"),
    (lambda: plan_prompts(PROMPTS, VECTORS, share=-0.1), r"share must be in \[0, 1\]"),
    (lambda: plan_prompts(PROMPTS, VECTORS, share="0.4"), "plan_prompts: share must be a number"),
    (lambda: plan_prompts(PROMPTS, VECTORS, share=(0.2, 0.4, 0.6)), r"share must be two numbers \(low, high\), got"),
    (lambda: plan_prompts(PROMPTS, VECTORS, share=(0.6, 0.4)), "plan_prompts: share must be .low, high. with low <= high"),
    (lambda: plan_prompts(PROMPTS, VECTORS, similarity=3), r"plan_prompts: similarity must be in \(-1, 1\]"),
    (lambda: plan_prompts(PROMPTS, VECTORS, max_group_size=0), "plan_prompts: max_group_size must be at least 1"),
    (lambda: plan_prompts(PROMPTS, VECTORS, images_per_prompt=0), "images_per_prompt must be at least 1"),
    (lambda: plan_prompts(PROMPTS, VECTORS, seeds=[1] * 5), "one seed per image, 6 .6 prompts × 1., got 5"),
    (lambda: plan_prompts(PROMPTS, VECTORS, seeds=7), "one seed per image.*got 7"),
    (lambda: plan_prompts(PROMPTS, VECTORS, seeds=["x"] * 6), "seed must be an integer"),
    (lambda: plan_prompts(PROMPTS, VECTORS, alone=[True]), r"alone must be bool \[6\]"),
    (lambda: plan_prompts(PROMPTS, VECTORS, alone=[1] * 6), r"alone must be bool \[6\], one per prompt, got int64"),
    (lambda: plan_prompts(["a"] * 6, VECTORS), "embeddings of equal prompts must be equal, but those of 'a' differ"),
    (lambda: tree_plan(PROMPTS, VECTORS, share=0.4), r"share must be two numbers \(low, high\), got 0.4"),
    (lambda: tree_plan(PROMPTS, VECTORS, share=(0.5, 0.4)), "low <= high"),
    (lambda: tree_plan(PROMPTS, VECTORS, share=(0.5, 1.4)), r"share\[1\] must be in \[0, 1\]"),
    (lambda: tree_plan(PROMPTS, VECTORS, similarity=-2), r"tree_plan: similarity must be in \(-1, 1\]"),
])
def test_bad_input_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
