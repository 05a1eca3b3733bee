"""Every table row against diffusers' own `step`, over whole trajectories.

Four trajectories per case, all from the same draws: diffusers' class and the table's rows, in float64 and in float32. In
float64, diffusers' own code runs with its `torch.float32` bound to float64 and its schedule cast to float64, so that only
rounding is left between the two: 2e-13 at worst where this was written. In float32, both run as users run them, and each is
compared with the float64 trajectory: the table is 6e-6 away at worst, diffusers 7e-5 (DEIS), and the table's error is 0.9
times diffusers' at the median, 2.5 times at worst. The test allows 1e-5, and 3 times diffusers' error plus 1e-6.
An error is max|difference| / max|sample| at its worst step. The model depends on its input and on the timestep, so an
error in one step reaches the later ones.
"""

import dataclasses
import importlib
import inspect

import numpy as np
import pytest
import torch
from diffusers import schedulers
from scheduler_cases import cases

from sage.solvers import SOLVERS, coverage, noise_draws, table_for
from sage_kernels.coefficients import COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
SHAPE = (2, 3, 4, 5)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model(x, t):
    """Stands for the denoiser: bounded, and different for every input and timestep."""
    return torch.tanh(x + 0.003 * float(t)) + 0.2 * torch.cos(2 * x)


def draw(shape, generator=None, device=None, dtype=None):
    """`randn_tensor` drawn in float32 whatever the dtype, so that both precisions see the same noise."""
    return torch.randn(shape, generator=generator).to(dtype or torch.float64)


class _Double:
    """`torch` for a scheduler module, with float64 in the place of float32."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def run_in_double(patch, scheduler):
    """Make `scheduler` compute its steps in float64, from the schedule it has."""
    module = importlib.import_module(type(scheduler).__module__)
    patch.setattr(module, "torch", _Double())
    patch.setattr(module, "randn_tensor", draw, raising=False)
    names = ["alphas_cumprod", "final_alpha_cumprod", "one", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"]
    for name in names + ["timesteps"] * isinstance(scheduler, schedulers.SCMScheduler):  # angles: part of the formula
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def make(cls, config, steps=9):
    """The scheduler after set_timesteps; `steps` is their number or a dict of set_timesteps' arguments."""
    noise_schedule = "beta_start" in inspect.signature(getattr(schedulers, cls)).parameters
    scheduler = getattr(schedulers, cls)(**((STABLE_DIFFUSION if noise_schedule else {}) | config))
    scheduler.set_timesteps(**(steps if isinstance(steps, dict) else {"num_inference_steps": steps}))
    return scheduler


def diffusers_trajectory(scheduler, dtype, seed, begin=0, **step_arguments):
    """Samples after every step, and what `step` returns as the denoised sample (None if nothing): [steps, *SHAPE]."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(SHAPE, generator, dtype=dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    draws = noise_draws(scheduler, eta=step_arguments.get("eta"))
    if draws.any():
        step_arguments["generator"] = generator
    samples, denoised = [], []
    for t in scheduler.timesteps[begin : len(draws)]:
        t = t.item()  # diffusers multiplies tensor timesteps in float32 (LCM)
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = scheduler.step(model(model_input, t), t, x, return_dict=False, **step_arguments)
        x = out[0]
        samples.append(x)
        denoised.extend(out[1:])
    return torch.stack(samples), torch.stack(denoised) if denoised else None


def table_trajectory(table, dtype, seed, begin, draws):
    """The same by the table's rows, the formula written out: float64 coefficients, or the float32 tensor."""
    rows = table.rows if dtype == torch.float64 else table.tensor("cpu").numpy()
    generator = torch.Generator().manual_seed(seed)
    x = draw(SHAPE, generator, dtype=dtype)
    missing = torch.full(SHAPE, float("nan"), dtype=dtype)  # reading what is not there yet must show
    last, history, model_input = missing, [missing] * 3, x * table.input_scale
    samples, denoised = [], []

    def total(*terms):  # a coefficient of 0 never reads its input
        return sum((float(k) * v for k, v in terms if k != 0), torch.zeros(SHAPE, dtype=dtype))

    for i in range(begin, len(table)):
        k = dict(zip(COLUMNS, rows[i]))
        y = model(model_input, table.timesteps[i])
        noise = draw(SHAPE, generator, dtype=dtype) if draws[i] else missing
        m0 = total((k["p"], x), (k["q"], y)).clamp(-float(k["clip"]), float(k["clip"]))
        (m1, m2, m3), before = history, x
        xc = total((k["u0"], x), (k["u1"], last), (k["u2"], m0), (k["u3"], m1), (k["u4"], m2), (k["u5"], m3))
        x = total((k["a"], xc), (k["b0"], m0), (k["b1"], m1), (k["b2"], m2), (k["e"], y), (k["c"], noise))
        model_input, last, history = float(k["s"]) * x, xc, [m0, m1, m2]
        samples.append(x)
        weights = (0.0, 1.0) if table.returned is None else table.returned[i]
        denoised.append(total((weights[0], before), (weights[1], m0)))
    return torch.stack(samples), torch.stack(denoised)


def error(ours, theirs):
    """Worst over the steps of max|difference| / max|theirs|; inf where something is not finite."""
    ours, theirs = ours.double().flatten(1), theirs.double().flatten(1)
    value = ((ours - theirs).abs().amax(1) / theirs.abs().amax(1)).max().item()
    return value if np.isfinite(value) else float("inf")


def trajectories(cls, config, steps=9, begin=0, dtype=torch.float64, change=None, seed=5, **step_arguments):
    """((samples, denoised) of diffusers, the same of the table), with `change` applied to the table's rows."""
    scheduler = make(cls, config, steps)
    eta = step_arguments.get("eta")
    table = table_for(scheduler, begin=begin, eta=eta)
    if change is not None:
        table = dataclasses.replace(table, rows=change(table.rows.copy()))
    ours = table_trajectory(table, dtype, seed, begin, noise_draws(scheduler, begin=begin, eta=eta))
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            run_in_double(patch, scheduler)
        theirs = diffusers_trajectory(scheduler, dtype, seed, begin, **step_arguments)
    return theirs, ours


CASES = cases()


def describe(case):
    cls, config, others = case
    short = cls.replace("Scheduler", "").replace("Discrete", "").replace("Multistep", "")
    words = [f"{k}={v}" if not isinstance(v, str) else v for k, v in {**config, **others}.items()]
    return "-".join([short, *words]).replace(" ", "").replace("use_", "").replace("=True", "")


def test_there_are_enough_cases_and_all_differ():
    assert len(CASES) >= 150
    assert len({repr(case) for case in CASES}) == len(CASES)
    assert {cls for cls, _, _ in CASES} == {name for name, how in coverage().items() if how.table}


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_parity(case):
    cls, config, others = case
    (theirs, returned), (ours, stored) = trajectories(cls, config, **others)
    assert error(ours, theirs) < 1e-11
    if returned is not None:
        assert error(stored, returned) < 1e-11

    (theirs32, _), (ours32, _) = trajectories(cls, config, dtype=torch.float32, **others)
    assert error(ours32, theirs) < min(1e-5, 3 * error(theirs32, theirs) + 1e-6)


# Changes that a table must not survive: each is one plausible mistake.
def swap(first, second):
    def change(rows):
        i, j = COLUMNS.index(first), COLUMNS.index(second)
        rows[:, [i, j]] = rows[:, [j, i]]
        return rows

    return change


def zero(name, value=0.0):
    def change(rows):
        rows[:, COLUMNS.index(name)] = value
        return rows

    return change


def later_row(rows):
    return np.concatenate([rows[1:], rows[-1:]])


def first_row_again(rows):
    rows[3] = rows[1]
    return rows


THIRD = {"solver_order": 3}
MISTAKES = [
    ("DPMSolverMultistepScheduler", THIRD, swap("b1", "b2")),
    ("DPMSolverMultistepScheduler", {}, swap("b0", "b1")),
    ("DPMSolverMultistepScheduler", {}, zero("b1")),
    ("DPMSolverMultistepScheduler", {}, first_row_again),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, zero("c")),
    ("UniPCMultistepScheduler", THIRD, swap("u3", "u4")),
    ("UniPCMultistepScheduler", THIRD, swap("u4", "u5")),
    ("UniPCMultistepScheduler", THIRD, swap("u1", "u0")),
    ("UniPCMultistepScheduler", {}, zero("u0", 1.0)),
    ("HeunDiscreteScheduler", {}, swap("u0", "u1")),
    ("DDIMScheduler", {"clip_sample_range": 0.8}, zero("e")),
    ("DDIMScheduler", {"clip_sample_range": 0.8}, zero("clip", np.inf)),
    ("EulerDiscreteScheduler", {}, zero("s", 1.0)),
    ("LCMScheduler", {}, zero("c")),
    ("LMSDiscreteScheduler", {}, swap("u4", "u5")),
    ("LMSDiscreteScheduler", {}, swap("b1", "b2")),
    ("LMSDiscreteScheduler", {}, zero("u5")),
    ("DEISMultistepScheduler", THIRD, swap("b1", "b2")),
    ("DEISMultistepScheduler", {}, swap("b1", "e")),
    ("KDPM2DiscreteScheduler", {}, swap("u0", "u1")),
    ("KDPM2DiscreteScheduler", {}, zero("e")),
    ("KDPM2AncestralDiscreteScheduler", {}, zero("c")),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, swap("b0", "b2")),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, swap("u0", "u1")),
    ("EDMDPMSolverMultistepScheduler", {}, swap("b0", "b1")),
    ("EDMEulerScheduler", {}, zero("s", 1.0)),
    ("TCDScheduler", {}, zero("c")),
    ("SCMScheduler", {}, zero("c")),
    ("FlowMatchHeunDiscreteScheduler", {}, swap("b0", "b1")),
    ("FlowMatchHeunDiscreteScheduler", {}, swap("u0", "u1")),
    ("FlowMatchLCMScheduler", {}, zero("c")),
    ("LTXEulerAncestralRFScheduler", {}, zero("c")),
    ("CogVideoXDDIMScheduler", {}, later_row),
] + [(cls, {}, later_row) for _, (cls, _) in SOLVERS.items() if cls not in ("DPMSolverMultistepScheduler",)]


@pytest.mark.parametrize("cls, config, change", MISTAKES)
def test_a_wrong_table_is_caught(cls, config, change):
    steps = 2 if cls == "SCMScheduler" else 9
    (theirs, _), (ours, _) = trajectories(cls, config, steps, change=change, seed=11)
    assert error(ours, theirs) > 1e-3


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_warm_up_counts_from_begin(cls):
    whole, tail = table_for(make(cls, THIRD)), table_for(make(cls, THIRD), begin=3)
    assert not tail.rows[:3].any()
    assert not np.array_equal(whole.rows[3], tail.rows[3]) and not np.array_equal(whole.rows[4], tail.rows[4])
    np.testing.assert_array_equal(whole.rows[6:], tail.rows[6:])


def test_equal_last_sigmas_make_an_identity_where_diffusers_divides_by_zero():
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "heun"}
    (theirs, _), (ours, _) = trajectories("DPMSolverMultistepScheduler", config)
    assert error(ours[:-1], theirs[:-1]) < 1e-11 and not theirs[-1].isfinite().any()
    assert torch.equal(ours[-1], ours[-2])


def test_unipc_bh1_ends_at_x0_where_diffusers_multiplies_infinity_by_zero():
    (theirs, _), (ours, stored) = trajectories("UniPCMultistepScheduler", {"solver_type": "bh1"})
    assert error(ours[:-1], theirs[:-1]) < 1e-11 and not theirs[-1].isfinite().any()
    assert torch.equal(ours[-1], stored[-1])
