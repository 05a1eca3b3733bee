"""`step` of a SageScheduler: how arguments are bound, what own steps are given when rows are shared, and what is returned."""

import inspect
import logging

import pytest
import torch
from diffusers import schedulers
from diffusers.schedulers.deprecated import KarrasVeScheduler

from sage import SageScheduler, stepping
from sage.scheduler import sage_class
from sage.solvers import NotInTable, coverage

SHAPE = (3, 4, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def pair(name, **config):
    """diffusers' scheduler, and ours of the same class and config."""
    cls = getattr(schedulers, name, None) or KarrasVeScheduler
    return cls(**config), sage_class(cls)(**config)


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Shared:
    """Stands for a shared call in which row i goes on as row `rows[i]`."""

    call, plan, branch_noise = 0, None, None

    def __init__(self, rows):
        self.rows, self.steps = torch.tensor(rows), 0

    def before_step(self, model_output, sample):
        assert len(sample) == len(model_output) == len(self.rows)

    def representative_of(self, device):
        return self.rows.to(device)

    def advance(self, trajectory):
        self.steps += 1


def generator():
    return torch.Generator().manual_seed(7)


# (class, config, arguments of set_timesteps, step's further arguments in the order of the signature, as the class's pipeline does)
OWN_STEPS = [
    ("CogVideoXDPMScheduler", {}, {}, lambda s, t, x, old: (old, t, None if old is None else s.timesteps[0], x)),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}, lambda s, t, x, old: (t, x)),
    ("SASolverScheduler", {}, {}, lambda s, t, x, old: (t, x, generator())),
    ("IPNDMScheduler", {}, {}, lambda s, t, x, old: (t, x)),
    ("UnCLIPScheduler", {}, {}, lambda s, t, x, old: (t, x, None, generator())),
    ("CMStochasticIterativeScheduler", {}, {}, lambda s, t, x, old: (t, x, generator())),
    ("DDPMWuerstchenScheduler", {}, {}, lambda s, t, x, old: (t.expand(len(x)), x, generator())),
    ("RePaintScheduler", {}, {}, lambda s, t, x, old: (t, x, noise(5), (noise(6) > 0).float(), generator())),
    ("DDIMInverseScheduler", {}, {}, lambda s, t, x, old: (t, x)),
    ("KarrasVeScheduler", {}, {}, lambda s, t, x, old: (torch.tensor(3.0), torch.tensor(2.0), x)),
    ("FlowMapEulerDiscreteScheduler", {}, {}, lambda s, t, x, old: (t, x)),
    ("MiniMaxH3Scheduler", {}, {}, lambda s, t, x, old: (t, x)),
]


def walk(scheduler, given, run=None, steps=4):
    """Every tensor that `step` returns in a few steps, the arguments passed by position."""
    scheduler.set_timesteps(**{"num_inference_steps": 5})
    scheduler._sage_run = run
    x, old, seen = noise(1), None, []
    for t in list(scheduler.timesteps)[:steps]:
        if run is not None:
            x = x.index_select(0, run.rows)
        y = torch.tanh(x) + 0.1
        out = scheduler.step(y, *given(scheduler, t, x, old))
        tensors = [value for value in (out if isinstance(out, tuple) else out.values()) if torch.is_tensor(value)]
        x, old = tensors[0], tensors[1] if len(tensors) > 1 else None
        seen += tensors
    return seen


@pytest.mark.parametrize("name, config, options, given", OWN_STEPS, ids=[case[0] for case in OWN_STEPS])
def test_own_steps_get_their_arguments_whatever_their_signature(name, config, options, given, monkeypatch):
    stock, ours = pair(name, **config)
    torch.manual_seed(3)
    expected = walk(stock, given)
    torch.manual_seed(3)
    got = walk(ours, given)
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))
    assert ours._sage_trajectory.table is None and not coverage().get(name, coverage()["PNDMScheduler"]).table


@pytest.mark.parametrize("name, config, options, given", OWN_STEPS, ids=[case[0] for case in OWN_STEPS])
def test_rows_of_a_node_stay_equal_in_an_own_step(name, config, options, given):
    """Rows 0 and 1 are one node: both follow row 0, whose own run without sharing they repeat."""
    _, ours = pair(name, **config)
    run = Shared([0, 0, 2])
    torch.manual_seed(3)
    for tensor in walk(ours, given, run):
        assert torch.equal(tensor[0], tensor[1]) and not torch.equal(tensor[0], tensor[2])
    assert run.steps == 4
    for value in vars(ours).values():
        for kept in value if isinstance(value, list) else [value]:
            if torch.is_tensor(kept) and kept.shape == SHAPE:
                assert torch.equal(kept[0], kept[1])


def test_every_row_shaped_argument_of_an_own_step_is_gathered():
    """CogVideoX passes the prediction of the step before: under sharing, a row gets its representative's."""
    stock, ours = pair("CogVideoXDPMScheduler")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    rows, (x, y, old) = torch.tensor([0, 0, 2]), (noise(1), noise(2)[[0, 0, 2]], noise(3))
    t, back = stock.timesteps[2], stock.timesteps[1]
    ours._sage_run = Shared(rows.tolist())
    got = ours.step(y, old, t, back, x, 0.0, generator=generator(), return_dict=False)
    expected = stock.step(y, old[rows], t, back, x[rows], generator=generator())
    for a, b in zip(got, expected):
        assert torch.equal(a, b[rows])
    wrong = stock.step(y, old, t, back, x[rows], generator=generator())  # control: without the gather rows 0 and 1 differ
    assert not torch.equal(wrong[0][1], got[0][1])


def test_arguments_are_checked_as_the_class_does():
    _, ours = pair("DDIMScheduler")
    ours.set_timesteps(5)
    with pytest.raises(TypeError, match="missing a required argument: 'sample'"):
        ours.step(noise(0), ours.timesteps[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        ours.step(noise(0), ours.timesteps[0], noise(1), nonsense=1)
    by_name = ours.step(model_output=noise(0), timestep=ours.timesteps[0], sample=noise(1)).prev_sample
    assert torch.equal(by_name, ours.step(noise(0), ours.timesteps[0], noise(1)).prev_sample)


def test_a_scheduler_without_step_is_refused_by_name():
    with pytest.raises(TypeError, match="ScoreSdeVeScheduler has no `step`, which SageScheduler replaces"):
        sage_class(schedulers.ScoreSdeVeScheduler)


class PassesOn(schedulers.DDIMScheduler):
    def step(self, *args, **kwargs):
        out = super().step(*args, **kwargs)
        return type(out)(prev_sample=out.prev_sample * 0.5, pred_original_sample=out.pred_original_sample)


class OtherSchedule(schedulers.DDIMScheduler):
    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)


def test_subclasses_of_the_users():
    stock, ours = schedulers.DDIMScheduler(), sage_class(PassesOn)()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    t, x, y = stock.timesteps[1], noise(1), noise(2)
    expected = stock.step(y, t, x)
    assert torch.equal(ours.step(y, t, x).prev_sample, expected.prev_sample * 0.5)
    assert "overrides step" in ours._sage_trajectory.reason
    ours = sage_class(OtherSchedule)()
    ours.set_timesteps(5)
    got = ours.step(y, t, x)  # in the table, and with the fields of diffusers' own output
    assert ours._sage_trajectory.table is not None
    assert (got.pred_original_sample - expected.pred_original_sample).abs().max() <= 1e-5
    nothing = type("Nothing", (schedulers.DDIMScheduler,), {"step": lambda self, y, t, x: None})
    with_base = sage_class(nothing)()
    with_base.set_timesteps(5)
    assert with_base.step(y, t, x) is None  # the base class's signature binds it


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler"])
def test_the_row_is_known_without_reading_the_device(name, monkeypatch):
    """Only the first call searches `timesteps`; a value that is no element of it is still looked up."""
    stock, ours = pair(name)
    searches, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self, **kwargs: searches.append(1) or nonzero(self, **kwargs))
    ours.set_timesteps(5)
    x = noise(1)
    for t in ours.timesteps:
        x = ours.step(torch.tanh(x), t, x).prev_sample
    assert len(searches) == 1
    ours.set_timesteps(5)
    for t in ours.timesteps.tolist():
        ours.step(torch.tanh(x), t, x)
    assert len(searches) == 1 + 5
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 7"):
        ours.step(x, 7, x)
    ours.step(torch.tanh(x), ours.timesteps[3].clone(), x)
    assert ours._sage_trajectory.index == 4


@pytest.mark.parametrize(
    "name, config",
    [("LCMScheduler", {"clip_sample": True, "clip_sample_range": 0.6}), ("LMSDiscreteScheduler", {}), ("TCDScheduler", {}),
     ("CogVideoXDDIMScheduler", {}), ("EDMEulerScheduler", {}), ("KDPM2DiscreteScheduler", {}), ("SCMScheduler", {})],
)  # fmt: skip
@pytest.mark.parametrize("shared", [False, True])
def test_the_second_result_is_the_classs_own(name, config, shared):
    stock, ours = pair(name, **config)
    rows = torch.tensor([0, 0, 2] if shared else [0, 1, 2])
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(2 if name == "SCMScheduler" else 5)
        if shared and scheduler is ours:
            scheduler._sage_run = Shared(rows.tolist())
        t, x, y = scheduler.timesteps[0], noise(1), noise(2)[rows]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        extra = {"generator": generator()} if name in ("LCMScheduler", "TCDScheduler", "SCMScheduler") else {}
        results.append(scheduler.step(y, t, x if scheduler is ours else x[rows], return_dict=False, **extra))
    for a, b in zip(*results):
        assert len(results[1]) == len(results[0]) == 2 and a.dtype == b.dtype
        assert (a[rows] - b).abs().max() <= 1e-5 * max(1, a.abs().max())


@pytest.mark.parametrize("name", [n for n, how in coverage().items() if how.table])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes_are_the_classs_own(name, dtypes):
    schedulers_of_both = pair(name)
    kinds = ["trigflow"] if name == "SCMScheduler" else ["epsilon", "v_prediction", "sample"]
    for kind in kinds if "prediction_type" in schedulers_of_both[0].config else [None]:
        got = []
        for scheduler in schedulers_of_both:
            scheduler.register_to_config(prediction_type=kind)
            scheduler.set_timesteps(2 if name == "SCMScheduler" else 5)
            x, y = noise(1).to(dtypes[0]), noise(2).to(dtypes[1])
            scheduler.is_scale_input_called = True
            try:
                for t in scheduler.timesteps[:2]:
                    got.append(scheduler.step(y, t, x).prev_sample.dtype)
            except (NotImplementedError, ValueError):
                assert kind == "sample" and name.startswith(("EDM", "Euler", "KDPM2"))  # these know no such prediction
        assert got[: len(got) // 2] == got[len(got) // 2 :]


@pytest.mark.parametrize("name", [n for n, how in coverage().items() if how.table])
def test_what_the_solver_remembers_is_copied_at_a_branch(name, monkeypatch):
    """A trunk of three rows, then two nodes, then every row alone: as diffusers' own step between gathers of all its state."""
    config = {"lower_order_final": True} if "Singlestep" in name else {}
    config = config | ({"solver_order": 3} if name.startswith(("DPM", "UniPC", "DEIS")) else {})
    trunks = [[0, 0, 0, 3], [0, 0, 2, 3], [0, 1, 2, 3]]
    forced, results = [False, True], []
    for own in forced:
        scheduler = pair(name, **config)[1]
        scheduler.set_timesteps(2 if name == "SCMScheduler" else 9)
        run = scheduler._sage_run = Shared(trunks[0])
        if own:
            monkeypatch.setattr(stepping, "table_for", lambda *args, **kwargs: refuse())
        x, draws, seen = noise(1, (4, *SHAPE[1:])), generator(), []
        extra = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for i, t in enumerate(scheduler.timesteps[: 1 if name == "SCMScheduler" else None]):
            run.rows = torch.tensor(trunks[min(i // 4, 2)])  # after a whole step of two calls
            y = torch.tanh(x[run.rows]) + 0.1 * torch.arange(4.0)[run.rows].view(-1, 1, 1, 1)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(y, t, x, **extra).prev_sample
            assert torch.equal(x, x[run.rows])
            seen.append(x)
        assert (scheduler._sage_trajectory.table is None) == own
        results.append(torch.stack(seen))
    assert (results[0] - results[1]).abs().max() <= 3e-5 * results[1].abs().max()
    assert name == "SCMScheduler" or not torch.equal(results[0][-1][0], results[0][-1][1])


def refuse():
    raise NotInTable("for the comparison")


def test_a_warning_says_why_the_own_step_runs(caplog):
    _, ours = pair("PNDMScheduler", skip_prk_steps=True)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        walk(ours, lambda s, t, x, old: (t, x))
    finally:
        logger.removeHandler(caplog.handler)
    assert [r.message for r in caplog.records if "runs its own step" in r.message] == [
        "PNDMScheduler runs its own step, not the fused one: PNDMScheduler: it drops one of its first two outputs, so the fifth "
        "call reads that of four calls ago; a row reads three"
    ]
    assert isinstance(ours, SageScheduler)
