"""sage.sample, the native loop: against the hand-written loop, against the hook, and on its own terms."""

import pytest
import torch
from hand_branch import Row, Setting
from hand_loop import shared_latents
from measures import worst
from spy import FullSizeOps
from tiny import NEGATIVES, PROMPTS, stable_diffusion

import sage
from sage import Leaf, SageScheduler, SharingPlan
from sage.solvers import SOLVERS, table_for

STEPS, GUIDANCE, SHAPE = 6, 3.0, (4, 8, 8)
SEEDS = [100 + number for number in range(len(PROMPTS))]
LEAVES = [Leaf(prompt) for prompt in PROMPTS]
GROUPS = [[0, 2, 4], [1, 3]]
DRAWING = {"euler-a", "dpm++2m-sde", "lcm", "ddpm"}  # ddim draws with eta only
SHARED_SOLVERS = ("ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-sde", "dpm++3m", "unipc", "heun", "lcm")


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def scheduler_of(pipe, solver):
    import diffusers

    name, overrides = SOLVERS[solver]
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)


def flat(share=0.5, groups=GROUPS):
    return SharingPlan.flat(LEAVES, groups, share, representatives=[group[0] for group in groups])


class Native:
    """A native run of the tiny pipeline's U-Net: counts the rows that it is asked for."""

    def __init__(self, pipe, solver):
        self.pipe, self.rows = pipe, []
        self.scheduler = scheduler_of(pipe, solver)
        self.scheduler.set_timesteps(STEPS)
        self.table = table_for(self.scheduler)
        self.embeds, self.negatives = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
        self.generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        self.x_init = self.noise(-1) * self.scheduler.init_noise_sigma

    def noise(self, call):
        """The draws of every picture's own generator, as the pipeline makes them."""
        return torch.cat([torch.randn(1, *SHAPE, generator=g) for g in self.generators])

    def denoise(self, model_input, timestep, conditions):
        self.rows.append(len(model_input))
        return self.pipe.unet(model_input, timestep, encoder_hidden_states=conditions).sample

    @torch.no_grad()
    def run(self, plan, **kwargs):
        options = dict(negative_conditions=self.negatives, guidance_scale=GUIDANCE) | kwargs
        if self.table.stochastic and "seeds" not in options:
            options["noise"] = self.noise
        return sage.sample(self.denoise, plan, self.table, self.x_init, self.embeds, **options)


@pytest.mark.parametrize("solver", SHARED_SOLVERS)
def test_native_loop_equals_the_hand_written_loop(pipe, solver):
    native = Native(pipe, solver)
    calls = len(native.table)
    branch = 4 if solver == "heun" else 3
    expected = shared_latents(pipe, scheduler_of(pipe, solver), PROMPTS, NEGATIVES, SEEDS, GROUPS, branch, STEPS, GUIDANCE)
    plan = flat(branch / calls)
    got = native.run(plan)
    assert worst(got, expected) <= 1e-5
    assert native.rows == [2 * rows for rows in plan.resolve(calls).rows]
    assert sum(native.rows) == 2 * plan.cost(calls).nfe
    assert worst(Native(pipe, solver).run(SharingPlan.independent(LEAVES)), expected) > 1e-2


@pytest.mark.parametrize("solver", ["ddim", "euler-a", "dpm++2m", "unipc"])
def test_native_loop_equals_the_hook(pipe, solver):
    plan = flat(0.5)
    native = Native(pipe, solver).run(plan)
    scheduler, pipe.scheduler = pipe.scheduler, scheduler_of(pipe, solver)
    try:
        with sage.enable(pipe, plan):
            gens = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
            hooked = pipe(PROMPTS, negative_prompt=NEGATIVES, generator=gens, **options).images
    finally:
        pipe.scheduler = scheduler
    assert worst(native, hooked) <= 1e-5


def test_histories_follow_a_tree(pipe):
    """A third-order solver over two branches: leaves equal those of a plan in which nobody else takes part."""
    pair = sage.Node((0, 2), 0, 0.67, (sage.Node.single(0), sage.Node.single(2)))
    root = sage.Node((0, 2, 4), 0, 0.5, (pair, sage.Node.single(4)))
    together = Native(pipe, "dpm++3m").run(SharingPlan.tree(LEAVES, [root]))
    expected = Native(pipe, "dpm++3m").run(SharingPlan.flat(LEAVES, [[0, 2, 4]], 0.5, representatives=[0]))
    assert worst(together[4], expected[4]) <= 1e-5
    assert worst(together[0], expected[0]) > 1e-3


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m", "dpm++2m-sde", "unipc", "heun"])
@pytest.mark.parametrize("guided", [True, False])
def test_one_branch_step_between_two_denoiser_calls(solver, guided, monkeypatch):
    """And nothing else that reads or writes a tensor of the latents' size."""
    monkeypatch.undo()  # the poison of conftest.py writes to every output
    rows, shape = 5, (4, 32, 32)
    table = table_for(_set(SageScheduler.from_config({}, solver=solver)))
    spy, between = FullSizeOps(4 * 32 * 32 * 2), []  # two rows are the smallest state here

    def denoise(model_input, timestep, conditions):
        between.append(list(spy.seen))
        out = torch.tanh(model_input) + conditions.mean()
        spy.seen.clear()
        return out

    options = dict(negative_conditions=torch.zeros(rows, 3), guidance_scale=2.0) if guided else {}
    options |= dict(seeds=torch.arange(rows)) if table.stochastic else {}
    plan = SharingPlan.flat([Leaf(str(i)) for i in range(rows)], [[0, 1, 2], [3, 4]], 0.4)
    with spy:
        sage.sample(denoise, plan, table, torch.randn(rows, *shape), torch.randn(rows, 3), **options)
    assert all(ops == ["branch_step"] for ops in between[1:])
    assert len(between) == len(table) and spy.seen == ["branch_step"]


def _set(scheduler, steps=8):
    scheduler.set_timesteps(steps)
    return scheduler


def test_a_table_that_begins_later_starts_there(pipe):
    """As img2img does: the loop runs the calls that remain, and equals a stock scheduler begun at the same step."""
    native, begin = Native(pipe, "dpm++2m"), 2
    native.table = table_for(native.scheduler, begin=begin)
    got = native.run(SharingPlan.independent(LEAVES), guidance_scale=1.0, negative_conditions=None)
    assert native.rows == [len(PROMPTS)] * (STEPS - begin)
    scheduler, x = scheduler_of(pipe, "dpm++2m"), native.x_init
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(begin)
    with torch.no_grad():
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(pipe.unet(x, t, encoder_hidden_states=native.embeds).sample, t, x).prev_sample
    assert worst(got, x) <= 1e-5


def test_philox_noise_belongs_to_the_representative(pipe):
    """With seeds, a picture depends on its own seed and its group, not on its place or on the others."""
    native = Native(pipe, "euler-a")
    seeds = torch.tensor(SEEDS)
    expected = native.run(flat(), seeds=seeds)
    order = [4, 1, 0, 2]
    leaves = [LEAVES[i] for i in order]
    plan = SharingPlan.flat(leaves, [[0, 2, 3]], 0.5, representatives=[2])
    with torch.no_grad():
        got = sage.sample(
            native.denoise,
            plan,
            native.table,
            native.x_init[order],
            native.embeds[order],
            negative_conditions=native.negatives[order],
            guidance_scale=GUIDANCE,
            seeds=seeds[order],
        )
    for row, i in ((0, 4), (2, 0), (3, 2)):
        assert worst(got[row], expected[i]) <= 1e-5
    assert worst(native.run(flat(), seeds=seeds + 1), expected) > 1e-2


def test_members_that_never_part_come_out_equal(pipe):
    got = Native(pipe, "dpm++2m").run(flat(1.0))
    assert torch.equal(got[0], got[2]) and torch.equal(got[1], got[3]) and not torch.equal(got[0], got[1])


def test_conditions_may_be_a_mapping(pipe):
    native = Native(pipe, "ddim")
    expected = native.run(flat())

    def denoise(model_input, timestep, conditions):
        assert conditions["encoder_attention_mask"].shape == (len(model_input), 7)
        return native.denoise(model_input, timestep, conditions["encoder_hidden_states"])

    mask = torch.eye(len(PROMPTS), 7)
    with torch.no_grad():
        got = sage.sample(
            denoise,
            flat(),
            native.table,
            native.x_init,
            {"encoder_hidden_states": native.embeds, "encoder_attention_mask": mask},
            negative_conditions={"encoder_hidden_states": native.negatives, "encoder_attention_mask": mask},
            guidance_scale=GUIDANCE,
        )
    assert torch.equal(got, expected)


def test_low_precision_state_stays_low(pipe):
    native = Native(pipe, "ddim")
    x = native.x_init.bfloat16()

    def denoise(model_input, timestep, conditions):
        assert model_input.dtype == torch.bfloat16
        return native.denoise(model_input.float(), timestep, conditions).bfloat16()

    with torch.no_grad():
        got = sage.sample(denoise, flat(), native.table, x, native.embeds)
    assert got.dtype == torch.bfloat16
    assert worst(got.float(), Native(pipe, "ddim").run(flat(), guidance_scale=1.0, negative_conditions=None)) < 0.1


SCALES = [1.5, 4.0, 5.0, 2.0, 2.5]  # of every leaf


@pytest.mark.parametrize("how", ["mean", "representative"])
@pytest.mark.parametrize("solver", ["dpm++2m", "unipc"])
def test_every_leaf_has_its_guidance_and_a_trunk_its_members_mean_or_its_representatives(pipe, solver, how):
    """By hand: the trunk of a group under one scale and one negative condition, every member under its own."""
    setting, expected = Setting(pipe, solver), [None] * len(PROMPTS)
    groups, leaders = [[0, 2, 4], [1, 3]], [2, 1]
    for group, leader in zip(groups, leaders):
        scale = sum(SCALES[i] for i in group) / len(group) if how == "mean" else SCALES[leader]
        negative = None if how == "mean" else setting.negatives[leader : leader + 1]
        trunk = Row(setting, setting.x_init[leader : leader + 1]).run(3, group, guidance=scale, negative=negative)
        for leaf in group:
            expected[leaf] = trunk.copy().finish(leaf, guidance=SCALES[leaf])
    plan = SharingPlan.flat(LEAVES, groups, 0.5, representatives=leaders)
    results = {way: setting.sample(plan, guidance_scale=torch.tensor(SCALES), trunk_guidance=way) for way in ("mean", "representative")}
    assert worst(results[how], torch.stack(expected)) <= 2e-6
    assert worst(*results.values()) > 1e-2
    assert worst(results[how], setting.sample(plan, trunk_guidance=how)) > 1e-2  # GUIDANCE for everybody


def test_one_guidance_for_all_is_the_same_as_a_tensor_of_it(pipe):
    setting = Setting(pipe, "ddim")
    assert torch.equal(setting.sample(flat(), guidance_scale=torch.full([5], GUIDANCE)), setting.sample(flat()))
    unguided = setting.sample(flat(), guidance_scale=torch.ones(5), negative_conditions=None)
    assert setting.rows[-1] == 5 and worst(unguided, setting.sample(flat())) > 1e-2


def test_negative_conditions_of_the_representative_bring_its_mask(pipe):
    """Masks go with their embeddings: the positive ones united, the negative ones the representative's."""
    setting, masks = Setting(pipe, "ddim"), torch.eye(5, 7)
    seen = []

    def denoise(model_input, timestep, conditions):
        seen.append(conditions["encoder_attention_mask"])
        return setting.denoise(model_input, timestep, conditions["encoder_hidden_states"])

    def named(tokens):
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": masks}

    given = dict(negative_conditions=named(setting.negatives), guidance_scale=2.0, trunk_guidance="representative")
    plan = SharingPlan.flat(LEAVES, [[0, 2, 4]], 0.5, representatives=[2])
    with torch.no_grad():
        sage.sample(denoise, plan, setting.table, setting.x_init, named(setting.embeds), **given)
    positive = torch.stack([masks[[0, 2, 4]].amax(0), masks[1], masks[3]])
    assert torch.equal(seen[0], torch.cat([masks[[2, 1, 3]], positive]))


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "unipc"])
def test_groups_of_different_shares_part_each_at_its_own_call(pipe, solver):
    """In the native loop and in the hook, against the loop by hand."""
    setting, expected = Setting(pipe, solver), [None] * len(PROMPTS)
    for group, calls in (([0, 2, 4], 4), ([1, 3], 2)):
        trunk = Row(setting, setting.x_init[group[0] : group[0] + 1]).run(calls, group)
        for leaf in group:
            expected[leaf] = trunk.copy().finish(leaf)
    plan = flat([4 / STEPS, 2 / STEPS])
    assert worst(setting.sample(plan), torch.stack(expected)) <= 2e-6
    assert setting.rows == [2 * rows for rows in (2, 2, 3, 3, 5, 5)]
    scheduler, pipe.scheduler = pipe.scheduler, scheduler_of(pipe, solver)
    try:
        with sage.enable(pipe, plan) as sharing:
            gens = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
            hooked = pipe(PROMPTS, negative_prompt=NEGATIVES, generator=gens, **options).images
    finally:
        pipe.scheduler = scheduler
    assert worst(hooked, torch.stack(expected)) <= 1e-5
    assert sharing.stats["rows"] == [2, 2, 3, 3, 5, 5]
    assert worst(setting.sample(flat(3 / STEPS)), torch.stack(expected)) > 1e-2


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x_init=torch.zeros(4, *SHAPE)), ValueError, r"x_init must be \[5, ...\], a row per leaf of the plan, got \(4, 4, 8"),
        (dict(x_init=torch.zeros(5, *SHAPE).double()), TypeError, "x_init must be float32, bfloat16 or float16, got torch.float64"),
        (dict(conditions=torch.zeros(3, 2)), ValueError, r"conditions must have 5 rows, one per leaf of the plan, got \(3, 2\)"),
        (dict(conditions={"text_embeds": torch.zeros(3, 2)}), ValueError, r"conditions\['text_embeds'\] must have 5 rows"),
        (dict(conditions={"mood": torch.zeros(5, 2)}), ValueError, r"conditions\['mood'\] has no rule"),
        (dict(conditions={"time_ids": torch.arange(5.0)[:, None]}), ValueError, r"\['time_ids'\] differs between leaves 2 and 0"),
        (dict(conditions=None), TypeError, "conditions must be a tensor or a mapping of tensors, got NoneType"),
        (dict(conditions=torch.zeros(5, 2).long()), TypeError, "conditions is averaged over a group and must have a floating dtype"),
        (dict(guidance_scale=2.0), ValueError, "negative_conditions are required for guidance_scale 2.0"),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale must be finite, got nan"),
        (dict(guidance_scale=torch.ones(4)), ValueError, r"guidance_scale must be a tensor \[5\], one per leaf of the plan, got \(4,\)"),
        (dict(guidance_scale=torch.full([5], torch.nan)), ValueError, "guidance_scale must be finite, got tensor"),
        (dict(guidance_scale=[1.0, 2.0]), ValueError, "one for each of the 8 calls, got 2; for one per leaf pass a tensor"),
        (dict(trunk_guidance="median"), ValueError, "trunk_guidance must be one of 'mean', 'representative', got 'median'"),
        (dict(guidance_scale=2.0, negative_conditions={"text_embeds": torch.zeros(5, 2)}), ValueError, "must have the structure"),
        (dict(seeds=torch.arange(4)), ValueError, r"seeds must be int64 \[5\], got torch.int64 \(4,\)"),
        (dict(seeds=torch.zeros(5)), ValueError, r"seeds must be int64 \[5\], got torch.float32"),
        (dict(seeds=[1, 2, 3, 4, 5]), TypeError, r"seeds must be an int64 tensor \[5\], got list"),
        (dict(seeds=torch.arange(5), noise=lambda call: None), ValueError, "seeds and noise exclude each other"),
        (dict(solver="euler-a"), ValueError, "euler-a draws noise at every step: pass seeds"),
    ],
)
def test_bad_input_is_refused_before_the_denoiser_runs(change, error, message):
    table = table_for(_set(SageScheduler.from_config({}, solver=change.get("solver", "ddim"))))
    arguments = dict(x_init=torch.zeros(5, *SHAPE), conditions=torch.zeros(5, 2)) | change
    arguments.pop("solver", None)
    with pytest.raises(error, match=message):
        sage.sample(lambda *args: pytest.fail("the denoiser ran"), flat(), table, **arguments)


@pytest.mark.parametrize("drawn", [None, torch.zeros(4, *SHAPE), torch.zeros(6, *SHAPE), torch.zeros(5, 3)])
def test_noise_of_another_shape_is_refused(pipe, drawn):
    native = Native(pipe, "euler-a")
    with pytest.raises(ValueError, match=r"noise\(0\) must be a tensor \(5, 4, 8, 8\), a row per leaf of the plan, got"):
        native.run(flat(), seeds=None, noise=lambda call: drawn)
