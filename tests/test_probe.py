"""Groups that part early because a probe found their members apart: against loops by hand, by both engines, and what is refused."""

import math
from itertools import pairwise

import native_cases
import pytest
import torch
from hand_branch import GUIDANCE, LEAVES, SEEDS, STEPS, Row, Setting
from measures import worst
from native_cases import CASES, Rows
from tiny import NEGATIVES, PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, Probe, SageScheduler, SharingPlan
from sage.solvers import table_for

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP, PAIR, OWN = [0, 2, 4], [1, 3], torch.tensor(SEEDS)
HAND = ("ddim", "euler", "dpm++2m", "dpm++3m", "unipc", "euler-a", "dpm++2m-sde", "heun")
HOOKED = ("ddim", "euler", "dpm++2m", "dpm++3m", "unipc", "heun")  # the hook's noise is torch's: those that draw none
FLAT = SharingPlan.flat(LEAVES, [GROUP, PAIR], [0.75, 0.9], representatives=[2, 1])
LATE = Node((0, 2), 0, 0.9, (Node.single(0), Node.single(2)))
TREE = SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.7, (LATE, Node.single(4))), Node((1, 3), 3, 0.9, tuple(map(Node.single, PAIR)))])
PLANS = {"flat": FLAT, "tree": TREE}


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


# ---- by hand


def predicted(row: Row, members) -> torch.Tensor:
    """The U-Net's two raw rows, negative and positive, for a row's latents under the mean of some members' conditions."""
    setting, t = row.setting, row.scheduler.timesteps[row.call]
    embeds, negatives = (rows[list(members)].double().mean(0, keepdim=True).float() for rows in (setting.embeds, setting.negatives))
    doubled = row.scheduler.scale_model_input(torch.cat([row.x, row.x]), t)
    with torch.no_grad():
        return setting.unet(doubled, t, encoder_hidden_states=torch.cat([negatives, embeds])).sample


def deviation(row: Row, node: Node) -> float:
    own = predicted(row, node.members)
    return max(((predicted(row, child.members) - own).norm() / own.norm()).item() for child in node.children)


class ByHand:
    """A probed run, every row by itself with a stock scheduler.

    Attributes:
        pictures: [B, ...]
        seen: per call, what was probed: (leaves, deviation, whether it parted).
        rows: per call, evaluated.
    """

    def __init__(self, setting: Setting, plan: SharingPlan, calls: list[int], tolerance: float):
        self.setting, self.calls, self.tolerance = setting, calls, tolerance
        self.total = len(setting.scheduler.timesteps)
        self.pictures, self.seen, self.rows = [None] * len(LEAVES), {}, [0] * self.total
        for root in plan.roots:
            self._walk(Row(setting, setting.x_init[root.representative][None]), root, probed=False)
        self.pictures = torch.stack(self.pictures)

    def _walk(self, row: Row, node: Node, probed: bool) -> None:
        until = min(math.floor(node.until * self.total + 0.5), self.total - 1) if node.children else self.total
        early = False
        while row.call < until:
            self.rows[row.call] += 0 if probed else 1  # its row was the probe's that parted its parent
            if not probed and node.children and row.call in self.calls:
                apart = deviation(row, node)
                early = apart > self.tolerance
                self.seen.setdefault(row.call, []).append((node.members, apart, early))
                self.rows[row.call] += len(node.children)
                if early:
                    break
            row.run(1, list(node.members), node.representative)
            probed = False
        if not node.children:
            self.pictures[node.members[0]] = row.x[0]
        for child in node.children:
            self._walk(row.copy(), child, probed=early)

    def tolerance_between(self) -> float:
        """Such as parts some of the nodes that were seen, and away from all of their deviations."""
        found = sorted(apart for probes in self.seen.values() for _, apart, _ in probes)
        gaps = [(high - low, (low + high) / 2) for low, high in pairwise(found)]
        return max(gaps)[1]


def probe_of(solver: str, tolerance: float) -> tuple[Probe, list[int]]:
    """A probe, and the calls that it is to look at: Heun's steps have two calls, after the second of which a group may part."""
    if solver == "heun":
        return Probe([1 / 11, 3 / 11], tolerance), [2, 4]
    return Probe([1 / STEPS, 3 / STEPS], tolerance), [1, 3]


def check(records: list[dict], hand: ByHand) -> None:
    """The records say what was done by hand."""
    assert [made["call"] for made in records] == sorted(hand.seen)
    for made in records:
        expected = sorted(hand.seen[made["call"]])
        assert made["nodes"] == len(made["groups"]) == len(expected) and made["parted"] == sum(early for _, _, early in expected)
        for group, (leaves, apart, early) in zip(made["groups"], expected):
            assert (tuple(group["leaves"]), group["parted"]) == (leaves, early)
            assert group["deviation"] == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("solver", HAND)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_native_loop_equals_the_loop_by_hand(pipe, solver, plan):
    """For no tolerance, all, and such as part some of the nodes."""
    setting, calls = Setting(pipe, solver), probe_of(solver, 0)[1]
    measured = ByHand(setting, plan, calls, math.inf)
    some, kinds = ByHand(setting, plan, calls, measured.tolerance_between()), set()
    for hand in (measured, some, ByHand(setting, plan, calls, 0.0)):
        courses, counted = [], []
        setting.rows.clear()
        got = setting.sample(plan, probe=probe_of(solver, hand.tolerance)[0], on_probe=courses.append, on_call=counted.append)
        assert worst(got, hand.pictures) <= 5e-6
        assert setting.rows == [2 * rows for rows in counted] and counted == hand.rows
        check(courses[-1].records, hand)
        kinds.add(tuple(made["parted"] for made in courses[-1].records))
    assert len(kinds) == 3, "some tolerance must part some"


@pytest.mark.parametrize("solver", HOOKED)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_hook_equals_the_loop_by_hand(pipe, solver, plan):
    setting, calls = Setting(pipe, solver), probe_of(solver, 0)[1]
    measured = ByHand(setting, plan, calls, math.inf)
    for hand in (measured, ByHand(setting, plan, calls, measured.tolerance_between())):
        with Rows(pipe) as seen:
            got, sharing = hooked(pipe, plan, solver, probe_of(solver, hand.tolerance)[0])
        assert worst(got, hand.pictures) <= 1e-5
        assert sharing.stats["rows"] == hand.rows and seen == [2 * rows for rows in hand.rows]
        check(sharing.stats["probes"], hand)
        nfe, independent = sum(hand.rows), 5 * len(hand.rows)
        assert sharing.stats["nfe"] == nfe and sharing.stats["saving"] == pytest.approx(1 - nfe / independent)
        parted = {leaf for made in sharing.stats["probes"] for g in made["groups"] if g["parted"] for leaf in g["leaves"]}
        for leaf in range(5):
            plain = plan.resolve(len(hand.rows), sharing.stats["boundaries"])
            assert (sharing.resolved.branch_call(leaf) < plain.branch_call(leaf)) == (leaf in parted)


def hooked(pipe, plan, solver, probe, **options):
    """(latents, the handle) of the pipeline's own call."""
    scheduler = pipe.scheduler
    pipe.scheduler = Setting(pipe, solver).scheduler
    try:
        with sage.enable(pipe, plan, probe=probe, **options) as sharing:
            gens = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            given = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
            return pipe(PROMPTS, negative_prompt=NEGATIVES, generator=gens, **given).images, sharing
    finally:
        pipe.scheduler = scheduler


# ---- what follows from the definition


@pytest.mark.parametrize("solver", [*HAND, "deis", "kdpm2", "lcm"])
def test_no_tolerance_is_the_plan_that_parts_there_and_infinite_tolerance_the_plan(pipe, solver):
    setting = Setting(pipe, solver)
    total = len(setting.table)
    parts = 5 if total > STEPS else 2
    plan = SharingPlan.flat(LEAVES, [GROUP, PAIR], 0.9, representatives=[2, 1])
    there = SharingPlan.flat(LEAVES, [GROUP, PAIR], parts / total, representatives=[2, 1])
    options = dict(seeds=OWN) if setting.table.stochastic else {}
    plain, early = setting.sample(plan, **options), setting.sample(there, **options)
    assert worst(setting.sample(plan, probe=Probe([parts / total], math.inf), **options), plain) <= 1e-6
    assert worst(setting.sample(plan, probe=Probe([parts / total], 0), **options), early) <= 1e-6
    assert worst(plain, early) > 1e-2


def elementwise(model_input, timestep, conditions):
    """A denoiser that computes every row by itself, so that equal inputs give equal bits in any batch."""
    phase = (timestep / 300).cos() + conditions.float().mean(1)
    return torch.tanh(model_input * 0.7 + phase.view(-1, 1, 1, 1)) + 0.1 * model_input.roll(1, -1)


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m", "unipc", "euler-a"])
def test_where_rows_do_not_depend_on_each_other_the_bits_are_the_plans(pipe, solver):
    setting = Setting(pipe, solver)
    conditions = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    given = dict(negative_conditions=-conditions, guidance_scale=GUIDANCE)
    given |= dict(seeds=OWN) if setting.table.stochastic else {}

    def run(plan, probe=None):
        return sage.sample(elementwise, plan, setting.table, setting.x_init, conditions, probe=probe, **given)

    assert torch.equal(run(TREE, Probe([0.2, 0.5], math.inf)), run(TREE))
    there = SharingPlan.flat(LEAVES, [GROUP, PAIR], 0.5, representatives=[2, 1])
    assert torch.equal(run(FLAT, Probe([0.5], 0)), run(there)) and not torch.equal(run(FLAT), run(there))


CONDITIONS = torch.tensor([[4.0, 0.0], [8.0, 0.0], [4.0, 3.0], [8.0, 1.0], [4.0, -3.0]])  # means [4, 0] and [8, 0.5]
DEVIATIONS = [3 / 4, 0.5 / math.hypot(8, 0.5)]


def run_mock(plan, probe, seen=None, **options):
    """(result, courses) of a denoiser that predicts its condition, so that every deviation is known; `seen` gets the conditions."""

    def denoise(model_input, timestep, conditions):
        if seen is not None:
            seen.append(conditions.clone())
        return conditions[:, :, None, None].expand(-1, -1, 3, 3).contiguous()

    scheduler = SageScheduler.from_config({}, solver="ddim")
    scheduler.set_timesteps(10)
    courses = []
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    given = (denoise, plan, table_for(scheduler), x, options.pop("conditions", CONDITIONS))
    return sage.sample(*given, probe=probe, on_probe=courses.append, **options), courses


@pytest.mark.parametrize("tolerance, parted", [(0.8, []), (0.7, [0]), (0.07, [0]), (0.06, [0, 1]), (0.0, [0, 1]), (math.inf, [])])
def test_a_node_parts_where_its_deviation_is_above_the_tolerance(tolerance, parted):
    seen = []
    _, courses = run_mock(FLAT, Probe([0.2], tolerance), seen)
    course = courses[0]
    assert len(courses) == 1 and course.records[0]["call"] == 2 and course.records[0]["rows"] == 5
    assert [group["deviation"] for group in course.records[0]["groups"]] == pytest.approx(DEVIATIONS, rel=1e-6)
    assert [g["leaves"] for g in course.records[0]["groups"]] == [GROUP, PAIR]
    assert [number for number, group in enumerate(course.records[0]["groups"]) if group["parted"]] == parted
    means = torch.tensor([[4.0, 0.0], [8.0, 0.5]])
    assert torch.equal(seen[2], torch.cat([means, CONDITIONS[[0, 2, 4, 1, 3]]]))  # the nodes, then their children
    assert len(seen[1]) == 2 and len(seen[3]) == {0: 2, 1: 4, 2: 5}[len(parted)]
    assert course.plan.members[1] == ((0, 2, 4), (1, 3))
    after = ((0, 2, 4), (1, 3)), ((0,), (1, 3), (2,), (4,)), ((0,), (1,), (2,), (3,), (4,))
    assert course.plan.members[2] == after[len(parted)]
    assert course.plan.members[9] == ((0,), (1,), (2,), (3,), (4,))


def test_guidance_copies_count_together():
    """Negative halves that differ part a group whose positive ones do not; a node that predicts nothing parts from any that does."""
    same = CONDITIONS[:1].expand(5, -1)
    given = dict(conditions=same, negative_conditions=CONDITIONS, guidance_scale=2.0)
    _, courses = run_mock(FLAT, Probe([0.2], math.inf), **given)
    together = [3 / math.hypot(4, 4), 0.5 / math.sqrt(8**2 + 0.5**2 + 4**2)]
    assert [group["deviation"] for group in courses[0].records[0]["groups"]] == pytest.approx(together, rel=1e-6)
    opposed = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    _, courses = run_mock(FLAT, Probe([0.2], 1e30), conditions=opposed)
    assert [group["deviation"] for group in courses[0].records[0]["groups"]] == [math.inf, math.inf]
    assert courses[0].records[0]["parted"] == 2
    _, courses = run_mock(FLAT, Probe([0.2], 0), conditions=torch.zeros(5, 2))
    assert [group["deviation"] for group in courses[0].records[0]["groups"]] == [0, 0] and courses[0].records[0]["parted"] == 0


def test_what_is_not_a_number_never_parts():
    broken = CONDITIONS.clone()
    broken[4] = math.nan
    _, courses = run_mock(FLAT, Probe([0.2], 0.5), conditions=broken)
    assert [group["parted"] for group in courses[0].records[0]["groups"]] == [False, False]


def test_a_subtree_that_parts_is_probed_again_and_each_node_at_most_once_a_call():
    tree = SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.6, (LATE, Node.single(4)))])
    seen = []
    _, courses = run_mock(tree, Probe([0.2, 0.4], 0.0), seen)
    first, second = courses[-1].records
    assert [g["leaves"] for g in first["groups"]] == [[0, 2, 4]] and [g["leaves"] for g in second["groups"]] == [[0, 2]]
    assert list(map(len, seen)) == [3, 3, 3 + 2, 4, 4 + 2, 5, 5, 5, 5, 5]
    plan = courses[-1].plan
    assert plan.members[2] == ((0, 2), (1,), (3,), (4,)) and plan.node_representatives[2] == (0, 1, 3, 4)
    assert [plan.branch_call(leaf) for leaf in (0, 2, 4)] == [4, 4, 2]


def test_nothing_is_probed_that_never_parts_or_has_parted():
    for plan in (SharingPlan.flat(LEAVES, [GROUP], 1.0), SharingPlan.independent(LEAVES), SharingPlan.flat(LEAVES, [GROUP], 0.2)):
        seen = []
        got, courses = run_mock(plan, Probe([0.2, 0.5], 0.0), seen)
        assert courses == [] and torch.equal(got, run_mock(plan, None)[0])
        assert list(map(len, seen)) == plan.resolve(10).rows


def test_calls_are_moved_to_where_groups_may_part():
    assert Probe([0.0, 0.1, 0.24, 0.26]).at(10) == [1, 2, 3]
    heun = [call % 2 == 1 for call in range(10)] + [True]  # a group may part after calls 1, 3, 5, ...
    assert Probe([0.0, 0.2, 0.25, 0.45]).at(11, heun) == [2, 4, 6]
    assert Probe([0.99]).at(10) == [] and Probe([0.6]).at(4, [True, False, False, True]) == []
    assert Probe([0.5]).at(1) == []


# ---- how runs go on


def test_newcomers_that_joined_a_trunk_are_probed_too(pipe):
    setting, trunks = Setting(pipe, "unipc", steps=8), {}
    setting.sample(SharingPlan.flat(LEAVES, [GROUP], 0.25, representatives=[2]), on_part=trunks.__setitem__)
    later = SharingPlan.flat([LEAVES[leaf] for leaf in PAIR], [[0, 1]], 0.9, representatives=[1])
    setting.rows.clear()
    got = setting.sample(later, trunks[0], PAIR, probe=Probe([0.5], 0.0))
    assert setting.rows == [2, 2, 2, 6, 4, 4]
    both = Row(setting, setting.x_init[2:3]).run(2, GROUP).run(3, PAIR)
    assert worst(got, torch.stack([both.copy().finish(leaf) for leaf in PAIR])) <= 5e-6


def test_a_gradient_goes_through_a_probed_run(pipe):
    setting = Setting(pipe, "dpm++2m")
    x_init = setting.x_init.clone().requires_grad_()
    given = dict(negative_conditions=setting.negatives, guidance_scale=GUIDANCE, probe=Probe([0.34], 0.0))
    sage.sample(setting.denoise, FLAT, setting.table, x_init, setting.embeds, **given)[4].sum().backward()
    assert x_init.grad[2].abs().max() > 0 and not x_init.grad[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("how", ["mean", "representative"])
def test_guidance_of_every_leaf(pipe, how):
    setting, scales = Setting(pipe, "dpm++2m"), torch.tensor([1.5, 4.0, 5.0, 2.0, 2.5])
    there = SharingPlan.flat(LEAVES, [GROUP, PAIR], 0.34, representatives=[2, 1])
    given = dict(guidance_scale=scales, trunk_guidance=how)
    assert worst(setting.sample(FLAT, probe=Probe([0.34], 0.0), **given), setting.sample(there, **given)) <= 1e-6


# ---- pipelines

APART = ("Flux true CFG", "Wan", "Wan 2.2")  # guide by two denoiser calls


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_engines_decide_and_draw_alike(case):
    """For every solver of the family, in pieces too; the hook where a step calls the denoiser once."""
    pipe = case.build()
    stock, late = pipe.scheduler, native_cases.flat(0.75)
    for solver, overrides in case.solvers.items():
        pipe.scheduler = stock
        native_cases.with_solver(pipe, solver, overrides)
        plain, stats = native_cases.native(pipe, late, case.kwargs)[:2]
        parts = 3 if stats["boundaries"] else 2
        assert stats["probes"] is None
        measured = native_cases.native(pipe, late, case.kwargs, probe=Probe([parts / stats["num_calls"]], math.inf))
        assert worst(measured[0], plain) <= 1e-5, solver
        found = [group["deviation"] for group in measured[1]["probes"][0]["groups"]]
        probe, ours, theirs = Probe([parts / stats["num_calls"]], sum(found) / 2), native_cases.generators(), native_cases.generators()
        with Rows(pipe) as seen:
            got, got_stats, resolved = native_cases.native(pipe, late, case.kwargs, gens=ours, probe=probe)
        made = got_stats["probes"]
        assert seen == [case.copies * rows for rows in got_stats["rows"]] and sum(got_stats["rows"]) == got_stats["nfe"]
        assert got_stats["rows"][made[0]["call"]] == 7 and made[0]["parted"] == 1, solver
        pieces = native_cases.native(pipe, late, case.kwargs, probe=probe, max_rows=3)
        assert worst(pieces[0], got) <= 1e-5 and pieces[1]["launches"] > got_stats["launches"] == len(got_stats["rows"])
        if case.name not in APART:
            expected, hook_stats, hook_resolved = native_cases.hooked(pipe, late, case.kwargs, gens=theirs, probe=probe)
            assert worst(got, expected) <= 1e-5, solver
            assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs))
            assert resolved.members == hook_resolved.members
            assert resolved.node_representatives == hook_resolved.node_representatives
            assert got_stats["rows"] == hook_stats["rows"] and got_stats["nfe"] == hook_stats["nfe"]
            for a, b in zip(made[0]["groups"], hook_stats["probes"][0]["groups"], strict=True):
                assert a | {"deviation": 0} == b | {"deviation": 0} and a["deviation"] == pytest.approx(b["deviation"], rel=1e-4)
            in_pieces = native_cases.hooked(pipe, late, case.kwargs, probe=probe, max_rows=4)
            assert worst(in_pieces[0], expected) <= 1e-5 and in_pieces[1]["launches"] > hook_stats["launches"]
        there = native_cases.native(pipe, native_cases.flat(parts / stats["num_calls"]), case.kwargs)[0]
        zero = native_cases.native(pipe, late, case.kwargs, probe=Probe([parts / stats["num_calls"]], 0.0))[0]
        assert worst(zero, there) <= 1e-5 and worst(plain, there) > 1e-4, solver


@pytest.mark.parametrize("engine", ["native", "hook"])
def test_generate_records_what_happened(pipe, engine):
    plan = SharingPlan.flat([Leaf(p) for p in PROMPTS], [PAIR, GROUP], 0.9)
    given = dict(plan=plan, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", progress=False, engine=engine)
    plain = sage.generate(pipe, PROMPTS, **given)
    assert plain.stats["probes"] is None
    measured = sage.generate(pipe, PROMPTS, probe=Probe([0.34], math.inf), **given)
    (probe,) = measured.stats["probes"]
    apart = {tuple(group["leaves"]): group["deviation"] for group in probe["groups"]}
    assert set(apart) == {tuple(GROUP), tuple(PAIR)} and measured.stats["nfe"] == plain.stats["nfe"] + 5
    tolerance = sum(apart.values()) / 2
    whole, packed = (sage.generate(pipe, PROMPTS, probe=Probe([0.34], tolerance), max_rows=rows, **given) for rows in (64, 2))
    assert whole.stats["packs"] == 1 and packed.stats["packs"] == 2 and whole.stats["engine"] == engine
    assert max(worst(a, b) for a, b in zip(whole.images, packed.images)) <= 1e-5
    early = GROUP if apart[tuple(GROUP)] > apart[tuple(PAIR)] else PAIR
    for result in (whole, packed):
        assert [record["branch_call"] for record in result.records] == [2 if leaf in early else 5 for leaf in range(5)]
        groups = {tuple(g["leaves"]): g["parted"] for made in result.stats["probes"] for g in made["groups"]}
        assert groups == {tuple(GROUP): early == GROUP, tuple(PAIR): early == PAIR}
        assert result.stats["nfe"] == sum(result.stats["rows"]) and result.stats["rows"][2] == 7
        assert result.stats["saving"] == pytest.approx(1 - result.stats["nfe"] / 30)
        assert result.stats["launches"] >= STEPS
    leader = plan.roots[plan.root_of[early[0]]].representative
    assert {record["trunk_seed"] for record in whole.records if record["index"] in early} == {whole.records[leader]["seed"]}


def test_the_progress_bar_counts_probed_rows(pipe, monkeypatch):
    counted = []
    monkeypatch.setattr("sage.generation._Progress.on_call", lambda self, rows, calls: counted.append(rows))
    plan = SharingPlan.flat([Leaf(p) for p in PROMPTS], [GROUP], 0.5)
    result = sage.generate(pipe, PROMPTS, plan=plan, num_inference_steps=STEPS, output_type="latent", probe=Probe([0.2], 0.0))
    assert counted == result.stats["rows"] == [3, 3 + 3, 5, 5, 5, 5]


def test_generate_falls_back_where_the_native_loop_cannot_compare(pipe):
    """`guidance_rescale` is part of the native denoiser's output."""
    plan = SharingPlan.flat([Leaf(p) for p in PROMPTS], [GROUP], 0.9)
    given = dict(plan=plan, num_inference_steps=STEPS, output_type="latent", progress=False, probe=Probe([0.34], 0.0))
    result = sage.generate(pipe, PROMPTS, guidance_rescale=0.5, **given)
    assert result.stats["engine"] == "hook" and "guidance_rescale 0.5 is part of the native" in result.stats["engine_reason"]
    assert result.stats["probes"][0]["parted"] == 1
    with pytest.raises(sage.native.NotNative, match="guidance_rescale 0.5"):
        sage.generate(pipe, PROMPTS, guidance_rescale=0.5, engine="native", **given)
