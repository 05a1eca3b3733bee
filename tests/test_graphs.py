"""sage.sample with CUDA graphs: on the CPU through a tape that behaves as graphs do, on a GPU with the real ones."""

import warnings

import pytest
import torch
from spy import FullSizeOps
from tape import TapeGraphs
from tiny import NEGATIVES, PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, SageScheduler, SharingPlan, graphs
from sage.solvers import table_for
from sage_kernels import backends

ROWS, SHAPE, STEPS = 6, (4, 8, 8), 8
LEAVES = [Leaf(str(i)) for i in range(ROWS)]
SOLVERS = ("ddim", "dpm++2m", "dpm++3m", "unipc", "heun", "euler-a")
PLANS = {
    "alone": SharingPlan.independent(LEAVES),
    "flat": SharingPlan.flat(LEAVES, [[0, 2, 4], [1, 3]], 0.4),
    "tree": SharingPlan.tree(
        LEAVES, [Node((0, 1, 2, 4), 0, 0.7, (Node((0, 2), 0, 0.9, (Node.single(0), Node.single(2))), Node.single(1), Node.single(4)))]
    ),
}
COUNTS = {"alone": 1, "flat": 2, "tree": 3}  # distinct row counts


@pytest.fixture
def tapes(monkeypatch):
    """Lets graphs run on the CPU; every TapeGraphs that was made, in order."""
    made = []

    def make(device):
        made.append(TapeGraphs(device))
        return made[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", make)
    return made


def denoise(model_input, timestep, conditions):
    """A function of its inputs in which every one of them matters, a row for itself; in the model input's dtype."""
    phase = (timestep / 300).cos() + conditions.float().mean(1)
    x = model_input.float()
    return (torch.tanh(x * 0.7 + phase.view(-1, 1, 1, 1)) + 0.1 * x.roll(1, -1)).to(model_input.dtype)


def table(solver, steps=STEPS):
    scheduler = SageScheduler.from_config({}, solver=solver)
    scheduler.set_timesteps(steps)
    return table_for(scheduler)


def inputs(seed=0, device="cpu", guided=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    options = dict(x_init=draw(ROWS, *SHAPE), conditions=draw(ROWS, 5), seeds=torch.arange(ROWS, device=device) + 10 * seed)
    return options | (dict(negative_conditions=draw(ROWS, 5), guidance_scale=3.0) if guided else {})


@torch.no_grad()
def run(denoiser, plan, solver_table, options, **more):
    return sage.sample(denoiser, plan, solver_table, **options, **more)


def silent(*args, **kwargs):
    """`run`, where a refusal or an input that had to be copied is a failure."""
    with warnings.catch_warnings():
        for op in ("sage.sample", "branch_step"):
            warnings.filterwarnings("error", message=op, category=RuntimeWarning)
        return run(*args, **kwargs)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_graphs_give_the_eager_loops_bits(tapes, solver, guided, plan):
    calls, options = table(solver), inputs(guided=guided)
    got = silent(denoise, PLANS[plan], calls, options, graphs=True)
    assert torch.equal(got, run(denoise, PLANS[plan], calls, options))
    assert not torch.equal(got, run(denoise, PLANS[plan], calls, options | dict(x_init=options["x_init"].flip(0))))
    assert [(t.captures, t.replays) for t in tapes] == [(COUNTS[plan], COUNTS[plan] + len(calls))]  # each is compared once


@pytest.mark.parametrize("solver", ["dpm++2m", "heun"])
def test_a_real_network_gives_the_eager_loops_bits(tapes, solver):
    pipe, calls = stable_diffusion(), table(solver, 5)
    embeds, negatives = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    plan = SharingPlan.flat([Leaf(prompt) for prompt in PROMPTS], [[0, 2, 4], [1, 3]], 0.5)
    x_init = torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0))
    options = dict(x_init=x_init, conditions=embeds, negative_conditions=negatives, guidance_scale=3.0)

    def unet(model_input, timestep, conditions):
        return pipe.unet(model_input, timestep, encoder_hidden_states=conditions).sample

    assert torch.equal(silent(unet, plan, calls, options, graphs=True), run(unet, plan, calls, options))
    assert tapes[0].captures == 2


def test_noise_brought_by_the_caller(tapes):
    options = inputs() | dict(seeds=None)
    draws = torch.randn(STEPS, ROWS, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = run(denoise, PLANS["flat"], table("euler-a"), options, noise=draws.__getitem__)
    assert torch.equal(silent(denoise, PLANS["flat"], table("euler-a"), options, noise=draws.__getitem__, graphs=True), expected)


@pytest.mark.parametrize("state, model, captures", [("float32", "bfloat16", 3), ("bfloat16", "bfloat16", 2)])
def test_low_precision(tapes, state, model, captures):
    """The first call's input has the state's dtype, the others' the model's: another graph where these differ."""
    model, options = getattr(torch, model), inputs()
    options["x_init"] = options["x_init"].to(getattr(torch, state))
    low = lambda *args: denoise(*args).to(model)  # noqa: E731
    got = silent(low, PLANS["flat"], table("dpm++2m"), options, graphs=True)
    assert got.dtype == options["x_init"].dtype
    assert torch.equal(got, run(low, PLANS["flat"], table("dpm++2m"), options))
    assert tapes[0].captures == captures


def test_a_captured_denoiser_serves_other_runs(tapes):
    """Other latents, conditions, seeds, plans, solvers and numbers of steps: the graphs are those of the first run."""
    captured = sage.CapturedDenoiser(denoise)
    other = SharingPlan.flat(LEAVES, [[5, 1, 0], [3, 2]], 0.6)
    runs = [("flat", "dpm++2m", STEPS), (other, "dpm++2m", STEPS), ("flat", "unipc", STEPS), (other, "euler-a", 3), ("flat", "heun", 20)]
    for seed, (plan, solver, steps) in enumerate(runs):
        plan = PLANS.get(plan, plan)
        expected = run(denoise, plan, table(solver, steps), inputs(seed))
        assert torch.equal(silent(captured, plan, table(solver, steps), inputs(seed)), expected)
    assert len(tapes) == 1 and tapes[0].captures == captured.num_graphs == 2
    silent(captured, PLANS["tree"], table("ddim"), inputs())
    assert captured.num_graphs == 3  # 3, 5 and 6 nodes, of which only 5 is new
    silent(captured, PLANS["tree"], table("ddim"), inputs(guided=False))
    assert captured.num_graphs == 5  # 6 nodes without guidance are as many rows as 3 with it


def test_a_run_keeps_its_result_when_the_next_one_starts(tapes):
    captured = sage.CapturedDenoiser(denoise)
    first = silent(captured, PLANS["flat"], table("ddim"), inputs(1))
    kept = first.clone()
    silent(captured, PLANS["flat"], table("ddim"), inputs(2))
    assert torch.equal(first, kept)


def test_more_calls_than_the_clock_holds(tapes, monkeypatch):
    monkeypatch.setattr(graphs, "_CLOCK_CALLS", 4)
    captured = sage.CapturedDenoiser(denoise)
    for steps in (3, 9, 5):
        expected = run(denoise, PLANS["flat"], table("ddim", steps), inputs())
        assert torch.equal(silent(captured, PLANS["flat"], table("ddim", steps), inputs()), expected)
    assert tapes[0].captures == 4 and captured.num_graphs == 2


def test_conditions_may_be_a_mapping(tapes):
    def two(model_input, timestep, conditions):
        mask = conditions["encoder_attention_mask"].float()
        return denoise(model_input, timestep, conditions["encoder_hidden_states"] * mask)

    options = inputs()
    mask = torch.rand(ROWS, 5, generator=torch.Generator().manual_seed(2)) > 0.3
    for name in ("conditions", "negative_conditions"):
        options[name] = {"encoder_hidden_states": options[name], "encoder_attention_mask": mask}
    expected = run(two, PLANS["tree"], table("dpm++2m"), options)
    assert torch.equal(silent(two, PLANS["tree"], table("dpm++2m"), options, graphs=True), expected)


def test_a_table_that_begins_later(tapes):
    scheduler = SageScheduler.from_config({}, solver="dpm++2m")
    scheduler.set_timesteps(STEPS)
    later = table_for(scheduler, begin=3)
    expected = run(denoise, PLANS["flat"], later, inputs())
    assert torch.equal(silent(denoise, PLANS["flat"], later, inputs(), graphs=True), expected)


def test_on_call_is_called(tapes):
    seen, expected = [], []
    run(denoise, PLANS["flat"], table("ddim"), inputs(), on_call=expected.append)
    silent(denoise, PLANS["flat"], table("ddim"), inputs(), on_call=seen.append, graphs=True)
    assert seen == expected and len(seen) == STEPS


def test_inference_mode_and_no_grad_take_turns(tapes):
    captured, expected = sage.CapturedDenoiser(denoise), run(denoise, PLANS["flat"], table("dpm++2m"), inputs())
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(sage.sample(captured, PLANS["flat"], table("dpm++2m"), **inputs()), expected)
    assert captured.num_graphs == 2 and captured.refusal is None


@pytest.mark.parametrize(
    "output",
    [
        lambda x, y: x,
        lambda x, y: x.view(-1, *SHAPE),
        lambda x, y: y.to(memory_format=torch.channels_last),
        lambda x, y: x.mul_(0.9),
    ],
    ids=["its input", "a view of it", "channels last", "written into its input"],
)
def test_outputs_that_branch_step_could_not_read_are_copied_in_the_graph(tapes, output):
    odd = lambda x, t, c: output(x, denoise(x, t, c))  # noqa: E731
    dense = lambda x, t, c: output(x.clone(), denoise(x, t, c)).contiguous()  # noqa: E731
    got = silent(odd, PLANS["flat"], table("dpm++2m"), inputs(), graphs=True)
    assert torch.equal(got, run(dense, PLANS["flat"], table("dpm++2m"), inputs()))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_host_enqueues_a_replay_and_a_branch_step_per_call(tapes, monkeypatch, solver, guided):
    """Nothing else, however small, and no memory: after the first call's input is in place."""
    captured, spy = sage.CapturedDenoiser(denoise), FullSizeOps(0)
    silent(captured, PLANS["tree"], table(solver), inputs(guided=guided))
    steps, replay = [], tapes[0].replay

    def replay_apart(tape):
        steps.append(list(spy.seen))
        replay(tape)
        spy.seen.clear()

    monkeypatch.setattr(tapes[0], "replay", replay_apart)
    monkeypatch.setattr("spy.FREE", {"split", "chunk"})  # views; everything that allocates counts here
    with spy:
        run(captured, PLANS["tree"], table(solver), inputs(guided=guided))
    assert steps[0][-1] == "copy_" and len(steps) == len(table(solver))
    assert [*steps[1:], spy.seen] == [["branch_step"]] * len(steps)


def refuse(denoiser, reason, tapes):
    """The loop says why it runs without graphs, gives the eager result, and does not say so again."""
    captured = sage.CapturedDenoiser(denoiser)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph: .*" + reason) as caught:
        got = run(captured, PLANS["flat"], table("dpm++2m"), inputs())
    assert [w.filename for w in caught if str(w.message).startswith("sage.sample")] == [__file__]
    assert reason in captured.refusal and captured.num_graphs == 0
    again = silent(captured, PLANS["flat"], table("dpm++2m"), inputs())
    assert len(tapes) == 1
    return got, again


def test_a_denoiser_that_waits_for_the_device_runs_without_graphs(tapes):
    def waits(model_input, timestep, conditions):
        return denoise(model_input, timestep, conditions) * (0.5 if timestep.item() > 500 else 1.0)

    got, again = refuse(waits, "not permitted when stream is capturing", tapes)
    assert torch.equal(got, run(waits, PLANS["flat"], table("dpm++2m"), inputs())) and torch.equal(got, again)


def test_a_denoiser_that_counts_in_python_runs_without_graphs(tapes):
    count = [0]

    def counts(model_input, timestep, conditions):
        count[0] += 1
        return denoise(model_input, timestep, conditions) * (1 + count[0] % 5)

    refuse(counts, "depends on more than its inputs", tapes)


def test_a_denoiser_that_remembers_its_conditions_runs_without_graphs(tapes):
    """A projection kept by the identity of its input is right in an eager loop; a graph would keep the first one for ever."""
    kept = {}

    def remembers(model_input, timestep, conditions):
        if kept.get("of") is not conditions:
            kept.update(of=conditions, value=conditions * 2)
        return denoise(model_input, timestep, kept["value"])

    got, again = refuse(remembers, "depends on more than its inputs", tapes)
    assert torch.equal(got, run(remembers, PLANS["flat"], table("dpm++2m"), inputs())) and torch.equal(got, again)


def test_a_denoiser_s_own_error_is_its_own(tapes):
    def broken(model_input, timestep, conditions):
        raise KeyError("adapter")

    captured = sage.CapturedDenoiser(broken)
    with pytest.raises(KeyError, match="adapter"):
        silent(captured, PLANS["flat"], table("ddim"), inputs())
    assert captured.refusal is None
    captured.denoise = denoise
    assert torch.equal(
        silent(captured, PLANS["flat"], table("ddim"), inputs()), run(denoise, PLANS["flat"], table("ddim"), inputs())
    )
    with pytest.raises(TypeError, match="denoise must return a tensor, got tuple"):
        silent(lambda *args: (denoise(*args),), PLANS["flat"], table("ddim"), inputs(), graphs=True)


@pytest.mark.parametrize("make", [lambda f: dict(denoiser=f, graphs=True), lambda f: dict(denoiser=sage.CapturedDenoiser(f))])
def test_a_device_without_graphs_is_refused_before_the_first_call(make):
    with pytest.raises(ValueError, match="graphs need x_init and the denoiser on a CUDA device, got x_init on cpu; move both"):
        run(plan=PLANS["flat"], solver_table=table("ddim"), options=inputs(), **make(lambda *args: pytest.fail("the denoiser ran")))


def test_gradients_are_refused_before_the_first_call(tapes):
    with pytest.raises(NotImplementedError, match="graphs record no gradient and gradients are enabled; call sage.sample under"):
        sage.sample(lambda *args: pytest.fail("the denoiser ran"), PLANS["flat"], table("ddim"), **inputs(), graphs=True)


def test_two_runs_at_a_time_are_refused(tapes):
    captured = sage.CapturedDenoiser(denoise)
    nested = lambda rows: run(captured, PLANS["flat"], table("ddim"), inputs())  # noqa: E731
    with pytest.raises(RuntimeError, match="another run is using its memory"):
        run(captured, PLANS["flat"], table("ddim"), inputs(), on_call=nested)
    silent(captured, PLANS["flat"], table("ddim"), inputs())


class OnceThen(TapeGraphs):
    """Replays as it should until every graph has passed its comparison, then as `broken` does."""

    def replay(self, tape):
        if self.replays < self.captures:
            return super().replay(tape)
        self.replays += 1
        self.broken(tape)


class Skips(OnceThen):
    def broken(self, tape):
        pass


class ReadsStaleInputs(OnceThen):
    """Restores, before a replay, what the first replay of that graph read."""

    def __init__(self, device):
        super().__init__(device)
        self.read = {}

    def broken(self, tape):
        inside = {id(t) for t in tape.pool}
        given = [t for _, args, _, _ in tape.ops for t in args if torch.is_tensor(t) and id(t) not in inside and t.ndim == 4]
        for number, tensor in enumerate(given):
            tensor.copy_(self.read.setdefault((id(tape), number), tensor.clone()))
        TapeGraphs.replay(self, tape)


@pytest.mark.parametrize("broken", [Skips, ReadsStaleInputs])
def test_these_tests_see_a_replay_that_does_not_do_its_work(monkeypatch, broken):
    monkeypatch.setitem(graphs.RECORDERS, "cpu", broken)
    expected = run(denoise, PLANS["alone"], table("ddim"), inputs())
    got = silent(denoise, PLANS["alone"], table("ddim"), inputs(), graphs=True)
    assert not torch.allclose(got, expected, atol=1e-2)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_graphs_give_the_eager_loops_bits(solver, guided, plan):
    captured, calls = sage.CapturedDenoiser(denoise), table(solver)
    for seed in (0, 1):
        options = inputs(seed, "cuda", guided)
        assert torch.equal(silent(captured, PLANS[plan], calls, options), run(denoise, PLANS[plan], calls, options))
    assert captured.num_graphs == COUNTS[plan]


@gpu
def test_cuda_graphs_of_a_real_network():
    pipe = stable_diffusion().to("cuda")
    embeds, negatives = pipe.encode_prompt(PROMPTS, "cuda", 1, True, NEGATIVES)
    plan = SharingPlan.flat([Leaf(prompt) for prompt in PROMPTS], [[0, 2, 4], [1, 3]], 0.5)
    x_init = torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0)).cuda()
    options = dict(x_init=x_init, conditions=embeds, negative_conditions=negatives, guidance_scale=3.0)

    def unet(model_input, timestep, conditions):
        return pipe.unet(model_input, timestep, encoder_hidden_states=conditions).sample

    got, expected = silent(unet, plan, table("dpm++2m"), options, graphs=True), run(unet, plan, table("dpm++2m"), options)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)  # a library may choose another algorithm inside a capture


@gpu
@pytest.mark.parametrize("wait", [lambda t: t.item(), lambda t: torch.cuda.synchronize()], ids=["item", "synchronize"])
def test_cuda_is_left_as_it_was_by_a_denoiser_that_waits(wait):
    """One is found before the capture, the other breaks it; afterwards random numbers, streams and graphs work as before."""

    def waits(model_input, timestep, conditions):
        wait(timestep)
        return denoise(model_input, timestep, conditions)

    stream, captured = torch.cuda.current_stream(), sage.CapturedDenoiser(waits)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph"):
        got = run(captured, PLANS["flat"], table("dpm++2m"), inputs(device="cuda"))
    expected = run(denoise, PLANS["flat"], table("dpm++2m"), inputs(device="cuda"))
    assert captured.refusal and torch.equal(got, expected)
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(1000, device="cuda").isfinite().all()
    assert torch.equal(silent(denoise, PLANS["flat"], table("dpm++2m"), inputs(device="cuda"), graphs=True), expected)


@gpu
def test_cuda_runs_on_two_streams_come_one_after_the_other():
    captured, calls = sage.CapturedDenoiser(denoise), table("dpm++2m")
    results = []
    for seed, stream in enumerate([torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]):
        options = inputs(seed, "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            results.append(silent(captured, PLANS["flat"], calls, options))
    torch.cuda.synchronize()
    for seed, result in enumerate(results):
        assert torch.equal(result, run(denoise, PLANS["flat"], calls, inputs(seed, "cuda")))


def steady(start, stop):
    """A second run of a captured denoiser, with `start` called after its first call and `stop` after its last."""
    captured, calls, done = sage.CapturedDenoiser(denoise), table("dpm++2m"), []

    def on_call(rows):
        done.append(rows)
        if len(done) == 1:
            start()
        if len(done) == len(calls):
            stop()

    silent(captured, PLANS["tree"], calls, inputs(0, "cuda"))
    silent(captured, PLANS["tree"], calls, inputs(1, "cuda"), on_call=on_call)
    return len(calls) - 1


@gpu
def test_cuda_loop_does_not_wait_for_the_device():
    try:
        steady(lambda: torch.cuda.set_sync_debug_mode("error"), lambda: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(backends.available()["cuda"] is not None, reason="no CUDA kernel of branch_step")
def test_cuda_loop_is_a_graph_and_a_kernel_per_call():
    """And allocates nothing: counted from what the host asked of the CUDA runtime."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])
    allocations = []
    count = lambda: allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"])  # noqa: E731
    calls = steady(lambda: (count(), profiler.start()), lambda: (profiler.stop(), count()))
    names = [event.name for event in profiler.events() if event.name.startswith("cu")]
    assert sum(name.startswith("cudaGraphLaunch") for name in names) == calls
    assert sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names) == calls
    assert not [name for name in names if name.startswith(("cudaMemcpy", "cudaMemset", "cudaMalloc", "cudaStreamSynchronize"))]
    assert allocations[0] == allocations[1]
