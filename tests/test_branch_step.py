"""branch_step against its specification: by bits, on every backend, and the specification against float64."""

import re
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
from sage_kernels.testing import DTYPE_NAMES, DTYPES, isa_refusal, moved, random_case, same_bits, table_row

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


def good_arguments():
    positional, keyword = random_case(seeded(10), 3, 4, (6,), DTYPES[1], noise="tensor", history_parent=True)
    names = ("sample", "model_output", "table", "step", "parent")
    return dict(zip(names, positional)) | keyword


def changed(name, change):
    def apply(arguments):
        arguments[name] = change(arguments[name])

    return apply


def out_of(arguments, **changes):
    out = sage_kernels.branch_step(**arguments)
    return {"out": out._replace(**{k: change(getattr(out, k)) for k, change in changes.items()})}


def same_outputs(arguments):
    out = sage_kernels.branch_step(**arguments)
    return {"out": out._replace(denoised=out.sample)}


BAD = {
    "sample dtype": (changed("sample", lambda t: t.half()), TypeError, r"sample must be float32 or bfloat16 .*got float16 \(3, 6\)"),
    "sample kind": (changed("sample", lambda t: [1.0]), TypeError, "sample must be a tensor .*got list; pass a tensor"),
    "sample scalar": (changed("sample", lambda t: t[0, 0]), ValueError, r"sample must be \[R_in, \*shape\].*sample\[None\]"),
    "output dtype": (changed("model_output", lambda t: t.double()), TypeError, "model_output must be float32 or bfloat16 or float16"),
    "output shape": (changed("model_output", lambda t: t[:, :5]), ValueError, r"model_output must be .*\[R_in, 6\].*got bfloat16 \(3, 5\)"),
    "output rows": (changed("model_output", lambda t: t[:2]), ValueError, r"got bfloat16 \(2, 6\).*R_in = 3"),
    "table width": (changed("table", lambda t: t[:, :15]), ValueError, r"table must be float32 \[rows, 16\]"),
    "table dtype": (changed("table", lambda t: t.double()), TypeError, r"table must be float32.*use table.to\(torch.float32\)"),
    "table layout": (changed("table", lambda t: t.t().contiguous().t()), ValueError, r"table must be contiguous.*table.contiguous\(\)"),
    "step dtype": (changed("step", lambda t: t.long()), TypeError, r"step must be int32 \[R_out\].*got int64 \(4,\).*torch.int32"),
    "step count": (changed("step", lambda t: t[:3]), ValueError, r"step must be .*got int32 \(3,\).*R_out = 4"),
    "step range": (changed("step", lambda t: t + 100), ValueError, r"step must be in \[0, 5\), the rows of table, got \d+ at row 0"),
    "parent dtype": (changed("parent", lambda t: t.float()), TypeError, r"parent must be int32 \[R_out\]"),
    "parent range": (changed("parent", lambda t: -t - 1), ValueError, r"parent must be in \[0, 3\), the rows of sample, got -\d at row 0"),
    "parent strided": (changed("parent", lambda t: t.repeat_interleave(2)[::2]), ValueError, "parent must be contiguous"),
    "guidance alone": (changed("uncond_output", lambda t: None), ValueError, "guidance was given without uncond_output"),
    "uncond alone": (changed("guidance", lambda t: None), ValueError, "uncond_output was given without guidance"),
    "uncond dtype": (changed("uncond_output", lambda t: t.float()), TypeError, "uncond_output must be bfloat16"),
    "guidance dtype": (changed("guidance", lambda t: t.double()), TypeError, r"guidance must be float32 \[R_out\]"),
    "guidance count": (changed("guidance", lambda t: t[:1]), ValueError, r"guidance must be .*got float32 \(1,\)"),
    "history count": (changed("history", lambda t: t + t[:1]), ValueError, "history must be at most m1, m2, m3, got 4 tensors"),
    "history dtype": (changed("history", lambda t: (t[0].bfloat16(), *t[1:])), TypeError, r"history\[0\] must be float32"),
    "history shape": (changed("history", lambda t: (*t[:2], t[2][:, :2])), ValueError, r"history\[2\] must be float32 \[R_3, 6\]"),
    "history parents": (changed("history_parent", lambda t: t[:2]), ValueError, "history_parent must be .*got 2 for 3"),
    "history range": (changed("history_parent", lambda t: (*t[:2], t[2] + 9)), ValueError, r"history_parent\[2\] must be in \[0, 6\)"),
    "history missing": (lambda a: a.update(history=(), history_parent=None), ValueError, r"reads history\[0\], which is missing"),
    "last sample": (changed("last_sample", lambda t: t[:1]), ValueError, r"last_sample must be .*got float32 \(1, 6\)"),
    "last missing": (changed("last_sample", lambda t: None), ValueError, "has u1 != 0 and reads last_sample, which is missing"),
    "noise missing": (changed("noise", lambda t: None), ValueError, "has c != 0 and reads noise or seed, which is missing"),
    "noise dtype": (changed("noise", lambda t: t.half()), TypeError, "noise must be float32"),
    "noise rows": (changed("noise", lambda t: t[:3]), ValueError, r"noise must be float32 \[R_out, 6\].*got float32 \(3, 6\)"),
    "noise twice": (lambda a: a.update(seed=torch.zeros(4, dtype=torch.int64)), ValueError, "noise and seed were both given"),
    "index alone": (lambda a: a.update(noise=None, noise_index=a["step"]), ValueError, "noise_index was given without noise"),
    "index range": (lambda a: a.update(noise_index=a["step"] + 4), ValueError, r"noise_index must be in \[0, 4\)"),
    "call alone": (lambda a: a.update(call=a["step"]), ValueError, "call was given without seed"),
    "seed dtype": (lambda a: a.update(noise=None, seed=a["step"]), TypeError, r"seed must be int64 \[R_out\]"),
    "model input": (lambda a: a.update(model_input="triple"), ValueError, "must be one of None, 'single', 'double'; got 'triple'"),
    "out flags": (lambda a: a.update(out_of(a), want_corrected=True), ValueError, "out.corrected is None but want_corrected=True"),
    "out missing": (lambda a: a.update(out_of(a, denoised=lambda t: None)), ValueError, "out.denoised is None but want_denoised=True"),
    "out kind": (lambda a: a.update(out=(None,) * 4), TypeError, "out must be a BranchStepOut, got tuple"),
    "out rows": (
        lambda a: a.update(out=sage_kernels.branch_step(**a, model_input="double"), model_input="single"),
        ValueError,
        r"out.model_input must be 4 rows for 'single', got shape \(8, 6\)",
    ),
    "out with a gradient": (
        lambda a: a.update(out_of(a, sample=torch.Tensor.requires_grad_)), ValueError, "out.sample must not require a gradient"
    ),
    "history of nothing": (changed("history", lambda t: (None, *t[1:])), TypeError, "history must be tensors, newest first, got None"),
    "out dtype": (lambda a: a.update(out_of(a, sample=torch.Tensor.double)), TypeError, "out.sample must be float32"),
    "out shape": (lambda a: a.update(out_of(a, denoised=lambda t: t[:3])), ValueError, r"out.denoised must be .*got float32 \(3, 6\)"),
    "out layout": (lambda a: a.update(out_of(a, sample=lambda t: t.t().contiguous().t())), ValueError, "out.sample must be contiguous"),
    "out shared": (lambda a: a.update(out_of(a, denoised=lambda t: a["noise"])), ValueError, "out.denoised overlaps noise"),
    "out twice": (lambda a: a.update(same_outputs(a)), ValueError, "out.denoised overlaps out.sample"),
    "gradient": (changed("noise", lambda t: t.requires_grad_()), NotImplementedError, "no gradient for noise and it requires one; call it"),
    "gradient into out": (
        lambda a: a.update(out_of(a), sample=a["sample"].requires_grad_()),
        ValueError,
        r"out must be None where a gradient is needed \(sample requires one\)",
    ),
    "backend": (lambda a: a.update(backend="gpu"), ValueError, "backend must be one of auto, reference, cpu, .*got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_explained(name):
    change, error, message = BAD[name]
    for backend in ("auto", "reference"):
        arguments = good_arguments() | {"backend": backend}
        change(arguments)
        with pytest.raises(error, match=message):
            sage_kernels.branch_step(**arguments)


def over(value, rows, elements):
    """A copy of `value`, and a float32 output [rows, elements] which starts in the same memory."""
    size = value.numel() * value.element_size()
    memory = torch.zeros(max(size, 4 * rows * elements), dtype=torch.uint8)
    copy = memory[:size].view(value.dtype).view(value.shape).copy_(value)
    return copy, memory[: 4 * rows * elements].view(torch.float32).view(rows, elements)


OVERLAPPED = {
    name: (names, i)
    for names in ("sample", "model_output", "table", "step", "parent", "uncond_output", "guidance", "history", "history_parent",
                  "last_sample", "noise", "noise_index", "seed", "call")
    for i, name in enumerate([f"{names}[{k}]" for k in range(3)] if names.startswith("history") else [names])
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLAPPED)
def test_an_output_over_any_input_is_refused(name):
    key, place = OVERLAPPED[name]
    arguments = good_arguments()
    if name == "noise_index":
        arguments["noise_index"] = torch.arange(4, dtype=torch.int32)
    if name in ("seed", "call"):
        arguments |= {"noise": None, "seed": torch.arange(4), "call": torch.arange(4, dtype=torch.int32)}
    value = arguments[key][place] if key.startswith("history") else arguments[key]
    copy, output = over(value, 4, 6)
    arguments[key] = tuple(copy if i == place else t for i, t in enumerate(arguments[key])) if key.startswith("history") else copy
    for backend in ("auto", "reference"):
        for field in ("sample", "denoised"):
            out = sage_kernels.BranchStepOut(torch.empty(4, 6), torch.empty(4, 6), None, None)._replace(**{field: output})
            with pytest.raises(ValueError, match=re.escape(f"out.{field} overlaps {name};")):
                sage_kernels.branch_step(**arguments, out=out, backend=backend)
    assert torch.equal(copy, value)


@pytest.mark.parametrize("name", ["table", "guidance", "noise"])
def test_no_gradient_goes_missing(name):
    arguments = good_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"no gradient for {name} and it requires one"):
        sage_kernels.branch_step(**arguments)
    with torch.no_grad():
        assert not sage_kernels.branch_step(**arguments).sample.requires_grad


def test_outputs_that_are_written_again_are_known_to_autograd():
    """What was saved for a backward pass must not change unseen."""
    positional, keyword = random_case(seeded(13), 3, 4, (9,))
    out = sage_kernels.branch_step(*positional, **keyword)
    weight = torch.randn(4, 9, requires_grad=True)
    loss = (weight * out.sample).sum()
    with torch.no_grad():
        sage_kernels.branch_step(*positional, **keyword, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = sage_kernels.branch_step(*positional, **keyword)
        sage_kernels.branch_step(*positional, **keyword, out=inside)


def test_forward_mode_is_refused():
    positional, keyword = random_case(seeded(14), 3, 4, (9,))
    x, rest = positional[0], positional[1:]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative and sample has a tangent"):
        torch.func.jvp(lambda x: sage_kernels.branch_step(x, *rest, **keyword).sample, (x,), (torch.ones_like(x),))
    groups = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="group_mean: there is no forward-mode derivative and rows has a tangent"):
        torch.func.jvp(lambda x: sage_kernels.group_mean(x, *groups).rows, (x,), (torch.ones_like(x),))


def test_a_gap_in_the_history_stays_a_gap():
    """The raw op may be given m2 without m1; its reference must not move it up."""
    arguments = native_arguments()
    arguments[2] = table_row(p=1.0, a=0.5, b2=0.5).expand(5, -1).contiguous()
    arguments[7] = arguments[10] = None
    results = []
    for name in ("branch_step", "branch_step_reference"):
        arguments[18:22] = [torch.full_like(t, float("nan")) for t in arguments[18:22]]
        getattr(torch.ops.sage_kernels, name)(*arguments)
        results.append(arguments[18])
    assert same_bits(*results) and not results[0].isnan().any()


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


def native_arguments():
    a = good_arguments()
    rows = [a["noise"].new_empty(4, 6) for _ in range(3)]
    model_input = torch.empty(8, 6, dtype=torch.bfloat16)
    return [
        *(a[k] for k in ("sample", "model_output", "table", "step", "parent", "uncond_output", "guidance")),
        *a["history"], *a["history_parent"], a["last_sample"], a["noise"], None, None, None, *rows, model_input,
    ]  # fmt: skip


@pytest.mark.skipif(isa_refusal("baseline") is not None, reason="no native kernels")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 6, dtype=torch.float16), "sample must be float32 or model_output's dtype"),
        (1, torch.zeros(3, 6, dtype=torch.float64), "model_output must be float32, bfloat16 or float16"),
        (1, torch.zeros(3, 5, dtype=torch.bfloat16), r"model_output must be rows like Float \(3, 6\)"),
        (1, torch.zeros(2, 6, dtype=torch.bfloat16), "model_output must be 3 rows"),
        (2, torch.zeros(5, 15), "table must be contiguous float32"),
        (3, torch.full((4,), 5, dtype=torch.int32), r"step must be in \[0, 5\), got 5 at row 0"),
        (4, torch.full((4,), -1, dtype=torch.int32), r"parent must be in \[0, 3\), got -1 at row 0"),
        (6, None, "uncond_output and guidance belong together"),
        (9, None, r"reads history\[2\], which is missing"),
        (10, torch.full((4,), 9, dtype=torch.int32), r"history_parent\[0\] must be in \[0, 4\)"),
        (14, None, "reads noise or seed, which is missing"),
        (14, torch.zeros(12, 4).t()[:4, :6], "noise must be dense within each row"),
        (18, torch.zeros(4, 5), "out.sample must be rows like"),
        (21, torch.zeros(5, 6, dtype=torch.bfloat16), "out.model_input must be 4 rows"),
    ],
)  # fmt: skip
def test_the_native_op_refuses_on_its_own(place, value, message):
    arguments = native_arguments()
    torch.ops.sage_kernels.branch_step(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sage_kernels.branch_step(*arguments)


@pytest.mark.parametrize("op", ["branch_step", "branch_step_reference"])
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.sage_kernels, op).default, tuple(native_arguments()))


@pytest.mark.parametrize(("backend", "compiler"), [("auto", "inductor"), ("reference", "aot_eager")])
def test_compiles_into_one_graph_with_the_same_bits(backend, compiler):
    def step(*positional, **keyword):
        return sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, backend=backend)

    positional, keyword = random_case(seeded(11), 3, 5, (70,), DTYPES[1])
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)
    assert all(same_bits(a, b) for a, b in zip(compiled(*positional, **keyword), step(*positional, **keyword)))
