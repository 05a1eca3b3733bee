"""sage.enable on Stable Diffusion: what is shared, what is not, and what is left behind."""


import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from hand_loop import shared_latents
from measures import worst
from sd_calls import GROUPS, GUIDANCE, LEAVES, SEEDS, STEPS, draw, flat
from tiny import NEGATIVES, PROMPTS, generators, stable_diffusion

import sage
from sage import SharingPlan

TABLE_SOLVERS = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}),
}
OWN_STEP = {
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "sa-solver": (SASolverScheduler, {}),
}
SHARED_SOLVERS = [solver for solver in TABLE_SOLVERS if solver != "ddpm"]


@pytest.fixture(scope="module")
def stock():
    return stable_diffusion()


@pytest.fixture
def pipe(stock):
    """The tiny pipeline, with its scheduler put back and sharing off after each test."""
    scheduler = stock.scheduler
    yield stock
    sage.disable(stock)
    stock.scheduler = scheduler


def far(a, b):
    return (a - b).abs().max().item() > 1e-2


def use(pipe, solver):
    cls, overrides = {**TABLE_SOLVERS, **OWN_STEP}[solver]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **overrides)


# ---- nothing shared


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
def test_unshared_table_solver_equals_stock(pipe, solver):
    use(pipe, solver)
    expected = draw(pipe)
    with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
        got = draw(pipe)
    assert sharing.stats["solver_path"] == "table"
    assert worst(got, expected) <= 1e-5
    assert sharing.stats["saving"] == 0


@pytest.mark.parametrize("solver", OWN_STEP)
def test_unshared_other_solver_is_bit_equal_to_stock(pipe, solver):
    use(pipe, solver)
    expected = draw(pipe)
    with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
        got = draw(pipe)
    assert sharing.stats["solver_path"].startswith("own step: ")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("solver", ["euler-a", "dpm++2m-sde", "ddpm", "lcm"])
def test_generators_are_left_where_stock_leaves_them(pipe, solver):
    use(pipe, solver)
    states = []
    for enabled in (False, True):
        if enabled:
            sage.enable(pipe, flat())
        gens = generators(len(PROMPTS))
        pipe(PROMPTS, generator=gens, num_inference_steps=STEPS, output_type="latent")
        states.append([g.get_state() for g in gens])
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_one_generator_for_all_follows_diffusers_rule(pipe):
    use(pipe, "euler-a")
    kwargs = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
    expected = pipe(PROMPTS, generator=torch.Generator().manual_seed(5), **kwargs).images
    with sage.enable(pipe, SharingPlan.independent(LEAVES)):
        got = pipe(PROMPTS, generator=torch.Generator().manual_seed(5), **kwargs).images
    assert worst(got, expected) <= 1e-5


def test_ddim_with_eta_goes_through_the_table(pipe):
    expected = draw(pipe, eta=0.7)
    assert far(expected, draw(pipe))
    with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
        assert worst(draw(pipe, eta=0.7), expected) <= 1e-5
    assert sharing.stats["solver_path"] == "table"


# ---- sharing


@pytest.mark.parametrize("solver", SHARED_SOLVERS)
def test_sharing_equals_the_hand_written_loop(pipe, solver):
    use(pipe, solver)
    calls, branch = (2 * STEPS - 1, 4) if solver in ("heun", "kdpm2") else (STEPS, 4 if solver == "dpm++2s" else 3)
    expected = shared_latents(pipe, pipe.scheduler, PROMPTS, NEGATIVES, SEEDS, GROUPS, branch, STEPS, GUIDANCE)
    with sage.enable(pipe, flat(branch / calls)) as sharing:
        got = draw(pipe)
    assert worst(got, expected) <= 1e-5
    assert sharing.stats["rows"] == [2] * branch + [5] * (calls - branch)
    assert far(got, draw(pipe)), "sharing must change the pictures of members"


@pytest.mark.parametrize("solver", ["dpm++2m", "euler-a"])
def test_controls_that_must_differ(pipe, solver):
    """The comparison above can fail: another group, another branch call or other noise gives other pictures."""
    use(pipe, solver)
    expected = shared_latents(pipe, pipe.scheduler, PROMPTS, NEGATIVES, SEEDS, GROUPS, 3, STEPS, GUIDANCE)
    for plan in (flat(0.5, [[0, 2], [1, 3, 4]]), flat(0.34), flat(0.67), flat(0.5, [[2, 0, 4], [3, 1]])):
        with sage.enable(pipe, plan):
            assert far(draw(pipe), expected)


def test_dropping_the_history_at_the_branch_is_seen(pipe, monkeypatch):
    use(pipe, "dpm++2m")
    with sage.enable(pipe, flat()):
        expected = draw(pipe)
        remember = sage.scheduler.Trajectory.remember

        def forget(self, out):
            remember(self, out)
            if self.index == 3:
                self.history = [torch.zeros_like(m) for m in self.history]

        monkeypatch.setattr(sage.scheduler.Trajectory, "remember", forget)
        assert far(draw(pipe), expected)


@pytest.mark.parametrize("solver, calls", [("pndm", STEPS + 1), ("sa-solver", STEPS)])  # PNDM calls once more than it steps
def test_own_step_shares_as_the_hand_written_loop_does(pipe, solver, calls):
    use(pipe, solver)
    expected = shared_latents(pipe, pipe.scheduler, PROMPTS, NEGATIVES, SEEDS, GROUPS, 3, STEPS, GUIDANCE)
    with sage.enable(pipe, flat(3 / calls)) as sharing:
        got = draw(pipe)
    assert sharing.stats["solver_path"].startswith("own step: ")
    assert sharing.stats["rows"] == [2] * 3 + [5] * (calls - 3)
    assert worst(got, expected) <= 1e-5


def test_heun_branches_between_whole_steps(pipe):
    use(pipe, "heun")
    with sage.enable(pipe, flat(0.4)) as sharing:  # floor(0.4 · 11 + 0.5) = 4: inside the third step
        draw(pipe)
    rows = sharing.stats["rows"]
    assert len(rows) == 2 * STEPS - 1
    assert rows.index(5) % 2 == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_denoiser_rows_equal_the_plans(pipe, share):
    """A hook of the user's on the denoiser sees the rows that are computed, whenever it was registered."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    plan = flat(share)
    try:
        with sage.enable(pipe, plan) as sharing:
            draw(pipe)
    finally:
        hook.remove()
    assert seen == [2 * rows for rows in plan.resolve(STEPS).rows]
    assert sharing.stats["nfe"] == plan.cost(STEPS).nfe


def test_a_spy_inside_the_unet_counts_the_rows(pipe, monkeypatch):
    seen = []
    convolve = pipe.unet.conv_in.forward
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: seen.append(len(x)) or convolve(x))
    plan = flat(0.5)
    with sage.enable(pipe, plan) as sharing:
        draw(pipe)
    assert seen == [2 * rows for rows in plan.resolve(STEPS).rows]
    assert sum(seen) == 2 * sharing.stats["nfe"]


def test_a_tree_parts_in_two_stages(pipe):
    pair = sage.Node((0, 2), 0, 0.67, (sage.Node.single(0), sage.Node.single(2)))
    root = sage.Node((0, 2, 4), 4, 0.34, (pair, sage.Node.single(4)))
    with sage.enable(pipe, SharingPlan.tree(LEAVES, [root])) as sharing:
        got = draw(pipe)
    assert sharing.stats["rows"] == [3, 3, 4, 4, 5, 5]
    assert all(far(got[i], got[j]) for i, j in ((0, 2), (0, 4), (2, 4)))


def test_chunks_of_max_rows_change_nothing(pipe, monkeypatch):
    with sage.enable(pipe, flat()):
        expected = draw(pipe)
    seen = []
    convolve = pipe.unet.conv_in.forward
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: seen.append(len(x)) or convolve(x))
    with sage.enable(pipe, flat(), max_rows=5) as sharing:  # two pictures with their two guidance copies
        got = draw(pipe)
    assert seen == [4] * 3 + [4, 4, 2] * 3
    assert sum(seen) == 2 * sharing.stats["nfe"] and sharing.stats["launches"] == 3 + 9
    assert worst(got, expected) <= 1e-5


def test_max_rows_below_one_picture_is_refused(pipe):
    with sage.enable(pipe, flat(), max_rows=1):
        with pytest.raises(ValueError, match="max_rows must be at least 2, the rows of one picture with its guidance copies, got 1"):
            draw(pipe)


def test_without_guidance_one_copy_per_row(pipe):
    with sage.enable(pipe, flat()) as sharing:
        draw(pipe, guidance_scale=1.0)
    assert sharing.stats["guidance_copies"] == 1


# ---- seeds


def test_a_loner_gives_what_stock_gives(pipe):
    use(pipe, "dpm++2m-sde")
    expected = draw(pipe, [PROMPTS[3]], [NEGATIVES[3]], [SEEDS[3]])
    with sage.enable(pipe, flat(0.5, [[0, 2, 4]])):
        got = draw(pipe)
    assert worst(got[3:4], expected) <= 1e-5


def test_a_picture_depends_on_its_group_alone(pipe):
    """Neither the rest of the batch nor the order of the prompts changes it."""
    use(pipe, "euler-a")
    with sage.enable(pipe, flat()):
        expected = draw(pipe)
    order = [4, 1, 0, 2]
    leaves = [LEAVES[i] for i in order]
    plan = SharingPlan.flat(leaves, [[0, 2, 3]], 0.5, representatives=[2])  # the same group of 0, 2, 4; now 1 is alone
    with sage.enable(pipe, plan):
        got = draw(pipe, [PROMPTS[i] for i in order], [NEGATIVES[i] for i in order], [SEEDS[i] for i in order])
    for row, i in ((0, 4), (2, 0), (3, 2)):
        assert worst(got[row], expected[i]) <= 1e-5
