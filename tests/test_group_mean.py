"""group_mean: against its specification by bits, and the specification against plain means."""

import hypothesis
import pytest
import torch
from hypothesis import strategies

import sage_kernels
from sage_kernels.arguments import MASK_DTYPES
from sage_kernels.testing import moved, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_mask(shape, dtype, generator):
    values = torch.randint(0, 2 if dtype == torch.bool else 7, shape, generator=generator)
    return values.to(dtype) if dtype in (torch.bool, torch.uint8) else (values - 3).to(dtype)


def random_groups(sizes, rows, generator):
    """(indptr, members) of groups of the given sizes over random rows, repeats and unused rows included."""
    indptr = torch.tensor([0, *sizes]).cumsum(0).int()
    return indptr, torch.randint(rows, (int(indptr[-1]),), generator=generator, dtype=torch.int32)


def assert_equals_reference(rows, indptr, members, mask, runner):
    expected = sage_kernels.group_mean(rows, indptr, members, mask=mask, backend="reference")
    on_device = moved((rows, indptr, members), runner.device)
    result = sage_kernels.group_mean(*on_device, mask=moved(mask, runner.device), backend=runner.backend)
    assert same_bits(moved(result.rows, "cpu"), expected.rows)
    assert mask is None or (result.mask.dtype == mask.dtype and torch.equal(moved(result.mask, "cpu"), expected.mask))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (77, 33), (3, 4, 5)], ids=str)
def test_backends_equal_the_specification(runner, dtype, shape):
    generator = seeded(len(shape) + shape[0])
    rows = (torch.randn(9, *shape, generator=generator) * 100).to(dtype)
    for sizes in ([], [1], [3, 1, 5, 2], [1] * 33, [9]):
        groups = random_groups(sizes, 9, generator)
        assert_equals_reference(rows, *groups, None, runner)
        assert_equals_reference(rows, *groups, random_mask((9, *shape[:1]), torch.int64, generator), runner)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_masks_of_every_dtype_are_united(runner, dtype):
    generator = seeded(1)
    rows, mask = torch.randn(6, 5, 8, generator=generator), random_mask((6, 5), dtype, generator)
    indptr, members = int32(0, 2, 3, 6), int32(4, 1, 0, 2, 3, 5)
    result = assert_equals_reference(rows, indptr, members, mask, runner)
    for i, group in enumerate(([4, 1], [0], [2, 3, 5])):
        assert torch.equal(moved(result.mask[i], "cpu").double(), mask[group].double().amax(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_anywhere(runner, dtype):
    generator = seeded(2)
    rows = torch.randn(4, 24, generator=generator).to(dtype)
    groups = random_groups([2, 3], 4, generator)
    expected = sage_kernels.group_mean(rows, *groups, backend="reference").rows
    apart = torch.stack([rows, torch.full_like(rows, float("nan"))], 1).flatten(0, 1)[::2]
    shifted = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows)
    for other in (apart, shifted):
        there = torch.empty_strided(other.shape, other.stride(), dtype=dtype, device=runner.device)
        there = moved(other, runner.device) if runner.device == "cpu" else there.copy_(other)
        result = sage_kernels.group_mean(there, *moved(groups, runner.device), backend=runner.backend)
        assert same_bits(moved(result.rows, "cpu"), expected)


@pytest.mark.deep
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    strategies.integers(0, 2**31),
    strategies.integers(1, 9),
    strategies.lists(strategies.integers(1, 6), max_size=9),
    strategies.lists(strategies.integers(1, 12), max_size=3),
    strategies.sampled_from(DTYPES),
    strategies.sampled_from([None, *MASK_DTYPES]),
)
def test_random_groups_equal_the_specification(seed, count, sizes, shape, dtype, mask_dtype):
    generator = seeded(seed)
    rows = torch.randn(count, *shape, generator=generator).to(dtype)
    mask = None if mask_dtype is None else random_mask((count, 11), mask_dtype, generator)
    groups = random_groups(sizes, count, generator)
    expected, result = (sage_kernels.group_mean(rows, *groups, mask=mask, backend=backend) for backend in ("reference", "auto"))
    assert same_bits(result.rows, expected.rows) and (mask is None or torch.equal(result.mask, expected.mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_equal_rows_is_that_row(runner, dtype):
    row = torch.cat([torch.randn(1, 50, generator=seeded(3)) / 3, torch.tensor([[0.0, -0.0, float("inf"), 6e-8, 65504.0]])], 1).to(dtype)
    for count in (1, 2, 3, 7, 49):
        rows, groups = row.repeat(count, 1).to(runner.device), (int32(0, count), torch.arange(count, dtype=torch.int32))
        result = sage_kernels.group_mean(rows, *moved(groups, runner.device), backend=runner.backend).rows
        assert same_bits(moved(result, "cpu"), row)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("indptr", "members"), [((0, 2, 5), (0, 1, 2, 9, 0)), ((0, 2, 5), (0, 1, 2, -1, 0)), ((0, 2, 99), (0, 1, 2, 3, 0)), ((0, 2, 2), (0, 1))]
)
def test_bad_groups_on_a_device_are_nan_and_leave_the_others_alone(backend, indptr, members):
    if not torch.cuda.is_available() or sage_kernels.backends.available()[backend]:
        pytest.skip(f"{backend} does not run here")
    rows, mask = torch.randn(4, 40, generator=seeded(7)), torch.eye(4).bool()
    on_device = moved((rows, int32(*indptr), int32(*members)), "cuda")
    result = moved(sage_kernels.group_mean(*on_device, mask=mask.cuda(), backend=backend), "cpu")
    assert result.rows[1].isnan().all() and same_bits(result.rows[0], rows[:2].double().mean(0).float())
    assert result.mask[0].tolist() == [True, True, False, False] and not result.mask[1, 1]


def test_unions_of_equal_values_keep_the_first_and_nan_stays(runner):
    nan, mask = float("nan"), torch.tensor([[0.0, -0.0, 1.0], [-0.0, 0.0, float("nan")], [1.0, -1.0, 5.0]]).repeat(1, 11)
    groups = int32(0, 2, 3), int32(0, 1, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.zeros(3, 2)
        expected = sage_kernels.group_mean(rows, *groups, mask=mask.to(dtype), backend="reference").mask
        on_device = moved((rows, *groups), runner.device)
        result = sage_kernels.group_mean(*on_device, mask=mask.to(dtype).to(runner.device), backend=runner.backend).mask
        assert same_bits(moved(result, "cpu"), expected)
        assert same_bits(expected[0, :3], torch.tensor([0.0, -0.0, nan], dtype=dtype))


def test_the_specification_is_the_mean():
    rows = torch.randn(12, 5, generator=seeded(4), dtype=torch.float64)
    groups = int32(0, 4, 5, 12), torch.randperm(12, generator=seeded(5)).int()
    result = sage_kernels.group_mean(rows, *groups, backend="reference").rows
    for i, (first, last) in enumerate(((0, 4), (4, 5), (5, 12))):
        assert torch.allclose(result[i], rows[groups[1][first:last].long()].mean(0), rtol=1e-15)


def test_gradient_is_shared_among_the_members():
    rows = torch.randn(5, 3, generator=seeded(6), dtype=torch.float64, requires_grad=True)
    groups = int32(0, 2, 5), int32(4, 1, 0, 1, 3)
    assert torch.autograd.gradcheck(lambda r: sage_kernels.group_mean(r, *groups).rows, rows)
    (grad,) = torch.autograd.grad(sage_kernels.group_mean(rows, *groups).rows[1].sum(), rows)
    assert torch.equal(grad, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0], dtype=torch.float64)[:, None].expand(5, 3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(backend, masked):
    rows, mask = torch.randn(4, 6, requires_grad=True), torch.eye(4).bool() if masked else None
    groups = int32(0, 3, 4), int32(3, 0, 1, 2)
    torch.library.opcheck(torch.ops.sage_kernels.group_mean_functional.default, (rows, *groups, mask, backend))
    out, union = torch.empty(2, 6), torch.empty(2, 4, dtype=torch.bool) if masked else None
    name = "group_mean" if backend == "auto" else "group_mean_reference"
    torch.library.opcheck(getattr(torch.ops.sage_kernels, name).default, (rows.detach(), *groups, mask, out, union))


def test_compiles_into_one_graph():
    rows, groups, mask = torch.randn(4, 6), (int32(0, 3, 4), int32(3, 0, 1, 2)), torch.eye(4).bool()
    compiled = torch.compile(lambda r: sage_kernels.group_mean(r, *groups, mask=mask), fullgraph=True, backend="aot_eager")
    assert all(same_bits(a.float(), b.float()) for a, b in zip(compiled(rows), sage_kernels.group_mean(rows, *groups, mask=mask)))


GOOD = {"rows": torch.randn(4, 6), "indptr": int32(0, 3, 4), "members": int32(3, 0, 1, 2), "mask": torch.eye(4).bool()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.zeros(4, 6).int()}, TypeError, "group_mean: rows must be float64 or float32 or bfloat16 or float16"),
        ({"rows": torch.zeros(())}, TypeError, "group_mean: rows must be a tensor of float64"),
        ({"rows": [1.0]}, TypeError, "group_mean: rows must be .*got list; pass a tensor"),
        ({"indptr": torch.tensor([0, 3, 4])}, TypeError, r"group_mean: indptr must be int32 \[R \+ 1\].*got int64 \(3,\)"),
        ({"indptr": int32()}, ValueError, "group_mean: indptr must be at least one value"),
        ({"indptr": int32(0, 3, 3, 4)}, ValueError, r"indptr must be ascending from 0 to len\(members\) = 4, no group empty, got \[0, 3, 3, 4\]"),
        ({"indptr": int32(0, 3)}, ValueError, r"indptr must be ascending from 0 to len\(members\) = 4"),
        ({"indptr": int32(1, 4)}, ValueError, "indptr must be ascending from 0"),
        ({"members": int32(0, 1, 2, 4)}, ValueError, r"members must be in \[0, 4\), the rows of rows, got 4 at 3"),
        ({"members": int32(0, -1, 2, 3)}, ValueError, "members must be in .*got -1 at 1"),
        ({"members": int32(3, 3, 0, 0, 1, 1, 2, 2)[::2]}, ValueError, "members must be contiguous"),
        ({"mask": torch.zeros(3, 2)}, ValueError, r"mask must be .*got float32 \(3, 2\)"),
        ({"mask": torch.zeros(4, 2, dtype=torch.complex64)}, TypeError, "mask must be bool or uint8 or int32"),
        ({"mask": torch.rand(4, 2, requires_grad=True)}, NotImplementedError, "group_mean: there is no gradient for mask"),
        ({"backend": "rocm"}, ValueError, "backend must be one of auto, reference, cpu"),
    ],
)
def test_bad_arguments_are_explained(change, error, message):
    with pytest.raises(error, match=message):
        sage_kernels.group_mean(**GOOD | change)
