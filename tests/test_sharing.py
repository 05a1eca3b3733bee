"""sage.enable on Stable Diffusion: what is shared, what is not, and what is left behind."""

import copy
import pickle
import subprocess
import sys
import threading

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
from tiny import NEGATIVES, PROMPTS, generators, stable_diffusion

import sage
from sage import Leaf, SharingPlan

STEPS, GUIDANCE = 6, 3.0
SEEDS = [100 + number for number in range(len(PROMPTS))]
LEAVES = [Leaf(prompt) for prompt in PROMPTS]
GROUPS = [[0, 2, 4], [1, 3]]
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
SHARED_SOLVERS = ("kdpm2", "lms", "deis", "dpm++2s", "ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-sde", "dpm++3m", "unipc", "heun", "lcm")


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


def use(pipe, solver):
    cls, overrides = {**TABLE_SOLVERS, **OWN_STEP}[solver]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **overrides)


def draw(pipe, prompts=PROMPTS, negatives=NEGATIVES, seeds=SEEDS, **kwargs):
    """Latents [B, 4, 8, 8] of one call, a generator per picture."""
    options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent") | kwargs
    gens = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, negative_prompt=negatives, generator=gens, **options).images


def flat(share=0.5, groups=GROUPS):
    return SharingPlan.flat(LEAVES, groups, share, representatives=[group[0] for group in groups])


def far(a, b):
    return (a - b).abs().max().item() > 1e-2


def worst(a, b):
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


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


# ---- left as it was


def test_disable_gives_the_pipeline_back(pipe):
    before, cls, scheduler = draw(pipe), type(pipe), pipe.scheduler
    attributes, hooks = set(pipe.__dict__), len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks)
    sharing = sage.enable(pipe, flat())
    assert isinstance(pipe, cls)
    draw(pipe)
    sharing.disable()
    assert type(pipe) is cls
    assert pipe.scheduler is scheduler and type(scheduler) is DDIMScheduler
    assert set(pipe.__dict__) == attributes
    assert len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks) == hooks
    assert torch.equal(draw(pipe), before)
    copy.deepcopy(pipe)


def test_an_exception_inside_a_call_leaves_the_pipeline_clean(pipe):
    before = draw(pipe)

    def fail(*args):
        raise KeyError("from a callback")

    with sage.enable(pipe, flat()):
        with pytest.raises(KeyError, match="from a callback"):
            draw(pipe, callback_on_step_end=fail)
        assert type(pipe.scheduler) is DDIMScheduler and not pipe.unet._forward_hooks
        draw(pipe)
    assert torch.equal(draw(pipe), before)


def test_enabling_again_replaces_the_former_settings(pipe):
    cls = type(pipe)
    sage.enable(pipe, flat(0.5))
    sharing = sage.enable(pipe, flat(0.25))
    draw(pipe)
    assert sharing.stats["rows"].count(2) == 2
    sharing.disable()
    assert type(pipe) is cls


def test_a_pipeline_saved_while_enabled_loads_without_this_package(pipe, tmp_path):
    pipe.scheduler = sage.SageScheduler.from_config(pipe.scheduler.config, solver="dpm++2m")
    with sage.enable(pipe, flat()):
        draw(pipe)
        pipe.save_pretrained(tmp_path)
    script = (
        "import sys\n"
        "sys.modules['sage'] = sys.modules['sage_kernels'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, local_files_only=True)\n"
        "print(type(pipe).__name__, type(pipe.scheduler).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["StableDiffusionPipeline", "DPMSolverMultistepScheduler"], done.stderr


def test_two_pipelines_with_one_unet_in_two_threads(pipe):
    """A denoiser in common obeys, in each thread, the pipeline that is running there."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected_stock = draw(pipe)
    with sage.enable(pipe, flat()):
        expected_shared = draw(pipe)
        assert torch.equal(draw(other), expected_stock)
        results = {}
        threads = [
            threading.Thread(target=lambda: results.__setitem__("shared", draw(pipe))),
            threading.Thread(target=lambda: results.__setitem__("stock", draw(other))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(results["shared"], expected_shared)
    assert torch.equal(results["stock"], expected_stock)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_an_enabled_pipeline_is_a_stock_pipeline(pipe, clone):
    cls = type(pipe)
    with sage.enable(pipe, flat()):
        other = clone(pipe)
        assert type(other) is cls and "_sage_sharing" not in other.__dict__
        draw(pipe)
        sage.disable(other)
        assert type(pipe) is not cls, "disabling the copy must not disable the original"


def test_stats_count_rows_when_guidance_ends_early(pipe):
    def stop_guiding(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    with sage.enable(pipe, flat()) as sharing:
        draw(pipe, callback_on_step_end=stop_guiding, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert sharing.stats["rows"] == [2, 2, 2, 5, 5, 5] and sharing.stats["nfe"] == 21
    assert sharing.stats["denoiser_rows"] == 2 * 6 + 15


# ---- loops that would go wrong silently


def test_another_loop_on_the_same_scheduler_is_refused(pipe):
    stock = type(pipe)(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def call(other):
        return lambda *args: other("x", num_inference_steps=2, output_type="latent") and {}

    with sage.enable(pipe, flat()):
        with pytest.raises(RuntimeError, match="set_timesteps was called in the middle of a shared call"):
            draw(pipe, callback_on_step_end=call(stock))
    with sage.enable(pipe, share=0.0) as sharing:
        sharing.plan, sharing._fixed_plan = None, SharingPlan.independent([Leaf("x")])
        with pytest.raises(RuntimeError, match="while a shared call on the same scheduler object is under way"):
            pipe("x", num_inference_steps=2, callback_on_step_end=call(pipe))
    assert type(pipe.scheduler) is DDIMScheduler and "_sage_run" not in pipe.scheduler.__dict__


def test_a_step_replaced_on_the_scheduler_object_is_refused(pipe):
    """The plan is followed in the step that a shared call brings; this one would hide it."""
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    try:
        with sage.enable(pipe, flat()):
            with pytest.raises(RuntimeError, match="DDIMScheduler.step was replaced on this object"):
                draw(pipe)
    finally:
        del pipe.scheduler.step


def test_a_method_replaced_on_the_scheduler_object_is_respected(pipe):
    scale = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda sample, timestep: 1.1 * scale(sample, timestep)
    try:
        expected = draw(pipe)
        with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
            assert torch.equal(draw(pipe), expected)
        assert "scale_model_input was replaced on this object" in sharing.stats["solver_path"]
    finally:
        del pipe.scheduler.scale_model_input


def test_another_pipeline_inside_a_callback_is_not_shared(pipe):
    """It has the same U-Net and a scheduler of its own: its pictures are its own, and nothing of them is counted."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected, inside = draw(other), []
    with sage.enable(pipe, flat()) as sharing:
        plain = draw(pipe)
        counted = sharing.stats["launches"], sharing.stats["denoiser_rows"]
        got = draw(pipe, callback_on_step_end=lambda *args: inside.append(draw(other)) or {})
    assert len(inside) == STEPS and all(torch.equal(latents, expected) for latents in inside)
    assert torch.equal(got, plain) and (sharing.stats["launches"], sharing.stats["denoiser_rows"]) == counted


def test_a_handle_can_be_entered_again(pipe):
    sharing = sage.enable(pipe, flat())
    for _ in range(2):
        with sharing:
            draw(pipe)
        assert sharing.stats["rows"] == [2] * 3 + [5] * 3
        draw(pipe)


def test_a_step_on_other_rows_than_the_plans_is_refused(pipe):
    def step_doubled(pipe, step, timestep, tensors):
        doubled = torch.cat([tensors["latents"]] * 2)
        pipe.scheduler.step(doubled, timestep, doubled)

    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="sample has 10 rows, but the plan has 5 pictures"):
            draw(pipe, callback_on_step_end=step_doubled)


# ---- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (dict(share=float("nan")), r"share must be in \[0, 1\], got nan"),
        (dict(similarity=-1), r"similarity must be in \(-1, 1\], got -1.0"),
        (dict(max_group_size=0), "max_group_size must be at least 1, got 0"),
        (dict(max_rows=0), "max_rows must be at least 1, got 0"),
        (dict(rules={"x": "sum"}), "rules\\['x'\\] must be one of 'mean'"),
    ],
)
def test_bad_arguments_are_refused_by_enable(pipe, change, message):
    cls = type(pipe)
    with pytest.raises(ValueError, match=message):
        sage.enable(pipe, **change)
    assert type(pipe) is cls


def test_enable_wants_a_pipeline(pipe):
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got UNet2DConditionModel"):
        sage.enable(pipe.unet)
    with pytest.raises(TypeError, match="plan must be a sage.SharingPlan or None, got dict"):
        sage.enable(pipe, {})


def test_a_plan_for_other_prompts_is_refused_before_the_denoiser_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: pytest.fail("the denoiser ran"))
    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="plan is for 5 pictures, but the call asks for 4"):
            draw(pipe, PROMPTS[:4], NEGATIVES[:4], SEEDS[:4])
        with pytest.raises(ValueError, match="picture 0 is planned as 'a red cat', but the call asks for 'a green cat'"):
            draw(pipe, PROMPTS[::-1])


def test_an_unknown_batched_argument_is_named(pipe, monkeypatch):
    from sage import families

    monkeypatch.delitem(families.RULES, "encoder_hidden_states")
    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="'encoder_hidden_states' has 10 rows, one per latent, and no rule"):
            draw(pipe)
    with sage.enable(pipe, flat(), rules={"encoder_hidden_states": "mean"}):
        draw(pipe)
