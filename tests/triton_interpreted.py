"""The Triton kernels against their specification, by bits, in Triton's interpreter; test_triton_interpreter.py runs this.

A program takes some 30 ms there however many elements it computes, so that sizes are few programs, not few elements.
"""

import hypothesis
import numpy
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import strategies

from sage_kernels import philox, reference, triton_math, triton_ops
from sage_kernels.coefficients import COLUMNS
from sage_kernels.testing import DTYPE_NAMES, DTYPES, random_case, same_bits, table_row

pytestmark = pytest.mark.usefixtures("one_thread")
loops = pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 cannot loop over a range with NumPy 2.4",
)
NAN = float("nan")
FAR = (-1, 2**31 - 1, -(2**31))
GRADIENTS = 4  # the first arguments of branch_step_backward
MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_ops, "BLOCK", 64)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the elements of one program."""
    return lambda size: monkeypatch.setattr(triton_ops, "BLOCK", size)


def inputs_of(positional, keyword):
    """The inputs of the op, from the arguments of the public function."""
    get = keyword.get
    history, index = ((*(get(name) or ()), None, None, None)[:3] for name in ("history", "history_parent"))
    rest = (get(name) for name in ("last_sample", "noise", "noise_index", "seed", "call"))
    return (*positional, get("uncond_output"), get("guidance"), *history, *index, *rest)


def run_step(positional, keyword, corrected=True, copies=2, denoised=True):
    """(x', m0 or None, xc or None, model input or None) of the kernel, in memory that held NaN."""
    sample, model_output, rows = positional[0], positional[1], len(positional[4])
    state = (sample, rows)
    like = [state, state if denoised else None, state if corrected else None, (model_output, copies * rows) if copies else None]
    out = [None if t is None else t[0].new_full((t[1], *sample.shape[1:]), NAN) for t in like]
    triton_ops.branch_step(*inputs_of(positional, keyword), *out)
    return out


def assert_step(positional, keyword, corrected=True, copies=2, denoised=True):
    wanted = list(reference.branch_step(*positional, **keyword))
    wanted[1] = wanted[1] if denoised else None
    wanted[2] = wanted[2] if corrected else None
    wanted[3] = torch.cat([wanted[3]] * copies) if copies else None
    got = run_step(positional, keyword, corrected, copies, denoised)
    for name, a, b in zip(("x'", "m0", "xc", "model input"), got, wanted):
        assert same_bits(a, b), name
    return got


NOISES = ("seed", "tensor", "indexed", "seed", None)


@pytest.mark.parametrize("elements", [1, 7, 64, 4099])
@pytest.mark.parametrize("rows_out", [0, 1, 3, 33])
def test_branch_step_equals_the_reference(blocks, rows_out, elements):
    blocks(8192 if rows_out == 33 else 2048)
    for seed, (dtypes, noise) in enumerate(zip(DTYPES, NOISES)):
        options = {"guided": seed != 1, "noise": noise, "history_parent": seed % 2 == 0}
        assert_step(*random_case(seeded(seed), 3, rows_out, (elements,), dtypes, **options))


@hypothesis.settings(max_examples=500, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    strategies.integers(0, 2**31),
    strategies.integers(1, 4),
    strategies.integers(0, 4),
    strategies.integers(1, 100),
    strategies.sampled_from(DTYPES),
    strategies.sampled_from(["seed", "tensor", "indexed", None]),
    strategies.sampled_from([0, 1, 2]),
    strategies.tuples(*[strategies.booleans()] * 5),
)
def test_random_steps_equal_the_reference(seed, rows_in, rows_out, elements, dtypes, noise, copies, flags):
    guided, denoised, corrected, corrector, history_parent = flags
    options = {"guided": guided, "noise": noise, "corrector": corrector, "history_parent": history_parent}
    assert_step(*random_case(seeded(seed), rows_in, rows_out, (elements,), dtypes, **options), corrected, copies, denoised)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_NAMES)
def test_every_value_of_a_small_dtype_is_read_and_rounded_alike(blocks, dtypes):
    """All 65536 bit patterns in, and a scale that reaches subnormals, overflow and ties on the way out."""
    blocks(2**16)
    model, state = dtypes
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    y = patterns.to(torch.int16).view(model)[None] if model.itemsize == 2 else (patterns << 16).view(torch.float32)[None]
    zero = torch.zeros(1, dtype=torch.int32)
    for scale in (1.0, 1.0 / 3, 1e-6, 100.0):
        assert_step((torch.zeros(1, 2**16, dtype=state), y, table_row(q=scale, b0=1.0), zero, zero), {})


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_to_the_nearest_even(blocks, model):
    """Ties, their neighbours, and float32 bit patterns at random, infinities and NaN among them."""
    blocks(2**16)
    patterns = torch.randint(-(2**31), 2**31, (2**14,), generator=seeded(0))
    shift = 16 if model == torch.bfloat16 else 13
    ties = (patterns >> shift << shift) + (1 << (shift - 1))
    x = torch.cat([patterns, ties, ties - 1, ties + 1]).to(torch.int32).view(torch.float32)[None]
    zero = torch.zeros(1, dtype=torch.int32)
    assert_step((x, torch.zeros_like(x, dtype=model), table_row(a=1.0), zero, zero), {})


def test_zeros_infinities_and_subnormals_keep_their_bits(blocks):
    blocks(128)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 3e38, float("inf"), -float("inf"), NAN])
    x, y = (t.flatten()[None].contiguous() for t in torch.meshgrid(special, special, indexing="ij"))
    zero = torch.zeros(1, dtype=torch.int32)
    guided = {"uncond_output": x.flip(1), "guidance": torch.tensor([1.5])}
    rows = [{"p": 1.0, "q": 1.0, "a": 1.0, "b0": -1.0}, {"p": 1.0, "a": -1.0, "s": -1.0}, {"q": -0.5, "b0": 2.0, "a": 0.5, "clip": 1.0}]
    for row in (*rows, {"p": 1.0, "a": 1.0, "clip": 0.0}, {"p": float("inf"), "s": NAN, "clip": NAN}):
        for keyword in ({}, guided):
            assert_step((x, y, table_row(**row), zero, zero), keyword)


def every_second(t):
    return torch.stack([t, torch.full_like(t, NAN)], 1).flatten(0, 1)[::2]


def odd_offset(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)


@pytest.mark.parametrize("move", [every_second, odd_offset])
def test_rows_may_lie_anywhere(move):
    for dtypes in DTYPES[:3]:
        positional, keyword = random_case(seeded(0), 4, 3, (3, 11), dtypes, noise="indexed", history_parent=True)
        expected = run_step(positional, keyword)
        moved = {name: move(keyword[name]) for name in ("uncond_output", "last_sample", "noise")}
        moved["history"] = tuple(move(m) for m in keyword["history"])
        got = run_step((move(positional[0]), move(positional[1]), *positional[2:]), keyword | moved)
        assert all(same_bits(a, b) for a, b in zip(got, expected))


def test_equal_parents_and_broadcast_rows():
    positional, keyword = random_case(seeded(1), 3, 5, (65,))
    assert_step((*positional[:4], torch.full((5,), 2, dtype=torch.int32)), keyword)
    assert_step((positional[0][:1].expand(3, 65), *positional[1:]), keyword)


@pytest.mark.parametrize(
    ("name", "readers"),
    [("last_sample", "u1"), ("m1", "u3 b1 u4 b2 u5"), ("m2", "u4 b2 u5"), ("m3", "u5"), ("noise", "c")],
)
def test_a_missing_input_gives_nan_where_it_is_needed(name, readers):
    positional, keyword = random_case(seeded(3), 3, 4, (20,))
    for column in readers.split():
        positional[2][:, COLUMNS.index(column)] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    positional[2][:, COLUMNS.index("a")] = 1.0
    positional[3].copy_(torch.tensor([0, 1, 2, 3]))
    if name == "noise":
        del keyword["seed"], keyword["call"]
    elif name == "last_sample":
        del keyword[name]
    else:
        keyword["history"] = keyword["history"][: int(name[1]) - 1]
    next_sample = assert_step(positional, keyword)[0]
    assert next_sample[1::2].isnan().all() and not next_sample[::2].isnan().any()


@pytest.mark.parametrize("name", ["step", "parent", "m1", "m2", "m3", "noise_index"])
def test_an_index_out_of_range_spoils_its_own_row_alone(name):
    positional, keyword = random_case(seeded(4), 3, 5, (20,), noise="indexed", history_parent=True)
    positional = (*positional[:2], positional[2].abs() + 0.1, *positional[3:])  # every row reads everything
    expected = run_step(positional, keyword, copies=1)
    indices = {"step": positional[3], "parent": positional[4], "noise_index": keyword["noise_index"]}
    index = (indices | dict(zip(("m1", "m2", "m3"), keyword["history_parent"])))[name]
    bound = {"step": 5, "parent": 3, "m1": 4, "m2": 5, "m3": 6, "noise_index": 3}[name]
    for row, value in enumerate((*FAR, bound)):
        index[row] = value
    got = run_step(positional, keyword, copies=1)
    assert got[0][:4].isnan().all() and got[3][:4].isnan().all()
    assert got[1][:4].isnan().all() == (name in ("step", "parent"))
    assert all(same_bits(a[4], b[4]) for a, b in zip(got, expected))


def test_zero_coefficients_never_read_their_input():
    nan = torch.full((1, 40), NAN)
    x, y = (torch.randn(1, 40, generator=seeded(i)) for i in range(2))
    zero = torch.zeros(1, dtype=torch.int32)
    extra = {"history": (nan, nan, nan), "last_sample": nan, "noise": nan}
    assert_step((x, y, table_row(p=0.5, q=0.5, a=0.7, b0=0.1), zero, zero), extra)
    assert_step((nan, y, table_row(q=1.0, b0=0.5, u0=0.0), zero, zero), extra)
    assert_step((x, nan, table_row(p=1.0, a=2.0), zero, zero), extra)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 64, 65, 4099])
def test_normals_equal_the_reference(blocks, n):
    blocks(64 if n < 100 else 2048)
    seed, call = torch.tensor([3, -(2**63), 2**63 - 1]), torch.tensor([0, -1, 2**31 - 1], dtype=torch.int32)
    for tag in (0, 5, 2**31, 2**32 - 1):
        out = torch.full((3, n), NAN)
        triton_ops.normals(seed, call, tag, out)
        assert same_bits(out, philox.normals(seed, call, n, tag=tag))
    triton_ops.normals(seed[:0], call[:0], 0, torch.empty(0, n))


@triton.jit
def _box_muller_kernel(words, radius, cosine, sine, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(words + i).to(tl.uint32)
    c, s = triton_math.cos_sin(word)
    tl.store(radius + i, triton_math.radius(word))
    tl.store(cosine + i, c)
    tl.store(sine + i, s)


def test_extreme_words():
    """Both ends of the uniform, both sides of every quadrant's border, and words at random."""
    ends = torch.cat([torch.arange(300), 2**32 - 1 - torch.arange(300), torch.tensor([2**24 - 1, 2**24, 2**31])])
    borders = (torch.arange(0, 9)[:, None] * 2**29 + torch.arange(-3, 4)).flatten() % 2**32
    words = torch.cat([ends, borders, torch.randint(2**32, (2**14,), generator=seeded(0))])[: 2**14]
    got = [torch.full((2**14,), NAN) for _ in range(3)]
    _box_muller_kernel[(1,)](words, *got, BLOCK=2**14)
    wanted = (philox._radius(words), *philox._cos_sin(words))
    assert all(same_bits(a, b) for a, b in zip(got, wanted))


@triton.jit
def _normals_kernel(seed, call, start, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), triton_math.normals(tl.load(seed), tl.load(call), 7, tl.load(start), BLOCK))


@pytest.mark.parametrize("start", [2**33 - 64, 2**34 - 64, 2**34, 2**40 + 64])
def test_elements_beyond_the_low_counter_word(start):
    seed, call, out = torch.tensor([-5]), torch.tensor([9], dtype=torch.int32), torch.full((64,), NAN)
    _normals_kernel[(1,)](seed, call, torch.tensor([start]), out, BLOCK=64)
    j = torch.arange(start // 4, start // 4 + 16)
    key = [torch.full_like(j, word) for word in (-5 & (2**32 - 1), 2**32 - 1)]
    words = philox.philox4x32(key, (j & (2**32 - 1), j >> 32, torch.full_like(j, 9), torch.full_like(j, 7)))
    pairs = (*philox._pair(*words[:2], torch.float32), *philox._pair(*words[2:], torch.float32))
    assert same_bits(out, torch.stack(pairs, -1).flatten())


def segments(index, rows):
    """indptr and children: the places of `index` by their value."""
    counts = torch.bincount(index.long(), minlength=rows)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return indptr, torch.argsort(index.long(), stable=True).int()


def backward_case(seed, rows_in, rows_out, elements, dtypes, guided=True, halves=2, index=None):
    """Arguments of branch_step_backward but its outputs; the children of the parents, or those of another index."""
    generator = seeded(seed)
    positional, keyword = random_case(generator, rows_in, rows_out, (elements,), dtypes, guided=guided)
    sample, model_output, table, step, parent = positional
    draw = lambda rows, like: torch.randn(rows, elements, generator=generator).to(like.dtype)  # noqa: E731
    grads = [draw(rows_out, sample), draw(rows_out, sample), draw(rows_out, sample), draw(halves * rows_out, model_output)]
    indptr, children = segments(parent if index is None else index, rows_in if index is None else int(index.max()) + 1)
    uncond, guidance = keyword.get("uncond_output"), keyword.get("guidance")
    return [*grads, table, step, parent, sample, model_output, uncond, guidance, indptr, children]


def run_backward(arguments, wanted=(True,) * 7):
    sample, model_output, rows = arguments[7], arguments[8], len(arguments[11]) - 1
    like = (sample, model_output, model_output, sample, sample, sample, sample)
    out = [t.new_full((rows, *sample.shape[1:]), NAN) if want else None for t, want in zip(like, wanted)]
    triton_ops.branch_step_backward(*arguments, *out)
    return out


def assert_backward(arguments, wanted=(True,) * 7):
    expected = reference.branch_step_backward(tuple(arguments[:GRADIENTS]), *arguments[GRADIENTS:])
    for i, (got, want) in enumerate(zip(run_backward(arguments, wanted), expected)):
        assert got is None or same_bits(got, want), f"output {i}"


@loops
@pytest.mark.parametrize("elements", [1, 7, 64, 4099])
@pytest.mark.parametrize("rows_out", [0, 1, 3, 33])
def test_backward_equals_the_reference(blocks, rows_out, elements):
    blocks(8192 if rows_out == 33 else 2048)
    for seed, dtypes in enumerate(DTYPES):
        assert_backward(backward_case(seed, 3, rows_out, elements, dtypes, guided=seed != 1, halves=1 + seed % 2))


@loops
@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    strategies.integers(0, 2**31),
    strategies.integers(1, 3),
    strategies.integers(0, 5),
    strategies.integers(1, 70),
    strategies.sampled_from(DTYPES),
    strategies.booleans(),
    strategies.integers(1, 2),
    strategies.tuples(*[strategies.booleans()] * GRADIENTS),
    strategies.tuples(*[strategies.booleans()] * 7),
)
def test_random_gradients_equal_the_reference(seed, rows_in, rows_out, elements, dtypes, guided, halves, given, wanted):
    arguments = backward_case(seed, rows_in, rows_out, elements, dtypes, guided, halves)
    arguments[:GRADIENTS] = [g if there else None for g, there in zip(arguments, given)]
    assert_backward(arguments, wanted)


@loops
def test_backward_over_another_index_and_other_rows():
    """The rows of an older history tensor, one of which nobody reads; x and y are still those of the parents."""
    index = torch.tensor([3, 0, 3, 1, 3], dtype=torch.int32)
    arguments = backward_case(5, 2, 5, 30, DTYPES[1], index=index)
    assert_backward(arguments, (False,) * 4 + (True,) * 3)
    for place in (7, 8, 9):
        arguments[place] = every_second(arguments[place])
    assert_backward(arguments)


@loops
def test_backward_passes_special_values_on():
    arguments = backward_case(6, 2, 4, 33, DTYPES[0])
    for place, value in ((0, NAN), (1, float("inf")), (2, -0.0), (7, NAN), (8, float("inf"))):
        arguments[place][:, place::5] = value
    assert_backward(arguments)


@loops
@pytest.mark.parametrize("place", [5, 6, 11, 12], ids=["step", "parent", "indptr", "children"])
def test_backward_reads_nothing_out_of_range(place):
    for value in FAR:
        arguments = backward_case(7, 2, 4, 9, DTYPES[0])
        arguments[2] = None
        arguments[11], arguments[12] = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([1, 3, 0, 2], dtype=torch.int32)
        expected = run_backward(arguments)
        if place == 11:
            arguments[place] = torch.tensor([0, 2, 5] if value > 0 else [-1, 0, 4], dtype=torch.int32)
        else:
            arguments[place][2] = value
        got = run_backward(arguments)
        spoilt = 0 if (place == 11 and value < 0) else 1
        assert all(t[spoilt].isnan().all() for t in got)
        assert place == 11 or all(same_bits(a[0], b[0]) for a, b in zip(got, expected))


def run_mean(rows, indptr, members, mask=None):
    groups = len(indptr) - 1
    out = rows.new_full((groups, *rows.shape[1:]), NAN)
    union = None if mask is None else mask.new_full((groups, *mask.shape[1:]), 1)
    triton_ops.group_mean(rows, indptr, members, mask, out, union)
    return out, union


def assert_mean(rows, indptr, members, mask=None):
    for got, want in zip(run_mean(rows, indptr, members, mask), reference.group_mean(rows, indptr, members, mask)):
        assert same_bits(got, want)


def mean_case(seed, batch, groups, elements, dtype, mask_dtype=None, mask_elements=0):
    generator = seeded(seed)
    group = torch.randint(groups, (batch,), generator=generator, dtype=torch.int32)
    mask = None
    if mask_dtype is not None:
        mask = (torch.randn(batch, mask_elements, generator=generator) * 2).abs().to(mask_dtype)
        if mask_dtype in (torch.int32, torch.int64):
            mask -= 3
    rows = torch.randn(batch, elements, generator=generator, dtype=torch.float64).to(dtype)
    return rows, *segments(group, groups), mask


@loops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_group_mean_equals_the_reference(blocks, dtype):
    blocks(1024)
    for seed, (elements, masked) in enumerate(((1, 77), (7, 1), (64, 2049), (2049, 0), (0, 3))):
        for batch, groups in ((1, 1), (5, 3)):
            assert_mean(*mean_case(seed, batch, groups, elements, dtype, MASKS[seed], masked))


@loops
def test_groups_without_members_and_no_groups_at_all():
    rows, indptr, members, mask = mean_case(0, 0, 2, 9, torch.float32, torch.int32, 3)
    assert_mean(rows, indptr, members, mask)
    assert_mean(rows, indptr[:1], members, mask)


@loops
@pytest.mark.parametrize("mask_dtype", MASKS)
def test_unions_equal_the_reference(mask_dtype):
    assert_mean(*mean_case(2, 6, 3, 20, torch.float32, mask_dtype, 13))


@loops
@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    strategies.integers(0, 2**31),
    strategies.integers(1, 8),
    strategies.integers(1, 4),
    strategies.integers(1, 100),
    strategies.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    strategies.sampled_from([None, *MASKS]),
    strategies.integers(1, 100),
)
def test_random_means_equal_the_reference(seed, batch, groups, elements, dtype, mask_dtype, mask_elements):
    assert_mean(*mean_case(seed, batch, groups, elements, dtype, mask_dtype, mask_elements))


@loops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_means_of_special_values(dtype):
    """Equal rows give exactly that row, signed zeros and subnormals too; a maximum with NaN is NaN; rows may have gaps."""
    special = torch.tensor([0.0, -0.0, 1e-45, 6e-8, -1e-40, 1 / 3, 65504.0, 3e38, float("inf"), -float("inf"), NAN]).to(dtype)
    rows, indptr, members = special.expand(3, -1), torch.tensor([0, 3, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    assert_mean(rows, indptr, members)
    assert same_bits(run_mean(rows, indptr, members)[0][0], special)
    mixed = torch.cartesian_prod(special, special).t().contiguous()
    mask = torch.tensor([[1.0, NAN, 1.0, 2.0], [NAN, 1.0, 2.0, 1.0]])
    assert_mean(every_second(mixed), indptr[:2] * 2 // 3, members[:2], every_second(mask))


@loops
def test_group_mean_reads_nothing_out_of_range():
    rows, mask = torch.ones(2, 5), torch.ones(2, 3)
    indptr = torch.tensor([0, 2, 4], dtype=torch.int32)
    for bad in (*FAR, 2):
        out, union = run_mean(rows, indptr, torch.tensor([0, 1, 1, bad], dtype=torch.int32), mask)
        assert (out[0] == 1).all() and out[1].isnan().all() and (union == 1).all()
    for cut in ([0, 2, 5], [0, 2, 2**31 - 1]):
        out, union = run_mean(rows, torch.tensor(cut, dtype=torch.int32), torch.tensor([0, 1, 1, 1], dtype=torch.int32), mask)
        assert (out[0] == 1).all() and out[1].isnan().all() and (union == 1).all()
