"""Members of a group that step back where it parts: against loops by hand, by pipelines, and what is refused."""

from unittest import mock

import diffusers
import native_cases
import pytest
import torch
from hand_branch import GUIDANCE, LEAVES, SEEDS, SHAPE, STEPS, Row, Setting, philox
from measures import far, worst
from native_cases import CASES
from tiny import PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, SharingPlan
from sage.solvers import SOLVERS, table_for
from sage.step_back import OwnNoise, draw_number

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP, PAIR, OWN = [0, 2, 4], [1, 3], torch.tensor(SEEDS)
PLAN = SharingPlan.flat(LEAVES, [GROUP, PAIR], [0.5, 0.67], representatives=[2, 1])  # part after 3 and 4 of 6 calls
HAND = ("ddim", "euler", "dpm++2m", "unipc", "flow-euler")
WITHOUT = ("deis", "lms", "tcd", "heun", "kdpm2", "kdpm2-a", "flow-heun", "dpm++2s", "dpm++3s")


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def setting_of(pipe, solver: str, steps: int = STEPS) -> Setting:
    """As it is, with what the schedulers of flow matching leave out."""
    with mock.patch.object(diffusers.SchedulerMixin, "init_noise_sigma", 1.0, create=True):
        setting = Setting(pipe, solver, steps)
    if not hasattr(setting.scheduler, "scale_model_input"):
        setting.scheduler.scale_model_input = lambda sample, timestep: sample
    return setting


def level(scheduler, call: int) -> tuple[float, float]:
    """(α, σ) that a stock scheduler's sample has where a call begins."""
    if isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler)):
        kept = scheduler.alphas_cumprod[int(scheduler.timesteps[call])].item()
        return kept**0.5, (1 - kept) ** 0.5
    sigma = scheduler.sigmas[call].item()
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return 1 - sigma, sigma
    if isinstance(scheduler, (diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler)):
        return 1.0, sigma
    return 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5


def walk(row: Row, calls: int, members: list[int], **options) -> list[Row]:
    """The row before each of some calls and after the last, [calls + 1]."""
    rows = [row]
    for _ in range(calls):
        rows.append(rows[-1].copy().run(1, members, **options))
    return rows


def returned(path: list[Row], back: int, noise: torch.Tensor) -> Row:
    """The last row of a path, noised [1, ...] up to the level of `back` calls earlier, with the scheduler as it was there."""
    last, row = path[-1], path[max(0, len(path) - 1 - back)].copy()
    (alpha, sigma), (alpha_to, sigma_to) = (level(row.scheduler, call) for call in (last.call, row.call))
    row.x = alpha_to / alpha * last.x + (sigma_to**2 - (alpha_to / alpha * sigma) ** 2) ** 0.5 * noise
    if hasattr(row.scheduler, "disable_corrector"):  # it would go back to the sample before the noise
        row.scheduler.disable_corrector = [*row.scheduler.disable_corrector, row.call - 1]
    return row


def number(parting: int, steps: int = STEPS) -> int:
    return draw_number(steps, parting, parting + 1)


# ---- the native loop


@pytest.mark.parametrize("back", [1, 2, 9])
@pytest.mark.parametrize("solver", [*HAND, "dpm++3m"])
def test_members_go_back_and_come_again_alone(pipe, solver, back):
    """Two groups that part at different calls; 9 calls back is to the first."""
    setting, seen = setting_of(pipe, solver), []
    got = setting.sample(PLAN, seeds=OWN, branch_back=back, on_call=seen.append)
    for members, leader, calls in ((GROUP, 2, 3), (PAIR, 1, 4)):
        trunk = walk(Row(setting, setting.x_init[leader : leader + 1]), calls, members)
        for leaf in members:
            expected = returned(trunk, back, philox(leaf, number(calls - 1))).finish(leaf)
            assert worst(got[leaf], expected) <= 5e-6
            assert worst(got[leaf], trunk[-1].copy().finish(leaf)) > 1e-2
    assert setting.rows == [2 * rows for rows in seen]
    assert seen == [2, 2, 2, *[3] * min(back, 3), 4, *[2] * min(back, 4), 5, 5]
    assert sum(seen) == PLAN.cost(STEPS, branch_back=back).nfe == PLAN.cost(STEPS).nfe + 3 * min(back, 3) + 2 * min(back, 4)


@pytest.mark.parametrize("solver", ["euler-a", "dpm++2m-sde", "ddpm"])
def test_a_stochastic_solver_draws_anew(pipe, solver):
    setting, back, calls = setting_of(pipe, solver), 2, 3
    got = setting.sample(PLAN, branch_back=back)
    trunk = walk(Row(setting, setting.x_init[2:3]), calls, GROUP, noise_of=2)
    for leaf in GROUP:
        member = returned(trunk, back, philox(leaf, number(calls - 1)))
        member.run(back, [leaf], leaf, stream=draw_number(STEPS, calls - 1, 0))
        assert worst(got[leaf], member.finish(leaf)) <= 5e-6


@pytest.mark.parametrize("second", [0.5, 0.67])  # a call after the first parting, whose calls are then made a third time, or two
@pytest.mark.parametrize("solver", [*HAND, "dpm++3m"])
def test_every_branch_of_a_tree(pipe, solver, second):
    """A node that is still a group goes back with its representative's noise, and its members from where it came again."""
    pair = Node((0, 2), 0, second, (Node.single(0), Node.single(2)))
    plan = SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.34, (pair, Node.single(4)))])
    setting, seen, back, first, then = setting_of(pipe, solver), [], 2, 2, round(second * STEPS)
    got = setting.sample(plan, seeds=OWN, branch_back=back, on_call=seen.append)
    trunk = walk(Row(setting, setting.x_init[4:5]), first, GROUP)
    assert worst(got[4], returned(trunk, back, philox(4, number(first - 1))).finish(4)) <= 5e-6
    both = returned(trunk, back, philox(0, number(first - 1)))
    path = walk(both, then - both.call, [0, 2])
    for leaf in (0, 2):
        assert worst(got[leaf], returned(path, back, philox(leaf, number(then - 1))).finish(leaf)) <= 5e-6
    assert setting.rows == [2 * rows for rows in seen] and sum(seen) == plan.cost(STEPS, branch_back=back).nfe


def test_with_its_corrector_unipc_would_discard_the_noise(pipe):
    setting = setting_of(pipe, "unipc")
    got = setting.sample(PLAN, seeds=OWN, branch_back=1)
    member = returned(walk(Row(setting, setting.x_init[2:3]), 3, GROUP), 1, philox(0, number(2)))
    member.scheduler.disable_corrector = []
    assert worst(got[0], member.finish(0)) > 1e-2


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m", "unipc", "euler-a"])
def test_no_step_back_changes_nothing(pipe, solver):
    setting, seeds = setting_of(pipe, solver), dict(seeds=OWN)
    plain = setting.sample(PLAN, **seeds)
    assert torch.equal(setting.sample(PLAN, branch_back=0, **seeds), plain)
    alone = SharingPlan.independent(LEAVES)
    assert torch.equal(setting.sample(alone, branch_back=2, **seeds), setting.sample(alone, **seeds))  # nothing parts
    assert PLAN.cost(STEPS, branch_back=0) == PLAN.cost(STEPS)


def test_noise_of_the_caller_and_guidance_of_each_call(pipe):
    """`noise` is asked for every leaf's by the number of the draw; a call made again has the guidance scale that it had."""
    setting, asked, scales = setting_of(pipe, "dpm++2m"), [], [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]

    def noise(draw):
        asked.append(draw)
        return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(draw))

    got = setting.sample(PLAN, noise=noise, branch_back=2, guidance_scale=scales)
    assert asked == [0, 1, 2, number(2), 3, number(3), 4, 5]
    trunk = [Row(setting, setting.x_init[2:3])]
    for scale in scales[:3]:
        trunk.append(trunk[-1].copy().run(1, GROUP, guidance=scale))
    member = returned(trunk, 2, noise(number(2))[4:5])
    for scale in scales[1:]:
        member.run(1, [4], guidance=scale)
    assert worst(got[4], member.x[0]) <= 5e-6


def test_every_draw_has_a_number_of_its_own():
    """The solver's own draws are 0 … S − 1, those of branch noise begin at 2^30."""
    for steps in (2, 7, 1000):
        numbers = [draw_number(steps, parting, row) for parting in range(steps - 1) for row in range(parting + 2)]
        assert len(set(numbers)) == len(numbers) and min(numbers) >= steps and max(numbers) < 1 << 30


def test_members_differ_more(pipe):
    setting = setting_of(pipe, "dpm++2m")
    apart = []
    for back in (0, 1, 3):
        got = setting.sample(PLAN, seeds=OWN, branch_back=back)[GROUP].flatten(1)
        apart.append(torch.nn.functional.pdist(got).mean().item())
    assert apart[0] < apart[1] < apart[2]
    setting.embeds, setting.negatives = (rows[:1].repeat(5, 1, 1) for rows in (setting.embeds, setting.negatives))
    same = setting.sample(PLAN, seeds=OWN)
    assert worst(same[0], same[4]) <= 1e-6  # members with one condition would come out equal
    got = setting.sample(PLAN, seeds=OWN, branch_back=1)
    assert min(worst(got[i], got[j]) for i, j in ((0, 2), (0, 4), (2, 4), (1, 3))) > 1e-2


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m", "unipc", "flow-euler"])
def test_the_noise_level_is_that_of_the_call(solver):
    """With a denoiser that knows x0, what a call made again sees is α·x0 + σ·ε with ε of variance 1."""
    name, options = SOLVERS[solver]
    scheduler = getattr(diffusers, name).from_config({"num_train_timesteps": 1000, "clip_sample": False}, **options)
    scheduler.set_timesteps(8)
    table, shape, x0, seen = table_for(scheduler), (4, 64, 64), 3.0, []
    calls = {float(t): call for call, t in enumerate(table.timesteps)}

    def denoise(model_input, timestep, conditions):
        call = calls[timestep.item()]
        alpha, sigma = table.levels.begin[call]
        eps = (model_input / (table.input_scale if call == 0 else table.column("s")[call - 1]) - alpha * x0) / sigma
        seen.append((call, eps))
        return eps - x0 if solver == "flow-euler" else eps

    alpha, sigma = table.levels.begin[0]
    eps = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    plan = SharingPlan.flat([Leaf("a", k) for k in range(3)], [[0, 1, 2]], 0.5)
    given = dict(seeds=torch.arange(3), branch_back=2)
    got = sage.sample(denoise, plan, table, (alpha * x0 + sigma * eps).float(), torch.zeros(3, 1, 1), **given)
    assert [call for call, _ in seen] == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]
    trunk, again = seen[3][1], seen[4][1]
    assert again.shape[0] == 3 and (again.var(dim=(1, 2, 3)) - 1).abs().max() < 0.05 and again.mean().abs() < 0.02
    for _, noise in seen[5:]:
        assert (noise.var(dim=(1, 2, 3)) - 1).abs().max() < 0.05
    pairs = torch.corrcoef(torch.cat([trunk, again]).flatten(1))
    (alpha, sigma), (alpha_to, sigma_to) = table.levels.end[3], table.levels.begin[2]
    kept = alpha_to * sigma / (alpha * sigma_to)  # of the noise that the group had
    assert (pairs[0, 1:] - kept).abs().max() < 0.04 and (pairs[1, 2:] - kept**2).abs().max() < 0.04
    assert worst(got, torch.full_like(got, x0)) < 0.05


@pytest.mark.parametrize("solver", ["unipc", "euler-a"])
def test_a_picture_does_not_depend_on_the_others(pipe, solver):
    setting = setting_of(pipe, solver)
    whole = setting.sample(PLAN, seeds=OWN, branch_back=2)
    plan = SharingPlan.flat([LEAVES[leaf] for leaf in PAIR], [[0, 1]], 0.67, representatives=[0])
    assert worst(setting.sample(plan, leaves=PAIR, seeds=OWN[PAIR], branch_back=2), whole[PAIR]) <= 1e-6


def test_newcomers_go_back_to_the_trunk_at_the_earliest(pipe):
    setting, trunks = setting_of(pipe, "unipc", steps=8), {}
    setting.sample(SharingPlan.flat(LEAVES, [GROUP], 0.5, representatives=[2]), on_part=trunks.__setitem__)
    pair = SharingPlan.flat([LEAVES[leaf] for leaf in PAIR], [[0, 1]], 0.5, representatives=[1])
    got = setting.sample(pair, trunks[0], PAIR, seeds=OWN[PAIR], branch_back=3)
    path = walk(Row(setting, setting.x_init[2:3]).run(4, GROUP), 2, PAIR)
    for at, leaf in enumerate(PAIR):
        assert worst(got[at], returned(path, 3, philox(leaf, number(5, 8))).finish(leaf)) <= 5e-6


def test_a_gradient_goes_through_a_step_back(pipe):
    setting = setting_of(pipe, "dpm++2m")
    x_init = setting.x_init.clone().requires_grad_()
    given = dict(negative_conditions=setting.negatives, guidance_scale=GUIDANCE, seeds=OWN, branch_back=2)
    sage.sample(setting.denoise, PLAN, setting.table, x_init, setting.embeds, **given)[4].sum().backward()
    assert x_init.grad[2].abs().max() > 0 and not x_init.grad[[0, 1, 3, 4]].any()


# ---- pipelines


@pytest.mark.parametrize("name", ["Stable Diffusion", "Flux", "Wan"])
def test_pipelines_step_back(name):
    """For every solver that can: other pictures of a group's members, and the generators where they would be."""
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    stock, plan = pipe.scheduler, native_cases.flat()
    for solver, overrides in case.solvers.items():
        pipe.scheduler = stock
        native_cases.with_solver(pipe, solver, overrides)
        ours, theirs = native_cases.generators(), native_cases.generators()
        plain, stats = native_cases.native(pipe, plan, case.kwargs, gens=theirs)[:2]
        if solver in WITHOUT:
            with pytest.raises(NotImplementedError, match=f"branch_back 1 has no form for {solver}: its steps have several denoiser"):
                native_cases.native(pipe, plan, case.kwargs, branch_back=1)
            continue
        got, more = native_cases.native(pipe, plan, case.kwargs, gens=ours, branch_back=1)[:2]
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs)), solver
        assert more["rows"] == plan.resolve(stats["num_calls"]).rows_made(1) and len(more["rows"]) == stats["num_calls"] + 1
        assert more["nfe"] == sum(more["rows"]) == plan.cost(stats["num_calls"], branch_back=1).nfe > stats["nfe"]
        assert far(got, plain), solver


@pytest.mark.parametrize("solver", ["unipc", "euler-a"])
def test_generate_steps_back(pipe, solver):
    plan = SharingPlan.flat([Leaf(p) for p in PROMPTS], [GROUP], 0.5)
    given = dict(plan=plan, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", progress=False, solver=solver)
    whole = sage.generate(pipe, PROMPTS, branch_back=2, **given)
    packed = sage.generate(pipe, PROMPTS, branch_back=2, max_rows=2, **given)
    plain = sage.generate(pipe, PROMPTS, **given)
    for leaf in range(5):
        assert worst(packed.images[leaf], whole.images[leaf]) <= 1e-5  # whoever else is in the pack
        assert (worst(whole.images[leaf], plain.images[leaf]) > 1e-2) == (leaf in GROUP)
    assert whole.stats["engine"] == "native" and whole.stats["nfe"] == packed.stats["nfe"] == plain.stats["nfe"] + 6
    assert whole.stats["nfe"] == sum(whole.stats["rows"]) == plan.cost(STEPS, branch_back=2).nfe


def test_a_step_back_does_not_reuse_what_the_scheduler_draws(pipe):
    """The generators of a stochastic solver go on being drawn from: those of the step back are others."""
    generator = torch.Generator().manual_seed(1)
    plan = PLAN.resolve(STEPS)
    own = OwnNoise(plan, [generator] * 3 + [torch.Generator().manual_seed(2)] * 2)
    like, before = torch.zeros(5, 64), generator.get_state()
    drawn, again = own.draw(2, like), own.draw(2, like)
    assert torch.equal(generator.get_state(), before)
    assert drawn[GROUP].abs().min(dim=1).values.gt(0).all() and not drawn[PAIR].any()
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], again[0])
    theirs = torch.randn(64, 64, generator=generator)
    assert (theirs - drawn[0]).abs().max(dim=1).values.min() > 0.1


# ---- refusals


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_steps_back_or_says_why_not(pipe, solver):
    setting = setting_of(pipe, solver)
    if solver not in WITHOUT:
        assert setting.sample(PLAN, seeds=OWN, branch_back=1).isfinite().all()
        return
    reason = "its steps have several denoiser calls" if setting.table.stage.any() else "what it stores is no denoised sample"
    with pytest.raises(NotImplementedError, match=f"branch_back 1 has no form for .*: {reason}; take ddim, ddpm, euler"):
        setting.sample(PLAN, seeds=OWN, branch_back=1)
    assert setting.rows == []


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(branch_back=-1), ValueError, "branch_back must be at least 0, got -1"),
        (dict(branch_back=0.5), TypeError, "branch_back must be an integer, got 0.5"),
        (dict(branch_back=2), ValueError, "branch_back 2 gives every member noise of its own: pass seeds"),
        (dict(branch_back=2, seeds=OWN, branch_noise=0.5), ValueError, "branch_back 2 and branch_noise exclude each other"),
        (dict(branch_back=2, seeds=OWN, on_part=print), ValueError, "branch_back 2 and on_part exclude each other"),
        (dict(branch_back=2, seeds=OWN, graphs=True), ValueError, "branch_back 2 and graphs exclude each other: .* pass graphs=False"),
    ],
)
def test_bad_options_are_refused_before_the_denoiser_runs(pipe, options, error, message):
    setting = setting_of(pipe, "ddim")
    with pytest.raises(error, match=message):
        setting.sample(PLAN, **options)
    assert setting.rows == []


def test_a_captured_denoiser_is_refused(pipe):
    setting = setting_of(pipe, "ddim")
    given = dict(negative_conditions=setting.negatives, guidance_scale=GUIDANCE, seeds=OWN, branch_back=1)
    with pytest.raises(ValueError, match="branch_back 1 and graphs exclude each other"):
        sage.sample(sage.CapturedDenoiser(setting.denoise), PLAN, setting.table, setting.x_init, setting.embeds, **given)


def test_generate_never_steps_back_by_the_hook(pipe):
    with pytest.raises(ValueError, match='branch_back needs the native loop, got engine="hook"; use engine="auto" or "native"'):
        sage.generate(pipe, PROMPTS, engine="hook", branch_back=1)
    with pytest.raises(sage.native.NotNative, match="leaves the argument cross_attention_kwargs at its default"):
        sage.generate(pipe, PROMPTS, branch_back=1, share=0.5, similarity=0.1, progress=False, cross_attention_kwargs={})
    for other in (dict(keep_trunks=True), dict(branch_noise=0.5)):
        with pytest.raises(ValueError, match=f"branch_back 1 and {next(iter(other))} exclude each other"):
            sage.generate(pipe, PROMPTS, branch_back=1, **other)
    with pytest.raises(ValueError, match="branch_back must be at least 0, got -1"):
        sage.generate(pipe, PROMPTS, branch_back=-1)
    with pytest.raises(ValueError, match="SharingPlan.cost: branch_back must be at least 0, got -1"):
        PLAN.cost(STEPS, branch_back=-1)
