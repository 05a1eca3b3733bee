"""t* and the timesteps on either side of it: by hand, against the plan, and by their distribution."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sage.plan import Leaf, SharingPlan
from sage.training.joint import Timeline, branch_timestep, branch_timesteps


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- t*


def test_t_star_by_hand():
    scheduler = DDIMScheduler(timestep_spacing="trailing")  # 999, 899, ..., 99 in ten steps
    assert branch_timestep(scheduler, 0.4, 10) == 599
    assert branch_timestep(scheduler, 0.44, 10) == 599 and branch_timestep(scheduler, 0.45, 10) == 499  # halves go up, as in the plan
    assert branch_timestep(scheduler, 0.99, 10) == 99  # before the last call at the latest
    assert branch_timesteps(scheduler, [0.0, 0.04, 1.0], 10).tolist() == [1000, 1000, 0]  # no trunk, none after rounding, nothing else
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(4)
    assert branch_timestep(FlowMatchEulerDiscreteScheduler(shift=3.0), 0.5, 4) == flow.timesteps[2].item()


SCHEDULERS = [
    DDPMScheduler(),
    PNDMScheduler(skip_prk_steps=True),
    EulerDiscreteScheduler(timestep_spacing="linspace"),
    HeunDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_t_star_parts_what_the_plan_parts(scheduler):
    """At every share, the calls of the trunk are above t*, and the member's own calls are not."""
    before = str(vars(scheduler))
    shares = [0.1, 0.25, 0.4, 0.5, 0.75, 0.95]
    found = branch_timesteps(scheduler, shares, 12)
    assert str(vars(scheduler)) == before  # it is left as it was
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps.double()
    # Heun's calls 0 and 1, 2 and 3, ... are one step each, and the last call is one by itself.
    ends_step = [call % 2 == 1 or call == len(timesteps) - 1 for call in range(len(timesteps))]
    boundaries = ends_step if isinstance(scheduler, HeunDiscreteScheduler) else None
    for share, t_star in zip(shares, found):
        plan = SharingPlan.flat([Leaf("a"), Leaf("b")], [[0, 1]], share).resolve(len(timesteps), boundaries)
        call = plan.branch_call(0)
        assert 0 < call < len(timesteps) and t_star == timesteps[call]
        assert (timesteps[:call] >= t_star).all() and (timesteps[call:] <= t_star).all()


def test_arguments_of_set_timesteps_are_passed_on():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    t_star = branch_timestep(scheduler, 0.5, 4, sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    assert t_star == scheduler.timesteps[2].item() == pytest.approx(1000 * math.exp(0.8) / (math.exp(0.8) + 1), rel=1e-6)


def test_other_clocks_and_arguments_are_refused():
    with pytest.raises(NotImplementedError, match="EDMEulerScheduler: its timesteps are neither"):
        branch_timestep(EDMEulerScheduler(), 0.4, 10)
    with pytest.raises(NotImplementedError, match="invert_sigmas counts timesteps up"):
        Timeline.of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match=r"shares\[1\] must be in \[0, 1\], got 40.0"):
        branch_timesteps(DDPMScheduler(), [0.4, 40], 10)
    with pytest.raises(ValueError, match="mu is required"):
        Timeline.of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


# ---- noise levels


def test_levels_are_those_of_the_scheduler():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    x, noise, t = torch.randn(3, 4, generator=seeded()), torch.randn(3, 4, generator=seeded(1)), torch.tensor([0, 500, 999])
    alpha, sigma = Timeline.of(scheduler).levels(t)
    assert torch.allclose((alpha[:, None] * x + sigma[:, None] * noise).float(), scheduler.add_noise(x, noise, t), atol=1e-5)
    assert alpha[2] == 0 and sigma[2] == 1
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = flow.timesteps[[0, 400, 999]]
    alpha, sigma = Timeline.of(flow).levels(t)
    assert torch.allclose((alpha[:, None] * x + sigma[:, None] * noise).float(), flow.scale_noise(x, t, noise), atol=1e-6)


@pytest.mark.parametrize("options, mu", [
    ({}, 0.8), ({"time_shift_type": "linear"}, 1.7),
], ids=["exponential", "linear"])  # fmt: skip
def test_dynamic_shifting_is_the_schedulers(options, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    position = torch.tensor([1.0, 300.0, 1000.0], dtype=torch.float64)
    shifted = Timeline.of(scheduler, mu)._shifted(position)
    assert torch.allclose(shifted, 1000 * scheduler.time_shift(mu, 1.0, position / 1000))
    assert torch.allclose(Timeline.of(scheduler, mu)._position(shifted), position)


# ---- draws


@pytest.mark.parametrize("t_star, lowest", [(3.0, 3), (2.5, 3)])
def test_every_integer_on_its_side_and_no_other_equally_often(t_star, lowest):
    timeline = Timeline.of(DDPMScheduler(num_train_timesteps=8))
    rows = torch.full((1000,), t_star)
    trunk, branch = (timeline.draw(part, rows, seeded()) for part in ("trunk", "branch"))
    assert trunk.dtype == branch.dtype == torch.int64
    # stratified: counts are exact but for the stratum that lies across an edge
    trunk, branch = torch.bincount(trunk, minlength=8), torch.bincount(branch, minlength=8)
    assert trunk[:lowest].sum() == 0 and (trunk[lowest:] - 1000 / (8 - lowest)).abs().max() <= 1
    assert branch[lowest:].sum() == 0 and (branch[:lowest] - 1000 / lowest).abs().max() <= 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_draws_are_uniform_before_the_shift_and_never_cross(shift):
    timeline = Timeline.of(FlowMatchEulerDiscreteScheduler(shift=shift))
    t_star = branch_timestep(FlowMatchEulerDiscreteScheduler(shift=shift), 0.4, 10)
    rows = torch.full((2000,), t_star, dtype=torch.float64)
    split = timeline._position(rows[:1]).item()
    for part, low, high in (("trunk", split, 1000.0), ("branch", 1.0, split)):
        t = timeline.draw(part, rows, seeded())
        assert t.dtype == torch.float32
        assert ((t >= t_star) if part == "trunk" else (t < t_star)).all()
        inside = ((timeline._position(t.double()) - low) / (high - low)).sort().values
        even = (torch.arange(2000) + 0.5) / 2000
        assert (inside - even).abs().max() < 1.1 / 2000
    assert timeline.levels(timeline.draw("branch", rows, seeded()))[1].min() >= 0.001


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rounding_to_float32_does_not_cross_t_star(shift, monkeypatch):
    """Draws at the very edges of their ranges, for t* between two float32 numbers and on one."""
    timeline = Timeline(1000, None, shift)
    t_star = torch.linspace(30, 990, 500, dtype=torch.float64)
    t_star = torch.cat([t_star, t_star.float().double()])
    monkeypatch.setattr("sage.training.joint._strata", lambda count, generator: torch.zeros(count, dtype=torch.float64))
    assert (timeline.draw("trunk", t_star).double() >= t_star).all()
    monkeypatch.setattr("sage.training.joint._strata", lambda count, generator: torch.full((count,), 1 - 2.0**-53, dtype=torch.float64))
    assert (timeline.draw("branch", t_star).double() < t_star).all()
    last = Timeline.of(DDPMScheduler()).draw("trunk", t_star)
    assert (last == 999).all()


def test_rows_keep_to_their_own_t_star_and_are_stratified_over_the_batch():
    timeline = Timeline.of(DDPMScheduler())
    t_star = torch.tensor([200.0, 400.0, 600.0, 800.0] * 2)  # whole numbers of timesteps in every stratum
    for part, low, high in (("trunk", t_star, torch.full((8,), 1000.0)), ("branch", torch.zeros(8), t_star)):
        t = timeline.draw(part, t_star, seeded(3))
        assert ((t >= low) & (t < high)).all()
        stratum = ((t - low) / (high - low) * 8).floor().long()
        assert sorted(stratum.tolist()) == list(range(8))
    assert torch.equal(t, timeline.draw("branch", t_star, seeded(3))) and not torch.equal(t, timeline.draw("branch", t_star, seeded(4)))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["discrete", "flow"])
def test_the_joint_lies_around_t_star(scheduler):
    timeline = Timeline.of(scheduler)
    t_star = torch.tensor([600.0] * 500 + [990.0] * 500 + [1.0] * 500, dtype=torch.float64)
    position = timeline._position(timeline.draw("joint", t_star, seeded(), width=0.05).double()) - timeline._position(t_star)
    middle, top, bottom = position.split(500)
    assert position.abs().max() < 50.001 and middle.min() < -45 and middle.max() > 45 and middle.mean().abs() < 4
    assert top.min() < -45 and bottom.max() > 45
    narrow = timeline.draw("joint", t_star, seeded(), width=0.0) if timeline.alphas_cumprod is not None else t_star
    assert (narrow == t_star).all()


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["discrete", "flow"])
@pytest.mark.parametrize("part, end", [("trunk", 1000.0), ("branch", 0.0), ("joint", 0.0), ("joint", 1000.0)])
def test_a_side_without_timesteps_is_refused(scheduler, part, end):
    with pytest.raises(ValueError, match=rf"t_star\[1\] = {end:g} leaves no timestep for the {part}"):
        Timeline.of(scheduler).draw(part, torch.tensor([500.0, end]))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["discrete", "flow"])
def test_a_share_of_one_trains_the_trunk_everywhere_and_of_none_the_branch(scheduler):
    timeline = Timeline.of(scheduler)
    trunk, branch = timeline.draw("trunk", torch.zeros(2000), seeded()), timeline.draw("branch", torch.full((2000,), 1000.0), seeded())
    for t in (trunk, branch):
        assert t.min() < 3 * timeline.shift + 1 and t.max() > 998


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["discrete", "flow"])
def test_jitter_spreads_t_star_and_keeps_both_sides(scheduler):
    timeline = Timeline.of(scheduler)
    t_star = torch.tensor([600.0] * 400 + [5.0] * 400 + [0.0, 1000.0], dtype=torch.float64)
    moved = timeline.jittered(t_star, 0.1, seeded())
    assert torch.equal(timeline.jittered(t_star, 0.0), t_star) and moved[-2:].tolist() == [0.0, 1000.0]
    off = (timeline._position(moved) - timeline._position(t_star))[:400]
    assert off.abs().max() <= 100 + 1e-9 and off.min() < -90 and off.max() > 90 and off.mean().abs() < 10
    for part in ("trunk", "branch"):
        timeline.draw(part, moved[:-2], seeded())  # no side is empty
    timeline.draw("branch", timeline.jittered(torch.full((500,), 999.0), 1.0, seeded()))
    timeline.draw("trunk", timeline.jittered(torch.full((500,), 999.0), 1.0, seeded()))


def test_wrong_arguments_are_named():
    timeline = Timeline.of(DDPMScheduler())
    with pytest.raises(ValueError, match="'trunk', 'branch', 'joint', got 'root'"):
        timeline.draw("root", torch.ones(1))
    with pytest.raises(ValueError, match=r"t_star must be a tensor \[R\] on the CPU, got 599"):
        timeline.draw("trunk", 599)
    with pytest.raises(ValueError, match=r"t_star must be in \[0, 1000\], got \[1200.0\]"):
        timeline.jittered(torch.tensor([1200.0]), 0.1)
    with pytest.raises(ValueError, match=r"jitter must be in \[0, 1\]"):
        timeline.jittered(torch.ones(1), 1.5)
