"""The native loop inside pipelines: against the hook and against the pipelines' own calls, family by family."""

import pytest
import torch
from measures import far, worst
from native_cases import (
    CASES,
    FLOW,
    GUIDANCE,
    LEAVES,
    NEGATIVES,
    PROMPTS,
    Rows,
    apart,
    flat,
    generators,
    hooked,
    native,
    stock,
    tree,
    with_solver,
)

import sage
from sage import Leaf, SharingPlan
from sage.denoiser import bucket
from sage.native import adapter_for, draw

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = 1e-4  # pixels in [0, 1]: a decoder of random weights amplifies rounding


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def stock_pipe(case):
    torch.set_num_threads(1)
    return case.build()


@pytest.fixture
def pipe(stock_pipe):
    """With its scheduler put back afterwards."""
    scheduler = stock_pipe.scheduler
    yield stock_pipe
    stock_pipe.scheduler = scheduler


def states(gens) -> list[torch.Tensor]:
    return [generator.get_state() for generator in gens]


def same_states(a, b) -> bool:
    return all(map(torch.equal, states(a), states(b)))


def test_native_equals_the_hook(case, pipe):
    """Latents, rows inside the denoiser, statistics, and where the generators end; for every solver."""
    scheduler = pipe.scheduler
    for solver, overrides in case.solvers.items():
        pipe.scheduler = scheduler
        with_solver(pipe, solver, overrides)
        alone = native(pipe, apart(), case.kwargs)[0]
        for plan in (flat(), tree()):
            ours, theirs = generators(), generators()
            expected, stats, resolved = hooked(pipe, plan, case.kwargs, gens=theirs)
            with Rows(pipe) as seen:
                got, got_stats, got_resolved = native(pipe, plan, case.kwargs, gens=ours)
            assert worst(got, expected) <= 1e-5, solver
            assert same_states(ours, theirs), solver
            assert got_resolved.members == resolved.members and got_resolved.node_representatives == resolved.node_representatives
            assert seen == [case.copies * rows for rows in resolved.rows]
            assert got_stats["nfe"] == plan.cost(resolved.num_calls).nfe or solver in ("heun", "kdpm2-a")
            check_stats(got_stats, stats, case)
            assert far(got[1:4], alone[1:4]), "sharing must change a member's picture"


def check_stats(got: dict, expected: dict, case):
    """Equal but for the times, and where the pipeline guides by two denoiser calls."""
    apart = case.copies == 2 and expected["copies_per_launch"] == 1
    differing = {"denoise_seconds", "seconds"} | ({"launches", "copies_per_launch"} if apart else set())
    assert set(got) == set(expected) - {"seconds"}
    assert {k: v for k, v in got.items() if k not in differing} == {k: v for k, v in expected.items() if k not in differing}
    assert got["launches"] == got["num_calls"] and got["copies_per_launch"] == case.copies and got["denoise_seconds"] > 0


def test_unshared_native_equals_stock(case, pipe):
    scheduler = pipe.scheduler
    for solver, overrides in case.solvers.items():
        pipe.scheduler = scheduler
        with_solver(pipe, solver, overrides)
        ours, theirs = generators(), generators()
        expected = stock(pipe, case.kwargs, gens=theirs)
        assert worst(native(pipe, apart(), case.kwargs, gens=ours)[0], expected) <= 1e-5, solver
        assert same_states(ours, theirs)


def test_pictures_equal_the_hooks(case, pipe):
    expected = hooked(pipe, flat(), case.kwargs, output_type="np")[0]
    got = native(pipe, flat(), case.kwargs, output_type="np")[0]
    assert type(got) is type(expected) and got.dtype == expected.dtype
    assert worst(got, expected) <= PICTURES
    assert worst(got, hooked(pipe, apart(), case.kwargs, output_type="np")[0]) > PICTURES


def test_a_sage_scheduler_and_a_pipeline_with_sharing_on(case, pipe):
    solver, overrides = list(case.solvers.items())[-1]
    expected = native(with_solver(pipe, solver, overrides), flat(), case.kwargs)[0]
    with_solver(pipe, solver, overrides, sage_class=True)
    with sage.enable(pipe, apart()):
        assert adapter_for(pipe) is not None
        assert torch.equal(native(pipe, flat(), case.kwargs)[0], expected)


def test_pieces_change_nothing(case, pipe):
    """At most three rows at once; guidance copies stay together where the pipeline keeps them together."""
    expected, stats, resolved = native(pipe, tree(), case.kwargs)
    with Rows(pipe) as seen:
        got, pieces, _ = native(pipe, tree(), case.kwargs, max_rows=3)
    assert worst(got, expected) <= 1e-5
    assert sum(seen) == sum(case.copies * rows for rows in resolved.rows) and max(seen) in (2, 3)
    assert (pieces["launches"], pieces["max_rows"]) == (len(seen), 3)
    assert pieces["launches"] > stats["launches"]


def test_max_rows_below_one_picture(case, pipe):
    """Refused only where the pipeline, too, needs the guidance copies of a picture in one call."""
    if case.copies == 2 and hooked(pipe, flat(), case.kwargs)[1]["copies_per_launch"] == 2:
        with pytest.raises(ValueError, match="max_rows must be at least 2, the rows of one picture with its guidance copies, got 1"):
            native(pipe, flat(), case.kwargs, max_rows=1)
    else:
        got, stats, _ = native(pipe, flat(), case.kwargs, max_rows=1)
        assert worst(got, native(pipe, flat(), case.kwargs)[0]) <= 1e-5
        assert stats["launches"] == stats["denoiser_rows"]


def test_memory_that_runs_out_halves_the_rows(case, pipe, caplog):
    """The denoiser has room for four rows."""
    expected = native(pipe, flat(), case.kwargs)[0]
    denoiser = next(module for name in ("unet", "transformer") if (module := getattr(pipe, name, None)) is not None)

    def refuse(module, args, kwargs):
        if len(args[0] if args else kwargs["hidden_states"]) > 4:
            raise torch.OutOfMemoryError("out of memory")

    handle = denoiser.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level("WARNING", logger="sage"):
        got, stats, _ = native(pipe, flat(), case.kwargs)
    handle.remove()
    assert worst(got, expected) <= 1e-5
    if case.name != "Wan 2.2":  # its first transformer gets four rows at most
        assert stats["max_rows"] <= 4


def test_a_statically_compiled_denoiser_is_asked_for_few_row_counts(case, pipe, monkeypatch):
    plan = SharingPlan.flat([*LEAVES, Leaf("x"), Leaf("y")], [[0, 1], [2, 3]], 0.5, representatives=[0, 2])  # 5 nodes run as 6
    prompts, negatives = [*PROMPTS, "x", "y"], [*NEGATIVES, "", ""]

    def seven():
        gens = [torch.Generator().manual_seed(seed) for seed in range(7)]
        return draw(pipe, plan, prompts, negatives, gens, output_type="latent", **case.kwargs)

    expected, _, resolved = seven()
    monkeypatch.setattr("sage.native.loop.is_static", lambda module, compiled: True)
    with Rows(pipe) as seen:
        got = seven()[0]
    assert worst(got, expected) <= 1e-5
    assert seen == [{5: bucket(5 * case.copies), 7: 7 * case.copies}[rows] for rows in resolved.rows]


def test_the_pipeline_is_left_as_it_was(case, pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(self))
    modules = {name: dict(module.__dict__) for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    cls, attributes, scheduler = type(pipe), dict(pipe.__dict__), (pipe.scheduler, type(pipe.scheduler), dict(pipe.scheduler.config))
    native(pipe, flat(), case.kwargs, output_type="np")
    assert freed == [pipe]
    assert type(pipe) is cls and pipe.__dict__ == attributes
    assert (pipe.scheduler, type(pipe.scheduler), dict(pipe.scheduler.config)) == scheduler
    assert {name: dict(getattr(pipe, name).__dict__) for name in modules} == modules


def test_progress(case, pipe):
    seen = []
    stats = native(pipe, tree(), case.kwargs, on_call=lambda rows, calls: seen.append((rows, calls)))[1]
    assert seen == [(rows, stats["num_calls"]) for rows in stats["rows"]]


def test_without_guidance(case, pipe):
    """A scale of one: no negative rows, whatever the negative prompts."""
    off = {"true_cfg_scale": 1.0} if "true_cfg_scale" in case.kwargs else {"guidance_scale": 1.0}
    off |= {"guidance_scale_2": 1.0} if "guidance_scale_2" in case.kwargs else {}
    got, stats, _ = native(pipe, flat(), case.kwargs | off)
    assert worst(got, hooked(pipe, flat(), case.kwargs | off)[0]) <= 1e-5
    assert stats["guidance_copies"] == 1 and stats["denoiser_rows"] == stats["nfe"]


def test_without_negative_prompts(case, pipe):
    """The pipeline's default negative prompt; Flux then guides by its distilled scale alone."""
    got, stats, _ = native(pipe, flat(), case.kwargs, negatives=None)
    assert worst(got, hooked(pipe, flat(), case.kwargs, negatives=None)[0]) <= 1e-5
    assert stats["guidance_copies"] == (1 if case.name.startswith("Flux") else case.copies)
    if case.copies == 2:
        assert worst(got, native(pipe, flat(), case.kwargs, negatives=NEGATIVES)[0]) > 1e-4


def test_half_precision(case):
    """The draws are the same, and the native loop is as close to float32 as the hook is."""
    pipe, solver = case.build(), "euler-a" if "Diffusion" in case.name and not case.name.endswith("3") else ""
    exact = native(with_solver(pipe, solver, {}), flat(), case.kwargs)[0]
    pipe.to(torch.bfloat16)
    ours, theirs = generators(), generators()
    expected = hooked(pipe, flat(), case.kwargs, gens=theirs)[0]
    got = native(pipe, flat(), case.kwargs, gens=ours)[0]
    assert got.dtype == expected.dtype and same_states(ours, theirs)

    def distance(a, b):
        return (a.float() - b.float()).abs().mean().item()

    assert distance(got, exact) < 1.5 * distance(expected, exact) < 0.3
    assert distance(got, expected) < 0.03


# ---- one guidance scale per call


def test_guidance_scales_of_every_call():
    table = _table()
    plan, x = flat(), torch.randn(len(PROMPTS), 4, generator=torch.Generator().manual_seed(0))

    def draw(scale):
        conditions = {"encoder_hidden_states": x[:, None]}
        negative = {"encoder_hidden_states": -x[:, None]}
        seen = []

        def denoise(model_input, timestep, rows):
            seen.append(len(model_input))
            return torch.tanh(model_input) + rows["encoder_hidden_states"][:, 0]

        result = sage.sample(denoise, plan, table, x, conditions, negative_conditions=negative, guidance_scale=scale)
        return result, seen

    same, one = draw([GUIDANCE] * len(table)), draw(GUIDANCE)
    assert torch.equal(same[0], one[0]) and same[1] == one[1]
    mixed, rows = draw([GUIDANCE, 1.0, 2.0, 1.0])
    assert rows == one[1] and worst(mixed, one[0]) > 1e-3
    with pytest.raises(ValueError, match="guidance_scale must be one number, or one for each of the 4 calls, got 2"):
        draw([1.0, 2.0])


def _table():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**FLOW)
    scheduler.set_timesteps(4)
    return sage.table_for(scheduler)
