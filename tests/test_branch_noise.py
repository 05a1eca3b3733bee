"""Noise of their own for the members of a group that parts: against loops by hand, by both engines, and what is refused."""

import diffusers
import native_cases
import pytest
import torch
from hand_branch import GUIDANCE, LEAVES, SEEDS, SHAPE, STEPS, Row, Setting, philox
from measures import far, worst
from native_cases import CASES, Rows
from test_branch_rows import OWN_STEP, WITHOUT
from test_graphs import tapes  # noqa: F401, a fixture
from tiny import NEGATIVES, PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, SharingPlan
from sage.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP, ALONE, ETA, OWN = [0, 2, 4], [1, 3], 0.7, 1 << 30
PLAN = SharingPlan.flat(LEAVES, [GROUP], 0.5, representatives=[2])  # parts after 3 of 6 calls


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


# ---- the native loop


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m", "dpm++3m", "unipc", "heun"])
def test_members_part_with_noise_of_their_own(pipe, solver, eta):
    """By hand, with stock schedulers: the trunk's last step, a part of its noise replaced for each member."""
    setting = Setting(pipe, solver)
    got = setting.sample(PLAN, seeds=torch.tensor(SEEDS), branch_noise=eta)
    calls = len(setting.table) // 2 + (solver == "heun")
    assert setting.rows == [2 * rows for rows in PLAN.resolve(len(setting.table), setting.table.stage == 0).rows]
    trunk = Row(setting, setting.x_init[2:3]).run(calls, GROUP)
    for leaf in GROUP:
        expected = trunk.copy().part(eta, philox(leaf, OWN + calls - 1)).finish(leaf)
        assert worst(got[leaf], expected) <= 3e-6
        assert worst(got[leaf], trunk.copy().part(eta, philox(leaf, calls - 1)).finish(leaf)) > 1e-2  # a solver's own draw
    plain = setting.sample(PLAN)
    assert worst(got[ALONE], plain[ALONE]) <= 1e-6
    assert min(worst(got[leaf], plain[leaf]) for leaf in GROUP) > 1e-2
    assert torch.equal(setting.sample(PLAN, seeds=torch.tensor(SEEDS), branch_noise=0.0), plain)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_parts_by_its_own_stochastic_step(pipe, eta):
    """Stock DDIM's step with `eta`, from the trunk's last call, each member with its noise."""
    setting = Setting(pipe, "ddim")
    got = setting.sample(PLAN, seeds=torch.tensor(SEEDS), branch_noise=eta)
    trunk = Row(setting, setting.x_init[2:3]).run(3, GROUP)
    for leaf in GROUP:
        member, t = trunk.copy(), trunk.scheduler.timesteps[2]
        member.x = member.scheduler.step(trunk.output, t, trunk.before, eta=eta, variance_noise=philox(leaf, OWN + 2)).prev_sample
        assert worst(got[leaf], member.finish(leaf)) <= 3e-6


@pytest.mark.parametrize("solver", ["euler-a", "dpm++2m-sde"])
def test_a_stochastic_solvers_members_draw_for_themselves(pipe, solver):
    """The step after which they part is the solver's own, with noise that is no other draw of theirs."""
    setting = Setting(pipe, solver)
    got = setting.sample(PLAN, branch_noise=0.5)
    trunk = Row(setting, setting.x_init[2:3]).run(2, GROUP, noise_of=2)
    for leaf in GROUP:
        assert worst(got[leaf], trunk.copy().run(1, GROUP, noise_of=leaf, stream=OWN).finish(leaf)) <= 3e-6
        assert worst(got[leaf], trunk.copy().run(1, GROUP, noise_of=leaf).finish(leaf)) > 1e-2
    assert worst(got[GROUP], setting.sample(PLAN)[GROUP]) > 1e-2


@pytest.mark.parametrize("solver", ["dpm++3m", "unipc"])
@pytest.mark.parametrize("second", [0.5, 0.67])  # right after the first parting, or a call later
def test_every_branch_of_a_tree(pipe, solver, second):
    """A node that is still a group parts with its representative's noise, and its members with their own."""
    pair = Node((0, 2), 0, second, (Node.single(0), Node.single(2)))
    plan = SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.34, (pair, Node.single(4)))])
    setting = Setting(pipe, solver)
    got = setting.sample(plan, seeds=torch.tensor(SEEDS), branch_noise=ETA)
    first, then = 2, round(second * STEPS)
    trunk = Row(setting, setting.x_init[4:5]).run(first, GROUP)
    assert worst(got[4], trunk.copy().part(ETA, philox(4, OWN + first - 1)).finish(4)) <= 3e-6
    both = trunk.copy().part(ETA, philox(0, OWN + first - 1)).run(then - first, [0, 2])
    for leaf in (0, 2):
        assert worst(got[leaf], both.copy().part(ETA, philox(leaf, OWN + then - 1)).finish(leaf)) <= 3e-6
        assert worst(got[leaf], both.copy().finish(leaf)) > 1e-2


def test_with_its_corrector_unipc_would_discard_the_noise(pipe):
    setting = Setting(pipe, "unipc")
    got = setting.sample(PLAN, seeds=torch.tensor(SEEDS), branch_noise=1.0)
    member = Row(setting, setting.x_init[2:3]).run(3, GROUP).part(1.0, philox(0, OWN + 2))
    member.scheduler.disable_corrector = []
    assert worst(got[0], member.finish(0)) > 1e-2


def test_noise_of_the_caller(pipe):
    """`noise(call)` is asked for every leaf's, and a member uses its own where it parts."""
    setting = Setting(pipe, "dpm++2m")
    drawn = {call: torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(call)) for call in range(STEPS)}
    got = setting.sample(PLAN, noise=drawn.__getitem__, branch_noise=ETA)
    trunk = Row(setting, setting.x_init[2:3]).run(3, GROUP)
    for leaf in GROUP:
        assert worst(got[leaf], trunk.copy().part(ETA, drawn[2][leaf : leaf + 1]).finish(leaf)) <= 3e-6


def test_pictures_of_one_prompt_differ(pipe):
    """Members with one condition would come out equal."""
    setting = Setting(pipe, "dpm++2m")
    setting.embeds, setting.negatives = (rows[:1].repeat(5, 1, 1) for rows in (setting.embeds, setting.negatives))
    plan = SharingPlan.flat(LEAVES, [list(range(5))], 0.5)
    same = setting.sample(plan)
    assert worst(same[0], same[4]) <= 1e-6
    got = setting.sample(plan, seeds=torch.tensor(SEEDS), branch_noise=ETA)
    assert min(worst(got[i], got[j]) for i in range(5) for j in range(i)) > 1e-2
    never = setting.sample(SharingPlan.flat(LEAVES, [list(range(5))], 1.0), seeds=torch.tensor(SEEDS), branch_noise=ETA)
    assert torch.equal(never[0], never[4])  # nothing parts


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m", "unipc", "heun"])
def test_replayed_graphs_part_as_the_eager_loop_does(pipe, tapes, solver):  # noqa: F811
    setting = Setting(pipe, solver)
    options = dict(seeds=torch.tensor(SEEDS), branch_noise=ETA)
    assert worst(setting.sample(PLAN, graphs=True, **options), setting.sample(PLAN, **options)) <= 1e-6
    assert len(tapes) == 1


def test_newcomers_that_share_part_with_noise_too(pipe):
    setting, trunks = Setting(pipe, "unipc", steps=8), {}
    setting.sample(PLAN, on_part=trunks.__setitem__)
    pair = SharingPlan.flat([LEAVES[i] for i in ALONE], [[0, 1]], 0.5, representatives=[1])
    got = setting.sample(pair, trunks[0], ALONE, seeds=torch.tensor(SEEDS)[ALONE], branch_noise=ETA)
    both = Row(setting, setting.x_init[2:3]).run(4, GROUP).run(2, ALONE)
    for row, leaf in enumerate(ALONE):
        assert worst(got[row], both.copy().part(ETA, philox(leaf, OWN + 5)).finish(leaf)) <= 3e-6


# ---- pipelines


def stock_scheduler(pipe, solver):
    name, overrides = SOLVERS[solver]
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def hooked(pipe, plan, gens=None, at=range(5), **options):
    with sage.enable(pipe, plan, **options) as sharing:
        prompts, negatives = ([texts[i] for i in at] for texts in (PROMPTS, NEGATIVES))
        given = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", generator=gens or generators())
        return pipe(prompts, negative_prompt=negatives, **given).images, sharing.stats


@pytest.fixture
def solver(request, pipe):
    stock, pipe.scheduler = pipe.scheduler, stock_scheduler(pipe, request.param)
    yield request.param
    pipe.scheduler = stock


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m", "unipc", "heun"], indirect=True)
def test_the_hook_draws_from_clones_of_the_generators(pipe, solver):
    setting, gens, stock = Setting(pipe, solver), generators(), generators()
    got, stats = hooked(pipe, PLAN, gens, branch_noise=ETA)
    calls = len(setting.table) // 2 + (solver == "heun")
    trunk = Row(setting, setting.x_init[2:3]).run(calls, GROUP)
    for leaf, generator in enumerate(stock):
        torch.randn(1, *SHAPE, generator=generator)  # its initial latents
        assert torch.equal(generator.get_state(), gens[leaf].get_state())
        noise = torch.randn(SHAPE, generator=generator)
        if leaf in GROUP:
            assert worst(got[leaf], trunk.copy().part(ETA, noise[None]).finish(leaf)) <= 1e-5
    plain = hooked(pipe, PLAN)[0]
    assert worst(got[ALONE], plain[ALONE]) <= 1e-6 and min(worst(got[leaf], plain[leaf]) for leaf in GROUP) > 1e-2
    assert stats["rows"] == PLAN.resolve(len(setting.table), setting.table.stage == 0).rows


@pytest.mark.parametrize("solver", ["euler-a", "dpm++2m-sde"], indirect=True)
def test_a_stochastic_solvers_own_draws_serve_in_the_hook(pipe, solver):
    """Every picture's generator is drawn from at every step anyway: there the members use their own."""
    gens, theirs = generators(), generators()
    got, plain = hooked(pipe, PLAN, gens, branch_noise=ETA)[0], hooked(pipe, PLAN, theirs)[0]
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(gens, theirs))
    assert worst(got[ALONE], plain[ALONE]) <= 1e-6 and worst(got[2], plain[2]) <= 1e-6  # the representative's are the trunk's
    assert min(worst(got[leaf], plain[leaf]) for leaf in (0, 4)) > 1e-2


@pytest.mark.parametrize("solver", ["unipc"], indirect=True)
def test_a_pictures_noise_does_not_depend_on_the_others(pipe, solver):
    """Groups that part earlier, or twice, leave it alone; so does the order."""
    pair = Node((0, 2), 2, 0.67, (Node.single(0), Node.single(2)))
    tree = Node((0, 2, 4), 2, 0.5, (pair, Node.single(4)))
    whole = hooked(pipe, SharingPlan.tree(LEAVES, [tree, Node((1, 3), 1, 0.17, (Node.single(1), Node.single(3)))]), branch_noise=ETA)[0]
    at = [4, 2, 0]
    leaves = [LEAVES[i] for i in at]
    part = Node((1, 2), 1, 0.67, (Node.single(1), Node.single(2)))
    plan = SharingPlan.tree(leaves, [Node((0, 1, 2), 1, 0.5, (Node.single(0), part))])
    alone = hooked(pipe, plan, generators([SEEDS[i] for i in at]), at, branch_noise=ETA)[0]
    assert worst(alone, whole[at]) <= 1e-5


def test_one_generator_for_all(pipe):
    """Given once, or once per picture: its clone is drawn from in turn, so that members differ."""
    one = torch.Generator().manual_seed(5)
    plan = SharingPlan.flat([Leaf(PROMPTS[0], k) for k in range(3)], [[0, 1, 2]], 0.5)
    for given in (one, [one] * 3, None):
        got = hooked(pipe, plan, given or torch.manual_seed(6), [0, 0, 0], branch_noise=ETA)[0]
        assert min(worst(got[i], got[j]) for i in range(3) for j in range(i)) > 1e-2
    with sage.enable(pipe, plan, branch_noise=ETA):
        torch.manual_seed(7)
        pipe([PROMPTS[0]] * 3, num_inference_steps=STEPS, output_type="latent")
        after = torch.get_rng_state()
    torch.manual_seed(7)
    pipe([PROMPTS[0]] * 3, num_inference_steps=STEPS, output_type="latent")
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", ["Stable Diffusion", "Stable Diffusion 3", "Flux", "Wan"])
def test_both_engines_part_alike(name):
    """For every solver of the family, flow matching and such as need a timestep list of their own."""
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    stock = pipe.scheduler
    for solver, overrides in case.solvers.items():
        pipe.scheduler = stock
        native_cases.with_solver(pipe, solver, overrides)
        for plan in (native_cases.flat(), native_cases.tree()):
            ours, theirs = native_cases.generators(), native_cases.generators()
            expected = native_cases.hooked(pipe, plan, case.kwargs, gens=theirs, branch_noise=ETA)[0]
            got = native_cases.native(pipe, plan, case.kwargs, gens=ours, branch_noise=ETA)[0]
            assert worst(got, expected) <= 1e-5, solver
            assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs))
            plain = native_cases.native(pipe, plan, case.kwargs)[0]
            leaders = [0, 1] if solver in OWN_STEP and plan == native_cases.flat() else [2, 1] if solver in OWN_STEP else []
            members = [leaf for leaf in range(5) if leaf not in leaders]  # a leader's own draws were the trunk's
            assert far(got[members], plain[members])


@pytest.mark.parametrize("engine", ["native", "hook"])
def test_generate_parts_with_noise(pipe, engine):
    plan = SharingPlan.flat([Leaf(p) for p in PROMPTS], [GROUP], 0.5)
    given = dict(plan=plan, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", progress=False, engine=engine)
    whole = sage.generate(pipe, PROMPTS, branch_noise=ETA, **given)
    packed = sage.generate(pipe, PROMPTS, branch_noise=ETA, max_rows=2, **given)
    plain = sage.generate(pipe, PROMPTS, **given)
    for leaf in range(5):
        assert worst(packed.images[leaf], whole.images[leaf]) <= 1e-5
        assert (worst(whole.images[leaf], plain.images[leaf]) > 1e-2) == (leaf in GROUP)
    assert whole.stats["nfe"] == plain.stats["nfe"]
    other = sage.generate(pipe, PROMPTS, branch_noise=ETA, **given | dict(engine="hook" if engine == "native" else "native"))
    assert max(worst(a, b) for a, b in zip(whole.images, other.images)) <= 1e-5


# ---- refusals


@pytest.mark.parametrize("name", WITHOUT)
def test_solvers_whose_memory_would_not_fit_are_refused(pipe, name):
    setting = Setting(pipe, name)
    with pytest.raises(NotImplementedError, match=f"{name}: what it stores is no denoised sample, and would not fit a sample with"):
        setting.sample(PLAN, seeds=torch.tensor(SEEDS), branch_noise=ETA)
    assert setting.rows == []
    stock, pipe.scheduler = pipe.scheduler, setting.scheduler
    try:
        with Rows(pipe) as seen:
            with pytest.raises(NotImplementedError, match=f"branch_noise 0.7 has no form for this scheduler: {name}: what it stores"):
                hooked(pipe, PLAN, branch_noise=ETA)
            with pytest.raises(NotImplementedError, match="what it stores is no denoised sample"):
                sage.generate(pipe, PROMPTS, share=0.5, similarity=0.1, branch_noise=ETA, progress=False)
        assert seen == []
    finally:
        pipe.scheduler = stock


def test_schedulers_outside_the_table_are_refused(pipe):
    stock, pipe.scheduler = pipe.scheduler, diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    try:
        with Rows(pipe) as seen, pytest.raises(NotImplementedError, match="branch_noise 0.7 has no form for this scheduler: PNDM"):
            hooked(pipe, PLAN, branch_noise=ETA)
        assert seen == []
        hooked(pipe, PLAN)
    finally:
        pipe.scheduler = stock


def test_a_step_that_leaves_the_table_is_refused(pipe):
    """By an argument that the pipeline passes on, which nobody can know before the first step."""
    with sage.enable(pipe, PLAN, branch_noise=ETA), pytest.raises(NotImplementedError, match="needs the coefficient table, which this"):
        pipe(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=STEPS, output_type="latent", eta=1.5)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(branch_noise=1.5), ValueError, r"branch_noise must be in \[0, 1\], got 1.5"),
        (dict(branch_noise=-0.1), ValueError, r"branch_noise must be in \[0, 1\], got -0.1"),
        (dict(branch_noise="much"), TypeError, r"branch_noise must be a number in \[0, 1\], got 'much'"),
        (dict(branch_noise=ETA), ValueError, "branch_noise 0.7 gives every member noise of its own: pass seeds"),
        (dict(branch_noise=ETA, seeds=torch.tensor(SEEDS), on_part=print), ValueError, "branch_noise 0.7 and on_part exclude each"),
    ],
)
def test_bad_options_are_refused_before_the_denoiser_runs(pipe, options, error, message):
    setting = Setting(pipe, "ddim")
    with pytest.raises(error, match=message):
        setting.sample(PLAN, **options)
    assert setting.rows == []


def test_the_pipelines_options_are_checked_too(pipe):
    with pytest.raises(ValueError, match=r"branch_noise must be in \[0, 1\], got 2"):
        sage.enable(pipe, PLAN, branch_noise=2)
    with pytest.raises(ValueError, match=r"branch_noise must be in \[0, 1\], got 2"):
        sage.generate(pipe, PROMPTS, branch_noise=2)
    with pytest.raises(ValueError, match="branch_noise 0.5 and keep_trunks exclude each other"):
        sage.generate(pipe, PROMPTS, branch_noise=0.5, keep_trunks=True)
