"""Sharing plans: validation, resolution into calls, JSON, drawing."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.plan import Leaf, Node, SharingPlan

LEAVES = tuple(Leaf(prompt) for prompt in ("fox", "wolf", "dog", "cat", "boat"))
SINGLES = tuple(map(Node.single, range(5)))


def test_control_characters_do_not_reach_the_terminal():
    text = SharingPlan.independent([Leaf("a \x1b[31mred\x9b fox\x07 \u202eback")]).describe()
    assert "a �[31mred� fox� �back" in text
    assert not [letter for letter in text if letter in "\x1b\x9b\x07\u202e"]


def random_node(rng: random.Random, members: list[int], above: float) -> Node:
    """A random tree over members; shares are often equal to simple fractions, where rounding matters."""
    if len(members) == 1:
        return Node.single(members[0])
    until = rng.choice([rng.uniform(above, 1), above + (1 - above) * rng.choice([0.25, 0.5, 1.0])])
    if until <= above:
        until = 1.0
    representative = rng.choice(members)
    if until >= 1.0:
        return Node(members, representative, 1.0)
    cuts = sorted(rng.sample(range(1, len(members)), rng.randint(1, len(members) - 1)))
    parts = [members[a:b] for a, b in zip([0, *cuts], [*cuts, len(members)], strict=True)]
    return Node(members, representative, until, tuple(random_node(rng, part, until) for part in parts))


def random_plan(rng: random.Random) -> SharingPlan:
    count = rng.randint(1, 12)
    leaves = [Leaf(rng.choice(["a", "b", "c d", "ü\n\"🦊"]), i, rng.choice([None, i, 2**63])) for i in range(count)]
    order = rng.sample(range(count), count)
    roots = []
    while order:
        size = rng.randint(1, len(order))
        roots.append(random_node(rng, order[:size], rng.choice([-1e-9, 0.0])))
        order = order[size:]
    return SharingPlan.tree(leaves, roots, encoder=rng.choice(["", "x"]), similarity=rng.choice([None, 0.6]))


plans = st.integers(0, 2**32).map(lambda seed: random_plan(random.Random(seed)))
calls = st.integers(1, 30)


def boundaries_of(num_calls: int, seed: int) -> list[bool] | None:
    rng = random.Random(seed)
    return rng.choice([None, [rng.random() < 0.5 for _ in range(num_calls)]])


@given(plans, calls, st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_resolved_plan_is_a_chain_of_refining_partitions(plan, num_calls, seed):
    boundaries = boundaries_of(num_calls, seed)
    resolved = plan.resolve(num_calls, boundaries)
    num_leaves = len(plan.leaves)
    assert len(resolved.members) == resolved.num_calls == num_calls
    for call, nodes in enumerate(resolved.members):
        assert sorted(leaf for members in nodes for leaf in members) == list(range(num_leaves))
        assert [min(members) for members in nodes] == sorted(min(members) for members in nodes)
        labels, representatives = resolved.labels(call), resolved.representatives(call)
        assert labels.dtype == representatives.dtype == np.int64
        for row, members in enumerate(nodes):
            assert set(np.flatnonzero(labels == row)) == set(members)
            assert representatives[row] in members
        assert (resolved.rep_of(call) == representatives[labels]).all()
        if call < num_calls - 1:
            parent = resolved.parent(call)
            assert (parent[resolved.labels(call + 1)] == labels).all()
            assert parent.shape == (len(resolved.members[call + 1]),)
            grew = resolved.rows[call + 1] > resolved.rows[call]
            assert resolved.branches_after(call) == grew
            assert not grew or boundaries is None or boundaries[call]
    assert resolved.nfe == sum(resolved.rows) == sum(map(len, resolved.members))
    assert resolved.saving == pytest.approx(1 - resolved.nfe / (num_leaves * num_calls))


@given(plans, calls)
@settings(max_examples=60, deadline=None)
def test_every_leaf_that_parts_runs_alone_at_the_last_call(plan, num_calls):
    resolved = plan.resolve(num_calls)
    together = {leaf for root in plan.roots for node, _ in root.walk() if node.until == 1.0 and len(node.members) > 1
                for leaf in node.members}
    for leaf in range(len(plan.leaves)):
        alone = [call for call in range(num_calls) if (leaf,) in resolved.members[call]]
        assert bool(alone) == (leaf not in together)
        assert resolved.branch_call(leaf) == (alone[0] if alone else num_calls)
        assert alone == list(range(resolved.branch_call(leaf), num_calls))


@given(plans, calls)
@settings(max_examples=60, deadline=None)
def test_without_boundaries_a_node_parts_at_the_rounded_share(plan, num_calls):
    runs = {id(node): end for _, end, node in plan.intervals(num_calls)}
    for root in plan.roots:
        for node, _ in root.walk():
            if id(node) in runs:
                rounded = int(np.floor(node.until * num_calls + 0.5))
                assert runs[id(node)] == (num_calls if node.until == 1.0 else min(rounded, num_calls - 1))


@given(plans, calls, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_subset_and_resolve_commute(plan, num_calls, seed):
    rng = random.Random(seed)
    roots = rng.sample(range(len(plan.roots)), rng.randint(1, len(plan.roots)))
    small, original = plan.subset(roots)
    assert [plan.leaves[index] for index in original] == list(small.leaves)
    assert sorted(original) == list(original) and original.dtype == np.int64
    resolved, part = plan.resolve(num_calls), small.resolve(num_calls)
    for call in range(num_calls):
        whole = dict(zip(resolved.members[call], resolved.representatives(call), strict=True))
        mine = {tuple(original[list(members)]): original[representative] for members, representative
                in zip(part.members[call], part.representatives(call), strict=True)}
        assert mine.items() <= whole.items()
    assert set(original) == {leaf for root in roots for leaf in plan.roots[root].members}


@given(plans)
@settings(max_examples=60, deadline=None)
def test_json_round_trip(plan):
    again = SharingPlan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["version"] == 1


@given(plans, calls)
@settings(max_examples=50, deadline=None)
def test_description_names_every_prompt_and_the_cost(plan, num_calls):
    text = plan.describe(num_calls)
    for leaf in plan.leaves:
        assert " ".join(leaf.prompt.split()) in text
    assert f"{plan.cost(num_calls).nfe} instead of {len(plan.leaves) * num_calls}" in text
    assert len(plan.describe(num_calls, max_groups=1)) <= len(text) + 60


def test_save_and_load(tmp_path):
    plan = SharingPlan.flat([Leaf("ein Füchslein 🦊", seed=7), Leaf("x")], [[0, 1]], 0.3)
    plan.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == plan


def test_flat_plan_by_hand():
    plan = SharingPlan.flat(LEAVES, [[2, 0], [4, 3]], 0.4, [2, 3])
    resolved = plan.resolve(5)
    assert resolved.rows == [3, 3, 5, 5, 5]
    assert resolved.labels(0).tolist() == [0, 1, 0, 2, 2]
    assert resolved.rep_of(1).tolist() == [2, 1, 2, 3, 3]
    assert resolved.parent(0).tolist() == [0, 1, 2]
    assert resolved.parent(1).tolist() == [0, 1, 0, 2, 2]
    assert [resolved.branch_call(leaf) for leaf in range(5)] == [2, 0, 2, 2, 2]
    assert plan.cost(5) == (21, 25, pytest.approx(0.16))
    assert plan.root_of.tolist() == [0, 1, 0, 2, 2]
    assert plan == SharingPlan.flat(LEAVES, [[3, 4], [1], [0, 2]], [0.4, 0.9, 0.4], [3, 1, 2])


def test_tree_plan_by_hand():
    pair = Node((1, 2), 2, 0.6, SINGLES[1:3])
    plan = SharingPlan.tree(LEAVES[:4], [Node((0, 1, 2), 1, 0.2, (pair, SINGLES[0]))])
    resolved = plan.resolve(10)
    assert resolved.rows == [2] * 2 + [3] * 4 + [4] * 4
    assert resolved.representatives(1).tolist() == [1, 3] and resolved.representatives(2).tolist() == [0, 2, 3]
    assert resolved.parent(1).tolist() == [0, 0, 1]
    assert [resolved.branch_call(leaf) for leaf in range(4)] == [2, 6, 6, 0]


def test_share_of_0_is_independent_and_share_of_1_never_parts():
    none, all_ = (SharingPlan.flat(LEAVES, [range(5)], share) for share in (0, 1))
    assert none.resolve(7).members == SharingPlan.independent(LEAVES).resolve(7).members
    assert none.cost(7).saving == 0
    assert all_.resolve(7).rows == [1] * 7 and all_.resolve(7).branch_call(3) == 7


def test_groups_of_one_equal_no_sharing():
    assert SharingPlan.flat(LEAVES, [[i] for i in range(5)], 0.4) == SharingPlan.independent(LEAVES)


def test_one_call_shares_nothing():
    assert SharingPlan.flat(LEAVES, [range(5)], 0.99).resolve(1).rows == [5]


def test_branching_waits_for_the_end_of_a_step():
    """Heun: calls 0 1 | 2 3 | 4 5 | 6; rows may multiply after calls 1, 3, 5 and 6."""
    boundaries = [False, True, False, True, False, True, True]
    branch = [SharingPlan.flat(LEAVES, [range(5)], until).resolve(7, boundaries).branch_call(0)
              for until in (0, 1 / 7, 2 / 7, 3 / 7, 5 / 7, 0.99, 1)]
    assert branch == [0, 2, 2, 4, 6, 6, 7]
    never = SharingPlan.flat(LEAVES, [range(5)], 0.5).resolve(3, [False, False, True])
    assert never.branch_call(0) == 0  # no boundary to part at: better no sharing than equal images


def test_default_representative_does_not_depend_on_order():
    forward = SharingPlan.flat(LEAVES, [range(5)], 0.4)
    backward = SharingPlan.flat(LEAVES[::-1], [range(5)], 0.4)
    prompts = {plan.leaves[plan.roots[0].representative].prompt for plan in (forward, backward)}
    assert prompts == {"boat"}
    seeds = SharingPlan.flat([Leaf("a", 0, 9), Leaf("a", 1, 3)], [[0, 1]], 0.4)
    assert seeds.roots[0].representative == 1


def test_order_of_members_and_children_does_not_matter():
    assert Node((2, 0, 1), 1, 0.5, SINGLES[2::-1]) == Node((0, 1, 2), 1, 0.5, SINGLES[:3])
    assert SharingPlan(LEAVES, SINGLES[::-1]) == SharingPlan(LEAVES, SINGLES)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Leaf(3), "prompt must be a str"),
    (lambda: Leaf("a", -1), "image_index must be at least 0"),
    (lambda: Leaf("a", 0, 2**64), "seed must fit in 64 bits"),
    (lambda: Leaf("a", 0, 1.5), "seed must be an integer"),
    (lambda: Leaf("a", True), "image_index must be an integer"),
    (lambda: Node((), 0, 1.0), "members must name at least one leaf"),
    (lambda: Node((0, 0), 0, 1.0), "members must be distinct"),
    (lambda: Node((0, -1), 0, 1.0), "members must be at least 0"),
    (lambda: Node("01", 0, 1.0), "members must be a sequence"),
    (lambda: Node((0, 1), 2, 1.0), r"representative must be one of the members \[0, 1\], got 2"),
    (lambda: Node((0, 1), 0, 1.2), r"until must be in \[0, 1\], got 1.2"),
    (lambda: Node((0, 1), 0, float("nan")), r"until must be in \[0, 1\], got nan"),
    (lambda: Node((0, 1), 0, "0.5"), "until must be a number"),
    (lambda: Node((0,), 0, 0.5), "until of a single leaf must be 1.0"),
    (lambda: Node((0, 1), 0, 0.5), "no children to part into"),
    (lambda: Node((0, 1), 0, 1.0, SINGLES[:2]), "never parts"),
    (lambda: Node((0, 1), 0, 0.5, (Node((0, 1), 0, 1.0),)), "at least two nodes"),
    (lambda: Node((0, 1), 0, 0.5, SINGLES[:3]), "children must partition members"),
    (lambda: Node((0, 1, 2), 0, 0.5, SINGLES[:2]), "children must partition members"),
    (lambda: Node((0, 1), 0, 0.5, (0, 1)), "children must be Node"),
    (lambda: Node((0, 1, 2), 0, 0.5, (Node((0, 1), 0, 0.5, SINGLES[:2]), SINGLES[2])), "increase down the tree"),
    (lambda: SharingPlan((), ()), "at least one Leaf"),
    (lambda: SharingPlan(("a",), (SINGLES[0],)), r"leaves\[0\] must be a Leaf"),
    (lambda: SharingPlan(LEAVES, SINGLES[:4]), r"leaves \[4\] are in none"),
    (lambda: SharingPlan(LEAVES[:2], SINGLES), "roots.2. names leaf 2, but there are 2 leaves"),
    (lambda: SharingPlan(LEAVES, (*SINGLES, SINGLES[1])), r"leaf 1 is in roots\[1\] and roots\[5\]"),
    (lambda: SharingPlan(LEAVES, SINGLES, encoder=None), "encoder must be a str"),
    (lambda: SharingPlan(LEAVES, SINGLES, similarity=2), r"similarity must be in \[-1, 1\]"),
    (lambda: SharingPlan.tree([Leaf("a")] * 171, [chain(70)]), "more than 64 branches"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 9]], 0.4), r"groups\[0\] must hold leaf indices below 5"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 1], [1, 2]], 0.4), "roots must not overlap, but leaf 1"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 1]], 40), r"share must be in \[0, 1\], got 40"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 1]], [0.1, 0.2]), "one number or one per group, 1, got 2"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 1]], 0.4, [0, 1]), "one leaf per group, 1, got 2"),
    (lambda: SharingPlan.flat(LEAVES, [[0, 1]], 0.4, [2]), "representative must be one of the members"),
    (lambda: SharingPlan.independent(LEAVES).subset([]), "at least one"),
    (lambda: SharingPlan.independent(LEAVES).subset([5]), "distinct indices below 5"),
    (lambda: SharingPlan.independent(LEAVES).resolve(0), "num_calls must be at least 1"),
    (lambda: SharingPlan.independent(LEAVES).resolve(2.0), "num_calls must be an integer"),
    (lambda: SharingPlan.independent(LEAVES).resolve(3, [True]), r"boundaries must be bool \[3\]"),
    (lambda: SharingPlan.independent(LEAVES).resolve(3, [1, 0, 1]), r"boundaries must be bool \[3\], got int64"),
    (lambda: SharingPlan.independent(LEAVES).resolve(3).labels(3), r"call must be in \[0, 3\), got 3"),
    (lambda: SharingPlan.independent(LEAVES).resolve(3).parent(2), "call must be below 2"),
    (lambda: SharingPlan.independent(LEAVES).resolve(3).branch_call(5), r"leaf must be in \[0, 5\)"),
])
def test_bad_input_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def chain(depth: int) -> Node:
    """A tree with `depth` branches on one path, over leaf 0 and others."""
    node = Node.single(0)
    for level in range(depth):
        members = (0, *range(100, 101 + level))
        node = Node(members, 0, 0.9 * (1 - level / depth), (node, Node.single(100 + level)))
    return node


def edited(**changes) -> str:
    data = json.loads(SharingPlan.flat(LEAVES, [[0, 1]], 0.4).to_json())
    return json.dumps({key: value for key, value in {**data, **changes}.items() if value != "drop"})


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not JSON"),
    ("[" * 100_000, "nested too deep|not JSON"),
    ("[]", "not a sharing plan"),
    (edited(format="other"), "not a sharing plan"),
    (edited(version=2), "version must be 1, got 2; the plan may come from a newer"),
    (edited(version="drop"), "version must be 1, got None"),
    (edited(leaves="drop"), "the plan lacks leaves"),
    (edited(comment=1), "unknown keys comment"),
    (edited(leaves={}), "leaves must be a list"),
    (edited(leaves=[{"prompt": 3, "image_index": 0, "seed": None}]), r"leaves\[0\]: Leaf: prompt must be a str"),
    (edited(leaves=[{"prompt": "a"}]), r"leaves\[0\] lacks image_index, seed"),
    (edited(roots=[0, True]), r"roots\[1\] must be an object, got True"),
    (edited(roots=[0, 1, 2, 3]), r"leaves \[4\] are in none"),
    (edited(roots=[{"members": [0, 1], "representative": 0, "until": 0.4, "children": [0, -1]}]),
     r"roots\[0\].children\[1\]: Node: members must be at least 0"),
    (edited(roots=[{"members": [0.0, 1], "representative": 0, "until": 1, "children": []}]), "must be an integer"),
    (edited(similarity="high"), "similarity must be a number or None"),
    (edited().replace("0.4", "NaN"), "NaN is not a number"),
    (3, "text must be a str"),
])
def test_malformed_json_is_named(text, message):
    with pytest.raises((TypeError, ValueError), match=f"SharingPlan.from_json: .*({message})"):
        SharingPlan.from_json(text)


def test_description_of_a_tree():
    pair = Node((1, 2), 2, 0.6, SINGLES[1:3])
    root = Node((0, 1, 2), 1, 0.2, (pair, SINGLES[0]))
    plan = SharingPlan.tree(LEAVES[:4], [root], encoder="counts", similarity=0.5)
    assert plan.describe(10).splitlines() == [
        "4 images: 1 group of 3 (mean 3.00), 1 alone; mean size of all 2.00, encoder counts, similarity at least 0.5",
        "",
        "group 1, 3 images: one row for calls 0 to 1 of 10 (share 0.2)",
        "  ├─ fox",
        "  └─*2 images: one row for calls 2 to 5 of 10 (share 0.6)",
        "      ├─ wolf",
        "      └─*dog",
        "",
        "alone, 1 image:",
        "    cat",
        "",
        "10 calls: 2 rows at the first, 4 at the last  (* gives the noise of the shared part)",
        "denoiser rows (nfe): 32 instead of 40, 20.0% saved; copies for guidance are counted separately",
    ]


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws plans and is not installed")
    leaves = [*LEAVES, Leaf("costs $5 and $x^{ _broken"), Leaf("never\nparts"), Leaf("either")]
    plan = SharingPlan.tree(leaves, [Node((0, 2), 2, 0.4, SINGLES[0:3:2]), Node((6, 7), 6, 1.0)])
    for number, drawn in enumerate((plan, SharingPlan.independent(LEAVES[:1]))):
        path = tmp_path / f"{number}.png"
        drawn.plot(path, num_calls=6, max_leaves=7)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        SharingPlan.independent(LEAVES).plot(tmp_path / "plan.png")
