"""One step of training: its rows by hand, their distribution, and its losses against sums written out."""

import contextlib

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from training_parts import ToyFamily, batch_of

from sage.training.data import draw
from sage.training.joint import Timeline
from sage.training.step import Objective, Step, step_rows

T_STAR = 600.0
TIMELINE = Timeline.of(DDPMScheduler())
LATENTS = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(5))
TEXT = {"text": torch.arange(12.0).view(6, 2) / 10}


def rows_of(groups, timeline=TIMELINE, epoch=0, **objective):
    objective = Objective(objective.pop("t_star", T_STAR), **objective)
    return step_rows(batch_of(groups, epoch), LATENTS[: len(groups)], timeline, objective)


def number_of(part, members=3, **objective):
    """The first number whose group of so many trains that part."""
    return next(n for n in range(1000) if bool(rows_of([n] * members, **objective).is_trunk.all()) == (part == "trunk"))


def generator_of(number, epoch=0, seed=0):
    """The generator of a group, after the draw for its captions."""
    generator = torch.Generator().manual_seed(draw("step", seed, epoch, number))
    torch.rand([], generator=generator, dtype=torch.float64)
    return generator


def spread(level):
    return level.float().view(-1, 1, 1, 1)


# ---- rows by hand


def test_branches_share_their_noise_and_have_timesteps_of_their_own():
    number = number_of("branch")
    rows = rows_of([number] * 3)
    noise = torch.randn([1, 2, 3, 3], generator=generator_of(number))
    alpha, sigma = map(spread, TIMELINE.levels(rows.timesteps))
    assert torch.equal(rows.z, alpha * LATENTS[:3] + sigma * noise) and torch.equal(rows.denoised, LATENTS[:3])
    assert (rows.timesteps < T_STAR).all() and len(set(rows.timesteps.tolist())) == 3
    assert rows.nodes.rows.tolist() == rows.node_of.tolist() == [0, 1, 2] and rows.nodes.offsets.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["posterior", "own", "mean"])
def test_a_trunk_has_a_row_for_each_picture_under_the_mean_condition(kind):
    number = number_of("trunk", soft_target=kind)
    rows = rows_of([number] * 3, soft_target=kind)
    generator, x = generator_of(number), LATENTS[:3]
    noise = torch.randn([3, 2, 3, 3], generator=generator)
    members = (torch.rand(3, generator=generator, dtype=torch.float64) * 3).long()
    alpha, sigma = map(spread, TIMELINE.levels(rows.timesteps))
    own = x.mean(0).expand(3, -1, -1, -1) if kind == "mean" else x[members]
    assert torch.allclose(rows.z, alpha * own + sigma * noise, atol=1e-6)
    expected = own
    if kind == "posterior":
        distance = ((rows.z[:, None] - alpha[:, None] * x[None]) ** 2).sum((2, 3, 4))
        weights = torch.softmax(-distance / (2 * sigma.view(-1, 1) ** 2), 1)
        expected = torch.einsum("rm,mchw->rchw", weights, x)
        assert (expected - own).abs().max() > 1e-3
    assert torch.allclose(rows.denoised, expected, atol=1e-5)
    assert (rows.timesteps >= T_STAR).all() and rows.is_trunk.all() and len(set(rows.timesteps.tolist())) == 3
    assert rows.nodes.rows.tolist() == [0, 1, 2] and len(rows.nodes) == 1 and rows.node_of.tolist() == [0, 0, 0]


def test_a_picture_alone_and_pictures_that_share_nothing_have_noise_of_their_own():
    for groups, kind in (([4], "posterior"), ([4, 4, 4], "none")):
        rows = rows_of(groups, soft_target=kind)
        noise = torch.randn([len(groups), 2, 3, 3], generator=generator_of(4))
        alpha, sigma = map(spread, TIMELINE.levels(rows.timesteps))
        assert torch.equal(rows.z, alpha * LATENTS[: len(groups)] + sigma * noise)
        assert rows.node_of.tolist() == rows.nodes.rows.tolist() == list(range(len(groups)))
        assert torch.equal(rows.is_trunk, rows.timesteps >= T_STAR)


def test_timesteps_of_a_group_are_evenly_spaced_in_a_circle():
    for part, low, high in (("trunk", 600, 1000), ("branch", 0, 600)):
        number = number_of(part, members=4)
        place = (rows_of([number] * 4).timesteps.double() - low) / (high - low)
        apart = torch.cat([place.sort().values, place.min()[None] + 1]).diff()
        assert (apart - 0.25).abs().max() < 1 / 200


def test_nodes_and_rows_of_several_groups():
    trunk, branch = number_of("trunk", 2), number_of("branch", 2)
    rows = rows_of([branch, branch, 50, trunk, trunk, 60])
    assert rows.node_of.tolist() == [0, 1, 2, 3, 3, 4]
    assert rows.nodes.rows.tolist() == [0, 1, 2, 3, 4, 5] and rows.nodes.offsets.tolist() == [0, 1, 2, 3, 5, 6]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from(["posterior", "own", "mean", "none"]), st.integers(0, 50))
def test_a_step_costs_a_row_per_picture(sizes, kind, first):
    groups = [first + place for place, size in enumerate(sizes) for _ in range(size)][:6]
    rows = rows_of(groups, soft_target=kind)
    assert len(rows.z) == len(rows.denoised) == len(rows.timesteps) == len(rows.node_of) == len(groups) and rows.joint is None


def test_a_group_is_drawn_by_its_number_alone():
    alone, other = rows_of([7, 7, 7], consistency_weight=1.0), rows_of([3, 3, 3], consistency_weight=1.0)
    objective = Objective(T_STAR, consistency_weight=1.0)
    x = torch.cat([LATENTS[:3], LATENTS[:3]])
    both = step_rows(batch_of([3, 3, 3, 7, 7, 7]), x, TIMELINE, objective)
    torch.rand(9)  # nothing comes from torch's own state
    for name in ("z", "denoised", "timesteps"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(other, name), getattr(alone, name)]))
    assert torch.equal(both.joint.z, torch.cat([other.joint.z, alone.joint.z]))
    for changed in ({"epoch": 1}, {"seed": 1}):
        assert not torch.equal(rows_of([7, 7, 7], **changed).timesteps, alone.timesteps)


# ---- distributions


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["discrete", "flow"])
@pytest.mark.parametrize("kind", ["posterior", "none"])
def test_all_timesteps_are_trained_equally_often(scheduler, kind):
    timeline = Timeline.of(scheduler)
    objective = Objective(T_STAR, kind)
    found = torch.cat([step_rows(batch_of([n, n]), LATENTS[:2, :1, :1, :1], timeline, objective).timesteps for n in range(300)])
    position = timeline._position(found.double()).sort().values / 1000
    even = (torch.arange(len(position)) + 0.5) / len(position)
    assert (position - even).abs().max() < 0.02  # at random it would be 0.05


def test_trunks_are_as_frequent_as_their_timesteps_at_every_moment():
    trunks = torch.tensor([bool(rows_of([n, n], soft_target="own").is_trunk[0]) for n in range(400)]).double()
    assert (trunks.cumsum(0) - 0.4 * torch.arange(1, 401)).abs().max() < 4  # at random it would be 10


def test_each_member_is_anywhere_equally_often():
    firsts = torch.tensor([int(rows_of([n, n, n], soft_target="none").timesteps[0]) for n in range(300)]).double().sort().values
    assert (firsts / 1000 - (torch.arange(300) + 0.5) / 300).abs().max() < 0.03  # at random it would be 0.08


def test_jitter_moves_the_joint_within_its_bounds():
    drawn = [rows_of([n, n, n], share_jitter=0.2) for n in range(300)]
    lowest = min(int(rows.timesteps.min()) for rows in drawn if len(rows.nodes) == 1)
    highest = max(int(rows.timesteps.max()) for rows in drawn if len(rows.nodes) == 3)
    assert 400 <= lowest < 450 and 750 < highest < 800
    assert all(rows.is_trunk.all() or not rows.is_trunk.any() for rows in drawn)


# ---- places on the timeline


def test_places_by_hand():
    t_star, quantile = torch.tensor([600.0] * 4), torch.tensor([0.0, 0.25, 0.5, 0.9999])
    assert TIMELINE.place("trunk", t_star, quantile).tolist() == [600, 700, 800, 999]
    assert TIMELINE.place("branch", t_star, quantile).tolist() == [0, 150, 300, 599]
    flow = Timeline.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    middle = flow._shifted(torch.tensor([500.0], dtype=torch.float64))
    assert flow.place("trunk", middle, torch.tensor([0.5])).item() == pytest.approx(flow._shifted(torch.tensor([750.0])).item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"quantile must be \[4\] numbers in \[0, 1\), one for each t\*, got \[1\]: \[1.0\]"):
        TIMELINE.place("trunk", t_star, torch.ones(1))


def test_the_trunks_fraction_by_hand():
    fraction = TIMELINE.trunk_fraction(torch.tensor([0.0, 599.5, 600.0, 1000.0]))
    assert fraction.tolist() == pytest.approx([1.0, 0.4, 0.4, 0.0])
    flow = Timeline.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    middle = flow._shifted(torch.tensor([500.0], dtype=torch.float64))
    assert flow.trunk_fraction(middle).item() == pytest.approx(500 / 999)


# ---- losses


def losses_of(groups, family=None, images=None, filler=False, teacher=None, empty=None, rows=None, **objective):
    """(losses, family) of a step on the first pictures, or on `rows` of them."""
    family = ToyFamily() if family is None else family
    rows = list(range(len(groups))) if rows is None else rows
    step = Step(family, TIMELINE, Objective(T_STAR, **objective), empty, teacher)
    losses = step(batch_of(groups, filler=filler, images=images), LATENTS[rows], {"text": TEXT["text"][rows]})
    return losses, family


def errors_by_hand(groups, snr_gamma=None, **objective):
    """float32 [R]: squared errors of the toy's predictions of the noise, weighted by min-SNR."""
    rows = rows_of(groups, **objective)
    means = torch.stack([TEXT["text"][rows.nodes.rows[a:b]].mean(0) for a, b in zip(rows.nodes.offsets, rows.nodes.offsets[1:])])
    alpha, sigma = TIMELINE.levels(rows.timesteps)
    noise = (rows.z - spread(alpha) * rows.denoised) / spread(sigma)
    output = 0.7 * rows.z + (means[rows.node_of, 0] + rows.timesteps / 1000).view(-1, 1, 1, 1)
    weight = torch.ones_like(alpha) if snr_gamma is None else (snr_gamma * sigma**2 / alpha**2).clamp(max=1)
    return ((output - noise) ** 2).mean((1, 2, 3)) * weight.float(), rows


@pytest.mark.parametrize("gamma", [None, 0.1])
def test_the_loss_is_the_sum_over_rows_by_the_pictures_of_all_processes(gamma):
    groups = [number_of("trunk", 2)] * 2 + [number_of("branch", 3)] * 3 + [9]
    errors, rows = errors_by_hand(groups, snr_gamma=gamma)
    weight = torch.where(rows.is_trunk, 1.0, 0.25)
    losses, _ = losses_of(groups, images=20, snr_gamma=gamma, branch_weight=0.25)
    assert losses.loss.item() == pytest.approx(float((errors * weight).sum() / 20), rel=1e-5)
    trunk = rows.is_trunk
    expected = [losses.loss.item(), errors[trunk].sum(), trunk.sum(), errors[~trunk].sum(), (~trunk).sum(), 0.0]
    assert losses.sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_processes_add_up_to_one():
    groups = [2, 2, 2, 3, 3, 4]
    whole, first, second = (
        losses_of([groups[row] for row in rows], rows=rows, images=6, consistency_weight=0.5)
        for rows in ([0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5])
    )
    for losses, _ in (whole, first, second):
        losses.loss.backward()
    assert whole[0].loss.item() == pytest.approx((first[0].loss + second[0].loss).item(), rel=1e-6)
    assert torch.allclose(whole[0].sums, first[0].sums + second[0].sums, rtol=1e-6)
    assert whole[1].scale.grad.item() == pytest.approx((first[1].scale.grad + second[1].scale.grad).item(), rel=1e-5)


def test_a_filler_costs_and_teaches_nothing():
    losses, family = losses_of([2, 2, 2, 3], filler=True, consistency_weight=1.0)
    losses.loss.backward()
    assert losses.loss.item() == 0 and losses.sums.tolist() == [0] * 6 and family.scale.grad.item() == 0


def test_dropped_captions_are_those_of_whole_groups():
    empty, groups = {"text": torch.full([1, 2], -5.0)}, [8, 8, 8, 1, 1, 2]
    _, family = losses_of(groups, empty=empty, caption_dropout=1.0)
    assert (family.calls[0][2]["text"] == -5).all()
    dropped = []
    for epoch in range(150):
        rows = rows_of([1, 1, 2], epoch=epoch, caption_dropout=0.3)
        assert set(rows.dropped) in (set(), {0, 1}, {2}, {0, 1, 2})
        dropped.append(0 in rows.dropped)
    assert 26 < sum(dropped) < 64  # 45, ±3.4 standard deviations
    kept, fallen = (next(n for n in range(99) if bool(rows_of([n, n], caption_dropout=0.5).dropped) == want) for want in (False, True))
    _, family = losses_of([kept, kept, fallen, fallen], empty=empty, caption_dropout=0.5)
    given = family.calls[0][2]["text"]
    assert (given[2:] == -5).all() and torch.isin(given[:2, 0], torch.tensor([0.0, 0.1, 0.2])).all()
    with pytest.raises(ValueError, match="empty is needed with caption_dropout"):
        Step(ToyFamily(), TIMELINE, Objective(T_STAR, caption_dropout=0.1))


@pytest.mark.parametrize("target", ["posterior", "equal"])
def test_consistency_by_hand(target):
    groups = [2, 2, 2, 3, 3, 4]
    asked = {"consistency_weight": 0.5, "consistency_target": target, "snr_gamma": 0.2}
    losses, family = losses_of(groups, **asked)
    plain, _ = losses_of(groups, snr_gamma=0.2)
    joint = rows_of(groups, **asked).joint
    assert len(joint.z) == 2 and (joint.timesteps - T_STAR).abs().max() <= 50 and joint.members.rows.tolist() == [0, 1, 2, 3, 4]
    alpha, sigma = TIMELINE.levels(joint.timesteps)
    total = 0.0
    for node, members in enumerate(([0, 1, 2], [3, 4])):
        z, x = joint.z[node], LATENTS[members]
        distance = ((z - float(alpha[node]) * x) ** 2).sum((1, 2, 3))
        weights = torch.softmax(-distance / (2 * float(sigma[node]) ** 2), 0)
        weights = weights if target == "posterior" else torch.full([len(members)], 1 / len(members))
        # the toy is linear: the predictions differ by the conditions alone
        difference = TEXT["text"][members, 0].mean() - (weights * TEXT["text"][members, 0]).sum()
        snr_weight = min(1.0, 0.2 * float(sigma[node]) ** 2 / float(alpha[node]) ** 2)
        total += len(members) * snr_weight * float(difference) ** 2 / 6
    assert losses.sums[5].item() == pytest.approx(total, rel=1e-4, abs=1e-9) and (total > 1e-5) == (target == "posterior")
    assert losses.loss.item() == pytest.approx(plain.loss.item() + 0.5 * total, rel=1e-5)
    taught, step = family.calls
    assert len(taught[0]) == 5 and len(step[0]) == 6 + 2


def test_the_members_are_constant_to_the_trunk_and_predicted_inside_the_teacher():
    """With the teacher's scale at 0 the target is without z, so the trunk's own scale · z is the error."""
    family, entered = ToyFamily(), []

    @contextlib.contextmanager
    def teacher():
        entered.append(torch.is_grad_enabled())
        student, family.scale = family.scale, torch.tensor(0.0)
        yield
        family.scale = student

    losses, _ = losses_of([2, 2, 2], family, teacher=teacher, consistency_weight=1.0, consistency_target="equal")
    joint = rows_of([2, 2, 2], consistency_weight=1.0).joint
    expected = 0.7**2 * (joint.z**2).mean().item()
    assert entered == [False] and losses.sums[5].item() == pytest.approx(expected, rel=1e-4)
    plain, reference = losses_of([2, 2, 2])
    plain.loss.backward()
    losses.loss.backward()
    assert (family.scale.grad - reference.scale.grad).item() == pytest.approx(2 * 0.7 * (joint.z**2).mean().item(), rel=1e-4)


def test_refusals():
    for options, message in (
        ({"soft_target": "soft"}, "soft_target must be one of posterior, own, mean, none, got 'soft'"),
        ({"consistency_target": "x"}, "consistency_target must be one of posterior, equal"),
        ({"branch_weight": -1.0}, "branch_weight must be a number of at least 0, got -1.0"),
        ({"share_jitter": 2.0}, r"share_jitter must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(T_STAR, **options)
