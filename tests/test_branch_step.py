"""branch_step against its specification: by bits, on every backend, and the specification against float64."""

import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies

import sage_kernels
from sage_kernels import reference
from sage_kernels.coefficients import COLUMNS
from sage_kernels.testing import DTYPE_NAMES, DTYPES, moved, random_case, same_bits, table_row

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = {"want_corrected": True, "model_input": "double"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_equals_reference(positional, keyword, backend="auto", device="cpu", **options):
    """The backend's result, from the same inputs on its device, against the specification's on the CPU."""
    expected = sage_kernels.branch_step(*positional, **keyword, **options, backend="reference")
    result = sage_kernels.branch_step(*moved(positional, device), **moved(keyword, device), **options, backend=backend)
    for name, got, wanted in zip(result._fields, moved(result, "cpu"), expected):
        assert same_bits(got, wanted), name
    return result


@pytest.mark.parametrize("elements", [1, 7, 64, 4099])
@pytest.mark.parametrize("rows_out", [0, 1, 3, 33])
def test_backends_equal_the_reference(runner, rows_out, elements):
    for seed, (dtypes, noise) in enumerate(zip(DTYPES, ["seed", "tensor", "indexed", "seed", None])):
        case = random_case(seeded(seed), 3, rows_out, (elements,), dtypes, guided=seed != 1, noise=noise, history_parent=seed % 2 == 0)
        result = assert_equals_reference(*case, *runner, **EVERYTHING)
        assert result.sample.shape == (rows_out, elements) and result.model_input.shape == (2 * rows_out, elements)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_NAMES)
def test_every_value_of_a_small_dtype_is_read_and_rounded_alike(runner, dtypes):
    """All 65536 bit patterns in, and a scale that reaches subnormals, overflow and ties on the way out."""
    model, state = dtypes
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    y = patterns.to(torch.int16).view(model)[None] if model.itemsize == 2 else (patterns << 16).view(torch.float32)[None]
    x = torch.zeros(1, 2**16, dtype=state)
    zero = torch.zeros(1, dtype=torch.int32)
    for scale in (1.0, 1.0 / 3, 1e-6, 100.0):
        assert_equals_reference((x, y, table_row(q=scale, b0=1.0), zero, zero), {}, *runner, model_input="single")


@pytest.mark.parametrize("corrected", [False, True])
def test_zeros_infinities_and_subnormals_keep_their_bits(runner, corrected):
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 3e38, float("inf"), -float("inf"), float("nan")])
    x, y = (t.flatten()[None].contiguous() for t in torch.meshgrid(special, special, indexing="ij"))
    zero = torch.zeros(1, dtype=torch.int32)
    rows = [table_row(p=1.0, q=1.0, a=1.0, b0=-1.0), table_row(p=1.0, a=-1.0, s=-1.0), table_row(q=-0.5, b0=2.0, a=0.5, clip=1.0)]
    rows += [table_row(q=1.0, b0=1.0, clip=bound) for bound in (0.0, -0.0)]
    for row in rows:
        assert_equals_reference((x, y, row, zero, zero), {}, *runner, want_corrected=corrected, model_input="single")


RANDOM = strategies.tuples(
    strategies.integers(0, 2**31),
    strategies.integers(1, 5),
    strategies.integers(0, 9),
    strategies.lists(strategies.integers(1, 20), min_size=0, max_size=3),
    strategies.sampled_from(DTYPES),
    strategies.sampled_from(["seed", "tensor", "indexed", None]),
    strategies.sampled_from([None, "single", "double"]),
    strategies.booleans(),
    strategies.booleans(),
    strategies.booleans(),
)


def assert_random_case(drawn, backend, device):
    seed, rows_in, rows_out, shape, dtypes, noise, model_input, guided, corrected, denoised = drawn
    case = random_case(seeded(seed), rows_in, rows_out, shape, dtypes, guided=guided, noise=noise, history_parent=corrected)
    options = {"want_denoised": denoised, "want_corrected": corrected, "model_input": model_input}
    assert_equals_reference(*case, backend, device, **options)


@pytest.mark.deep
@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(RANDOM)
def test_random_cases_equal_the_reference(drawn):
    assert_random_case(drawn, "auto", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@hypothesis.settings(max_examples=60, deadline=None)  # Triton compiles for most of them
@hypothesis.given(RANDOM)
def test_random_cases_equal_the_reference_on_a_gpu(backend, drawn):
    refusal = sage_kernels.backends.available()[backend] or (None if torch.cuda.is_available() else "no GPU here")
    if refusal:
        pytest.skip(f"{backend}: {refusal}")
    assert_random_case(drawn, backend, "cuda")


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_NAMES)
def test_rows_may_lie_anywhere(device, dtypes):
    """Halves of one guidance batch, every second row, and storage that starts at an odd element."""
    positional, keyword = random_case(seeded(0), 4, 6, (3, 11), dtypes, device=device)
    spread = {"sample": positional[0], "model_output": positional[1]} | {k: keyword[k] for k in ("uncond_output", "last_sample")}

    def every_second(t):
        return torch.stack([t, torch.full_like(t, float("nan"))], 1).flatten(0, 1)[::2]

    def odd_offset(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    expected = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING)
    for move in (every_second, odd_offset):
        moved = {name: move(t) for name, t in spread.items()}
        history = tuple(move(m) for m in keyword["history"])
        arguments = keyword | {"history": history, "uncond_output": moved["uncond_output"], "last_sample": moved["last_sample"]}
        result = sage_kernels.branch_step(moved["sample"], moved["model_output"], *positional[2:], **arguments, **EVERYTHING)
        assert all(same_bits(a, b) for a, b in zip(result, expected)), move.__name__


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["parent", "step", "history_parent", "noise_index"])
def test_a_bad_index_on_a_device_makes_its_row_nan_and_no_other(backend, name, bad):
    if not torch.cuda.is_available() or sage_kernels.backends.available()[backend]:
        pytest.skip(f"{backend} does not run here")
    row = table_row(p=1.2, q=-0.6, a=0.8, b0=0.3, b1=-0.1, b2=0.2, c=0.5, u0=1.0).expand(3, -1).contiguous()
    x, y, m1, m2, noise = (torch.randn(3, 300, generator=seeded(i)) for i in range(5))
    index = {key: torch.tensor([0, 1, 2, 1], dtype=torch.int32) for key in ("parent", "step", "h1", "h2", "noise_index")}

    def step(index):
        keyword = {"history": (m1, m2), "history_parent": (index["h1"], index["h2"]), "noise": noise, "noise_index": index["noise_index"]}
        arguments = moved((x, y, row, index["step"], index["parent"]), "cuda"), moved(keyword, "cuda")
        return moved(sage_kernels.branch_step(*arguments[0], **arguments[1], backend=backend), "cpu")

    good = step(index)
    key = "h2" if name == "history_parent" else name
    wrong = step(index | {key: index[key].index_fill(0, torch.tensor([2]), bad)})
    assert wrong.sample[2].isnan().all() and wrong.denoised[2].isnan().all() == (name in ("parent", "step"))
    others = [0, 1, 3]
    assert same_bits(wrong.sample[others], good.sample[others]) and same_bits(wrong.denoised[others], good.denoised[others])


def test_shared_rows_and_broadcast_rows():
    positional, keyword = random_case(seeded(1), 3, 9, (65,))
    all_one = positional[:4] + (torch.full((9,), 2, dtype=torch.int32),)
    assert_equals_reference(all_one, keyword, **EVERYTHING)
    same = positional[0][:1].expand(3, 65)
    assert_equals_reference((same, *positional[1:]), keyword, **EVERYTHING)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_NAMES)
def test_what_the_solver_stores_need_not_be_written(runner, dtypes):
    """And a clamp does not then write into the input that it bounds."""
    zero = torch.zeros(1, dtype=torch.int32)
    y = (torch.randn(1, 700, generator=seeded(3)) * 3).to(dtypes[0])
    before = y.clone()
    for row in (table_row(q=1.0, b0=0.5, a=0.3, clip=1.0), table_row(p=1.0, a=0.3, b0=0.5, clip=1.0)):
        case = (y.to(dtypes[1]), y, row, zero, zero), {}
        result = assert_equals_reference(*case, *runner, want_denoised=False, want_corrected=True, model_input="double")
        assert result.denoised is None
    assert same_bits(y, before)


@pytest.mark.parametrize("differs", [None, "step", "guidance", "seed", "call", "history_parent", "noise_index"])
def test_siblings_are_alike_only_if_everything_they_are_made_of_is(runner, differs):
    """Children of one parent may be computed once; one that differs in anything must not be."""
    positional, keyword = random_case(seeded(4), 3, 8, (300,), noise="indexed" if differs == "noise_index" else "seed", history_parent=True)
    alike = lambda t: t[:2].repeat_interleave(4)  # noqa: E731
    keyword |= {name: alike(keyword[name]) for name in ("guidance", "seed", "call", "noise_index") if name in keyword}
    keyword["history_parent"] = tuple(alike(t) for t in keyword["history_parent"])
    named = {"step": alike(positional[3])} | keyword
    if differs == "history_parent":
        named[differs][2][2] = (named[differs][2][2] + 1) % 5
    elif differs is not None:
        named[differs][2] = (named[differs][2] + 1) % 3
    step = named.pop("step")
    assert_equals_reference((*positional[:3], step, alike(positional[4])), named, *runner, **EVERYTHING)


def test_other_layouts_are_copied_and_said():
    positional, keyword = random_case(seeded(2), 2, 2, (4, 5, 6))
    layout = {"memory_format": torch.channels_last}
    expected = sage_kernels.branch_step(*positional, **keyword, model_input="single")
    sage_kernels.arguments._warn_copied.cache_clear()
    with pytest.warns(RuntimeWarning, match="model_output has rows that are not dense"):
        output = positional[1].contiguous(**layout)
        result = sage_kernels.branch_step(positional[0], output, *positional[2:], **keyword, model_input="single")
    assert all(same_bits(a, b) for a, b in zip(result, expected))
    result = sage_kernels.branch_step(positional[0].contiguous(**layout), output, *positional[2:], **keyword, model_input="single")
    assert all(same_bits(a, b) for a, b in zip(result, expected))


def test_threads_do_not_change_the_bits():
    positional, keyword = random_case(seeded(5), 2, 5, (3, 70000))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sage_kernels.branch_step(*positional, **keyword, **EVERYTHING))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


def test_twice_gives_equal_bits(device):
    case = random_case(seeded(6), 3, 7, (1000,), device=device)
    first, second = (sage_kernels.branch_step(*case[0], **case[1], **EVERYTHING) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second))


def test_preallocated_outputs_are_filled_and_returned(device):
    for dtypes in DTYPES:
        positional, keyword = random_case(seeded(7), 3, 4, (33,), dtypes, device=device)
        expected = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING)
        out = sage_kernels.BranchStepOut(*(torch.full_like(t, float("nan")) for t in expected))
        for backend in ("auto", "reference"):
            result = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, out=out, backend=backend)
            assert result is out and all(same_bits(a, b) for a, b in zip(out, expected))


def test_float32_reference_is_within_its_rounding_error_of_float64():
    """Longest chain: guidance 3 roundings, m0 3 more, xc 7 more, x' 7 more, the model input 1: |error| <= 21 u * sum |terms|."""
    for seed in range(20):
        positional, keyword = random_case(seeded(seed), 3, 5, (257,), noise="tensor", history_parent=True)
        x, y, table, step, parent = positional
        results = reference.branch_step(*positional, **keyword)
        exact = reference.branch_step(*positional, **keyword, dtype=torch.float64)

        u, g = keyword.pop("uncond_output"), keyword.pop("guidance")
        rows = torch.arange(5, dtype=torch.int32)
        guided = (y.abs() + u.abs()).double()[parent.long()] * g.double().abs()[:, None] + u.abs().double()[parent.long()]
        size = {k: tuple(t.abs() for t in v) if k == "history" else v.abs() for k, v in keyword.items() if k != "history_parent"}
        size["last_sample"] = size["last_sample"][parent.long()]
        indices = (*(p for p in keyword["history_parent"]),)
        magnitude = reference.branch_step(
            x.abs()[parent.long()], guided, table.abs().index_fill(1, torch.tensor([15]), torch.inf), step, rows,
            **size, history_parent=indices, dtype=torch.float64,
        )  # fmt: skip
        for got, wanted, scale in zip(results, exact, magnitude):
            assert ((got.double() - wanted).abs() <= 21 * 2.0**-24 * scale * (1 + 1e-5)).all()


def test_identity_parent_is_the_plain_step_and_children_are_copies_of_it(device):
    row = table_row(p=1.2, q=-0.6, a=0.8, b0=0.3, b1=-0.1).to(device)
    x, y, m1 = (torch.randn(3, 50, generator=seeded(i)).to(device) for i in range(3))
    identity = torch.arange(3, dtype=torch.int32, device=device)
    plain = sage_kernels.branch_step(x, y, row, torch.zeros_like(identity), identity, history=(m1,))
    m0 = 1.2 * x - 0.6 * y
    assert torch.allclose(plain.denoised, m0) and torch.allclose(plain.sample, 0.8 * x + 0.3 * m0 - 0.1 * m1, atol=1e-6)

    parent = torch.tensor([2, 0, 2, 2, 1], dtype=torch.int32, device=device)
    branched = sage_kernels.branch_step(x, y, row, torch.zeros_like(parent), parent, history=(m1,))
    assert same_bits(branched.sample, plain.sample[parent.long()]) and same_bits(branched.denoised, plain.denoised[parent.long()])


def test_a_row_does_not_depend_on_its_batch_nor_its_place(device):
    positional, keyword = random_case(seeded(8), 4, 9, (130,), history_parent=True, device=device)
    whole = sage_kernels.branch_step(*positional, **keyword, want_corrected=True)
    order = torch.randperm(9, generator=seeded(9))[:5].to(device)
    vectors = {name: keyword[name][order] for name in ("guidance", "seed", "call")}
    vectors["history_parent"] = tuple(p[order] for p in keyword["history_parent"])
    some = sage_kernels.branch_step(
        *positional[:3], positional[3][order], positional[4][order], **keyword | vectors, want_corrected=True
    )
    assert all(same_bits(a, b[order]) for a, b in zip(some[:3], whole[:3]))


def test_history_follows_its_parent_over_branches(device):
    """Rows branch twice while m1 and m2 keep the rows they were stored with; a run without sharing is the judge."""
    row = table_row(p=1.0, q=-0.5, a=0.9, b0=0.5, b1=-0.3, b2=0.1).to(device)
    index = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    y = [torch.randn(4, 20, generator=seeded(i)).to(device) for i in range(3)]
    rows = {0: [0, 0, 0, 0], 1: [0, 0, 1, 1], 2: [0, 1, 2, 3]}  # node of each leaf at each call
    x = torch.randn(1, 20, generator=seeded(9)).to(device)
    first_leaf = {s: [nodes.index(n) for n in sorted(set(nodes))] for s, nodes in rows.items()}

    def step(x, y, parent, history, history_parent):
        return sage_kernels.branch_step(
            x, y, row, torch.zeros_like(parent), parent, history=history, history_parent=history_parent
        )

    # Each call reads the rows of its own partition and writes those of the next; m1 has the rows of this call's partition.
    zeros = [torch.zeros(1, 20, device=device)] * 2
    first = step(x, y[0][:1], index(0, 0), zeros, None)
    second = step(first.sample, y[1][first_leaf[1]], index(0, 0, 1, 1), (first.denoised, zeros[0]), (index(0, 0, 1, 1), index(0, 0, 0, 0)))
    third = step(second.sample, y[2], index(0, 1, 2, 3), (second.denoised, first.denoised), (index(0, 1, 2, 3), index(0, 0, 1, 1)))

    alone, m1, m2 = x.expand(4, 20), torch.zeros(4, 20, device=device), torch.zeros(4, 20, device=device)
    for s in range(3):
        shared = y[s][[first_leaf[s][n] for n in rows[s]]]
        out = step(alone, shared, index(0, 1, 2, 3), (m1, m2), None)
        alone, m1, m2 = out.sample, out.denoised, m1
    assert same_bits(third.sample, alone)


def test_zero_coefficients_never_read_their_input(device):
    nan = torch.full((1, 40), float("nan"), device=device)
    x, y = (torch.randn(1, 40, generator=seeded(i)).to(device) for i in range(2))
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    extra = {"history": (nan, nan, nan), "last_sample": nan, "noise": nan}
    row = table_row(p=0.5, q=0.5, a=0.7, b0=0.1).to(device)
    expected = sage_kernels.branch_step(x, y, row, zero, zero, want_corrected=True)
    assert all(same_bits(a, b) for a, b in zip(sage_kernels.branch_step(x, y, row, zero, zero, **extra, want_corrected=True), expected))
    without_x = sage_kernels.branch_step(nan, y, table_row(q=1.0, b0=0.5, u0=0.0).to(device), zero, zero)
    assert same_bits(without_x.denoised, y) and same_bits(without_x.sample, 0.5 * y)
    without_y = sage_kernels.branch_step(x, nan, table_row(p=1.0, a=2.0).to(device), zero, zero)
    assert same_bits(without_y.sample, 2.0 * x)


@pytest.mark.parametrize("column", [name for name in COLUMNS if name not in ("s", "clip")])
def test_nan_propagates_through_every_term_and_the_clamp(device, column):
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    nan, one = torch.full((1, 9), float("nan"), device=device), torch.ones(1, 9, device=device)
    reads = {"p": "x", "q": "y", "u0": "x", "u1": "last", "u3": "m1", "u4": "m2", "u5": "m3", "a": "x", "b1": "m1", "b2": "m2"}
    source = (reads | {"u2": "y", "b0": "y", "e": "y", "c": "noise"})[column]
    value = {name: nan if name == source else one for name in ("x", "y", "last", "m1", "m2", "m3", "noise")}
    row = table_row(**{"q": 1.0, "a": 1.0, "clip": 0.5} | {column: 2.0}).to(device)
    result = sage_kernels.branch_step(
        value["x"], value["y"], row, zero, zero, history=(value["m1"], value["m2"], value["m3"]),
        last_sample=value["last"], noise=value["noise"], model_input="single",
    )  # fmt: skip
    touched = result.denoised if column in "pq" else result.sample
    assert touched.isnan().all()


def test_clamp_bounds_what_is_stored_and_what_follows(device):
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    y = torch.tensor([[-3.0, -0.5, 0.0, 0.5, 3.0, float("inf"), -float("inf")]], device=device)
    result = sage_kernels.branch_step(torch.zeros_like(y), y, table_row(q=1.0, b0=2.0, clip=1.0).to(device), zero, zero)
    assert torch.equal(result.denoised, y.clamp(-1, 1)) and torch.equal(result.sample, 2 * y.clamp(-1, 1))


COMPILED_FIRST = """
import torch, sage_kernels
from sage_kernels.testing import random_case, same_bits
positional, keyword = random_case(torch.Generator().manual_seed(0), 3, 5, (70,))
step = lambda *args, **options: sage_kernels.branch_step(*args, **options).sample
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*positional, **keyword)
assert same_bits(compiled, step(*positional, **keyword))
"""


def test_compiles_in_a_process_that_has_not_called_it_before():
    subprocess.run([sys.executable, "-c", COMPILED_FIRST], check=True, cwd=ROOT)


@pytest.mark.parametrize(("backend", "compiler"), [("auto", "inductor"), ("reference", "aot_eager")])
def test_compiles_into_one_graph_with_the_same_bits(backend, compiler):
    def step(*positional, **keyword):
        return sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, backend=backend)

    positional, keyword = random_case(seeded(11), 3, 5, (70,), DTYPES[1])
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)
    assert all(same_bits(a, b) for a, b in zip(compiled(*positional, **keyword), step(*positional, **keyword)))
