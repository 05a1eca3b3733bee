"""SageScheduler as a plain drop-in: the class it replaces, but for `step`."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
)
from spy import FullSizeOps

from sage import SageScheduler
from sage.solvers import SOLVERS

SHAPE = (3, 4, 8, 8)
CONFIG = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).config
DRAWS = {"euler-a", "ddpm", "lcm", "dpm++2m-sde", "tcd", "flow-lcm"}


def stock(solver, **kwargs):
    import diffusers

    name, overrides = SOLVERS[solver]
    config = {} if solver.startswith("flow-") else CONFIG
    return getattr(diffusers, name).from_config(config, **{**overrides, **kwargs})


def ours_like(base, **kwargs):
    """A SageScheduler of `base`'s class, from a config as a file would hold it (in memory it names no class)."""
    return SageScheduler.from_config({**base.config, "_class_name": type(base).__name__}, **kwargs)


def model(x, t):
    """A model output that depends on the sample."""
    return torch.tanh(x) * 0.7 + 0.1 * torch.sin(x * 3 + float(t) / 100)


def run(scheduler, steps=7, seed=0, dtype=torch.float32):
    """A whole trajectory; returns every step's fields."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    start = getattr(scheduler, "init_noise_sigma", 1.0)
    x = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * start).to(dtype)
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    trace = []
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = scheduler.step(model(x_in.float(), t).to(dtype), t, x, **kwargs)
        x = out.prev_sample
        trace.append(out)
    return trace


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_what_its_class_gives(solver):
    base = stock(solver)
    ours = SageScheduler.from_config(base.config, solver=solver)
    assert isinstance(ours, type(base)) and isinstance(ours, SageScheduler)
    for expected, got in zip(run(base), run(ours)):
        assert type(got) is type(expected)
        for name, value in expected.items():
            scale = max(1.0, value.abs().max().item())
            assert (got[name] - value).abs().max().item() <= 1e-5 * scale, name


@pytest.mark.parametrize("solver", ["euler", "dpm++2m", "unipc", "ddim"])
def test_low_precision_is_as_close_as_stock(solver):
    """bfloat16 in, bfloat16 out, and no further from float32 than twice diffusers' own bfloat16 run."""
    exact = run(stock(solver))[-1].prev_sample
    base = run(stock(solver), dtype=torch.bfloat16)[-1].prev_sample
    ours = run(SageScheduler.from_config(stock(solver).config, solver=solver), dtype=torch.bfloat16)[-1].prev_sample
    assert ours.dtype == base.dtype == torch.bfloat16
    theirs = (base.float() - exact).abs().max().item()
    assert (ours.float() - exact).abs().max().item() <= 2 * theirs + 2**-8


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_branch_step_and_no_other_full_size_op(solver, monkeypatch):
    monkeypatch.undo()  # the poison of conftest.py writes to every output
    scheduler = SageScheduler.from_config(stock(solver).config, solver=solver)
    scheduler.set_timesteps(7)
    x = torch.randn(3, 4, 32, 32)  # larger than a noise schedule, which is no state
    kwargs = {"generator": torch.Generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[:5]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        y = model(x, t)
        with FullSizeOps(x.numel()) as spy:
            x = scheduler.step(y, t, x, return_dict=False, **kwargs)[0]
        drawn = solver in DRAWS or (solver == "kdpm2-a" and scheduler.state_in_first_order)
        also = ["mul", "add"] if solver == "lms" else []  # x0, which its step returns and the table does not store
        assert spy.seen == ["randn"] * drawn + ["branch_step"] + also


def test_names_signatures_and_config_stay(tmp_path):
    ours = SageScheduler.from_config(CONFIG, solver="dpm++2m")
    assert type(ours).__name__ == "DPMSolverMultistepScheduler"
    assert inspect.signature(ours.step) == inspect.signature(DPMSolverMultistepScheduler().step)
    assert inspect.signature(ours.set_timesteps) == inspect.signature(DPMSolverMultistepScheduler().set_timesteps)
    ours.save_pretrained(tmp_path)
    plain = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert type(plain) is DPMSolverMultistepScheduler and plain.config.beta_schedule == "scaled_linear"
    again = SageScheduler.from_pretrained(tmp_path)
    assert isinstance(again, SageScheduler) and again.to_json_string() == ours.to_json_string()
    assert isinstance(type(ours).from_config(ours.config), type(ours))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_where_the_original_is(clone):
    scheduler = SageScheduler.from_config(CONFIG, solver="dpm++3m")
    scheduler.set_timesteps(7)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    other, t = clone(scheduler), scheduler.timesteps[3]
    assert isinstance(other, SageScheduler)
    expected = scheduler.step(model(x, t), t, x).prev_sample
    assert torch.equal(other.step(model(x, t), t, x).prev_sample, expected)
    fresh = SageScheduler.from_config(CONFIG, solver="dpm++3m")  # control: without the history it differs
    fresh.set_timesteps(7)
    fresh.set_begin_index(3)
    assert not torch.equal(fresh.step(model(x, t), t, x).prev_sample, expected)


def test_another_batch_in_the_middle_of_a_run_is_refused():
    scheduler = SageScheduler.from_config(CONFIG, solver="dpm++2m")
    scheduler.set_timesteps(7)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    with pytest.raises(ValueError, match="call set_timesteps before sampling another batch"):
        scheduler.step(model(x[1:], t), scheduler.timesteps[2], x[1:])


def test_a_second_run_starts_afresh():
    scheduler = SageScheduler.from_config(CONFIG, solver="unipc")
    first, second = run(scheduler), run(scheduler)
    assert all(torch.equal(a.prev_sample, b.prev_sample) for a, b in zip(first, second))


def test_begin_index_warms_up_from_there():
    base = stock("dpm++2m")
    ours = ours_like(base)
    outs = []
    for scheduler in (base, ours):
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(3)
        x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(model(x, t), t, x).prev_sample
        outs.append(x)
    assert (outs[0] - outs[1]).abs().max() <= 1e-5


def test_positional_options_reach_the_solver():
    base, ours = DDIMScheduler.from_config(CONFIG), SageScheduler.from_config(CONFIG, solver="ddim")
    x = torch.randn(SHAPE)
    got = []
    for scheduler in (base, ours):
        scheduler.set_timesteps(7)
        t = scheduler.timesteps[2]
        got.append(scheduler.step(model(x, t), t, x, 0.8, False, torch.Generator().manual_seed(3)).prev_sample)
    assert (got[0] - got[1]).abs().max() <= 1e-5


def test_variance_noise_can_be_brought():
    noise = torch.randn(SHAPE)
    got = []
    for scheduler in (stock("dpm++2m-sde"), ours_like(stock("dpm++2m-sde"))):
        scheduler.set_timesteps(7)
        t, x = scheduler.timesteps[0], torch.ones(SHAPE)
        got.append(scheduler.step(model(x, t), t, x, variance_noise=noise).prev_sample)
    assert (got[0] - got[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda: SASolverScheduler.from_config(CONFIG), {"generator": "seeded"}),
        (lambda: DDIMScheduler.from_config(CONFIG, thresholding=True), {}),
        (lambda: DDIMScheduler.from_config(CONFIG, clip_sample=True), {"use_clipped_model_output": True}),
        (lambda: EulerDiscreteScheduler.from_config(CONFIG), {"s_churn": 2.0, "generator": "seeded"}),
    ],
    ids=["class", "thresholding", "use_clipped_model_output", "s_churn"],
)
def test_what_the_table_cannot_express_runs_diffusers_own_step_bit_for_bit(make, options, caplog):
    base = make()
    ours = ours_like(base)
    assert not isinstance(base, SageScheduler)
    outs = []
    for scheduler in (base, ours):
        scheduler.set_timesteps(5)
        x = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8) * getattr(scheduler, "init_noise_sigma", 1.0)
        kwargs = {k: torch.Generator().manual_seed(0) if v == "seeded" else v for k, v in options.items()}
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
        outs.append(x)
    assert torch.equal(*outs)
    assert ours._sage_trajectory.reason


def test_float64_runs_diffusers_own_step():
    base, ours = stock("ddim"), SageScheduler.from_config(CONFIG, solver="ddim")
    x = torch.randn(SHAPE, dtype=torch.float64)
    got = []
    for scheduler in (base, ours):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[0]
        got.append(scheduler.step(model(x, t), t, x).prev_sample)
    assert got[1].dtype == torch.float64 and torch.equal(*got)


def test_gradients_flow_through_diffusers_own_step():
    ours = SageScheduler.from_config(CONFIG, solver="ddim")
    ours.set_timesteps(5)
    x = torch.randn(SHAPE, requires_grad=True)
    t = ours.timesteps[0]
    ours.step(model(x, t), t, x).prev_sample.sum().backward()
    assert x.grad.abs().sum() > 0


def test_errors_name_what_is_wrong():
    with pytest.raises(TypeError, match="SageScheduler is built from a config"):
        SageScheduler()
    with pytest.raises(ValueError, match="unknown solver 'nope'; known: ddim, ddpm, euler"):
        SageScheduler.from_config(CONFIG, solver="nope")
    with pytest.raises(ValueError, match="solver is required here"):
        SageScheduler.from_config({"num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="'NoScheduler', which is no scheduler of the installed diffusers"):
        SageScheduler.from_config({"_class_name": "NoScheduler"})
    with pytest.raises(ValueError, match="solver 'flow-euler' is for flow-matching models, but the config's model predicts 'eps"):
        SageScheduler.from_config(CONFIG, solver="flow-euler")
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    with pytest.raises(ValueError, match="the config is a flow-matching model's: use solver 'flow-euler'"):
        SageScheduler.from_config(flow, solver="dpm++2m")
    kwargs = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert SageScheduler.from_config(flow, solver="dpm++2m", **kwargs).config.use_flow_sigmas
    scheduler = SageScheduler.from_config(CONFIG, solver="ddim")
    with pytest.raises(ValueError, match="Number of inference steps is 'None', you need to run 'set_timesteps'"):
        scheduler.step(torch.zeros(SHAPE), 10, torch.zeros(SHAPE))
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 7"):
        scheduler.step(torch.zeros(SHAPE), 7, torch.zeros(SHAPE))


def test_lcm_returns_the_denoised_sample_that_pipelines_decode():
    base = LCMScheduler.from_config(CONFIG)
    ours = ours_like(base)
    outs = []
    for scheduler in (base, ours):
        scheduler.set_timesteps(4)
        t, x = scheduler.timesteps[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
        outs.append(scheduler.step(model(x, t), t, x, generator=torch.Generator().manual_seed(0)).denoised)
    assert (outs[0] - outs[1]).abs().max() <= 1e-5
