"""The noise: known answers, distribution, error, and independence from the batch."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sage_kernels
from sage_kernels import philox
from sage_kernels.testing import same_bits, table_row

pytestmark = pytest.mark.usefixtures("one_thread")
WORD = 2**32
PINNED = [
    [
        "0x1.fb76620000000p-1", "-0x1.d96d600000000p-1", "-0x1.3c373e0000000p-1",
        "-0x1.eda3640000000p-2", "-0x1.3aa6a60000000p-3", "0x1.7254d00000000p-3",
    ],
    [
        "0x1.130a2a0000000p-1", "-0x1.6c3d720000000p-3", "0x1.289fce0000000p-3",
        "-0x1.c118580000000p+0", "0x1.153e700000000p+0", "0x1.d2c5840000000p-2",
    ],
    [
        "-0x1.653a000000000p-5", "-0x1.9080860000000p+0", "-0x1.9422a60000000p-1",
        "-0x1.7652c20000000p+0", "0x1.f976500000000p-1", "-0x1.c57b5e0000000p-1",
    ],
]


def words(*values):
    return tuple(torch.tensor([v], dtype=torch.int64) for v in values)


def draw(seeds, calls, n, **options):
    seed, call = torch.tensor(seeds, dtype=torch.int64), torch.tensor(calls, dtype=torch.int32)
    return sage_kernels.normals(seed, call, n, **options)


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD - 1,) * 2, (WORD - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(key, counter, answer):
    assert tuple(int(w) for w in philox.philox4x32(words(*key), words(*counter))) == answer


def test_a_seed_means_the_same_numbers_for_ever():
    """The stream is part of the contract: a seed names a picture."""
    got = draw([0, -1, 2**63 - 1], [0, 7, -1], 6)
    assert [[value.hex() for value in row] for row in got.tolist()] == PINNED


def test_backends_equal_the_specification(runner):
    for n in (0, 1, 2, 3, 4, 5, 255, 256, 257, 4096, 4099, 70001):
        seed, call = torch.tensor([3, -(2**63), n]), torch.tensor([0, n, 2**31 - 1], dtype=torch.int32)
        expected = sage_kernels.normals(seed, call, n, tag=n * 977 % 2**32, backend="reference")
        result = sage_kernels.normals(seed.to(runner.device), call.to(runner.device), n, tag=n * 977 % 2**32, backend=runner.backend)
        assert same_bits(result.cpu(), expected)


def test_every_element_is_the_formula_with_integer_philox():
    """An independent, slow statement of the definition: Python integers and math, float64."""
    seed, call, tag = -123456789, 42, 5
    got = draw([seed], [call], 11, tag=tag)[0].double()
    for element in range(11):
        j = element // 4
        c, k = [j % WORD, j // WORD, call, tag], [seed % WORD, (seed >> 32) % WORD]
        for _ in range(10):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [second // WORD ^ c[1] ^ k[0], second % WORD, first // WORD ^ c[3] ^ k[1], first % WORD]
            k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
        pair = c[element % 4 // 2 * 2 :][:2]
        radius = math.sqrt(-2 * math.log((pair[0] + 1) / WORD))
        trigonometric = (math.cos, math.sin)[element % 2]
        assert abs(got[element] - radius * trigonometric(2 * math.pi * pair[1] / WORD)) < 2e-6


def test_error_against_float64():
    seeds, calls = list(range(40)), [0] * 40
    seed, call = torch.tensor(seeds), torch.tensor(calls, dtype=torch.int32)
    single, double = draw(seeds, calls, 50000).double(), philox.normals(seed, call, 50000, dtype=torch.float64)
    assert (single - double).abs().max() <= 6e-7


def test_extreme_words():
    """The ends of the uniform, and both sides of every quadrant's border."""
    ends = torch.tensor([0, 1, 2, 2**24 - 1, 2**24, 2**31, WORD - 257, WORD - 129, WORD - 128, WORD - 2, WORD - 1])
    u = (ends.to(torch.float32) + 1) * 2.0**-32
    radius = philox._radius(ends)
    assert radius[0] == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # the largest normal there can be: 6.66
    assert radius[-1] == 0 and not radius.isnan().any()
    assert (radius.double() - torch.sqrt(-2 * torch.log(u.double()))).abs().max() <= 6e-7
    borders = torch.arange(0, 9)[:, None] * 2**29 + torch.arange(-3, 4)
    angle = borders.flatten() % WORD
    cosine, sine = philox._cos_sin(angle)
    exact = angle.double() * (2 * math.pi / WORD)
    assert (cosine.double() - exact.cos()).abs().max() <= 1.2e-7 and (sine.double() - exact.sin()).abs().max() <= 1.2e-7


def test_distribution():
    """Moments within five standard errors, the whole curve by Kolmogorov-Smirnov, and as many in the tails as there should be."""
    n = 2_000_000
    x = draw([11], [3], n)[0].double().numpy()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt((math.prod(range(1, 2 * power, 2)) - moment**2) / n)  # E x^2k = (2k - 1)!!
        assert abs((x**power).mean() - moment) < 5 * spread
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * n
        assert abs((np.abs(x) > bound).sum() - expected) < 5 * math.sqrt(expected)
    neighbours = np.corrcoef(np.stack([x[0::4], x[1::4], x[2::4], x[3::4]]))
    assert np.abs(neighbours - np.eye(4)).max() < 5 / math.sqrt(n / 4)


def test_streams_do_not_resemble_each_other():
    n = 200_000
    same_seed = [draw([7], [call], n, tag=tag) for call, tag in ((0, 0), (1, 0), (0, 1), (256, 0))]
    near_seeds = [draw([seed], [0], n) for seed in (8, 7 + 2**32, -7)]
    correlation = np.corrcoef(torch.cat([*same_seed, *near_seeds]).double().numpy())
    assert np.abs(correlation - np.eye(7)).max() < 5.5 / math.sqrt(n)


def test_a_row_does_not_depend_on_its_batch_its_place_or_its_length():
    seeds, calls = [5, 9, 5, -2], [0, 1, 0, 4]
    whole = draw(seeds, calls, 1001)
    assert same_bits(whole[0], whole[2])
    for row in range(4):
        for n in (1, 6, 1001):
            assert same_bits(draw([seeds[row]], [calls[row]], n)[0], whole[row, :n].contiguous())


def test_branch_step_adds_exactly_these_normals():
    row = table_row(c=1.0, u0=0.0)
    seed, parent = torch.tensor([3, 1, 4]), torch.tensor([1, 0, 1], dtype=torch.int32)
    step, x = torch.zeros(3, dtype=torch.int32), torch.randn(2, 5, 13)
    call = torch.tensor([9, 9, 2], dtype=torch.int32)
    for chosen in (call, None):
        got = sage_kernels.branch_step(x, x, row, step, parent, seed=seed, call=chosen).sample
        normals = sage_kernels.normals(seed, step if chosen is None else chosen, 65)
        assert same_bits(got, normals.view(3, 5, 13) + 0.0)
        tensor = sage_kernels.branch_step(x, x, row, step, parent, noise=normals.view(3, 5, 13)).sample
        assert same_bits(got, tensor)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, r"normals: seed must be int64 \[R\]"),
        ({"seed": 3}, TypeError, "normals: seed must be .*got int; pass a tensor"),
        ({"call": torch.zeros(2)}, TypeError, r"normals: call must be int32 \[R\].*call.to\(torch.int32\)"),
        ({"call": torch.zeros(3, dtype=torch.int32)}, ValueError, r"normals: call must be .*got int32 \(3,\)"),
        ({"seed": torch.zeros(4, dtype=torch.int64)[::2]}, ValueError, r"normals: seed must be contiguous.*seed.contiguous\(\)"),
        ({"call": torch.zeros(1, dtype=torch.int32).expand(2)}, ValueError, "normals: call must be contiguous"),
        ({"n": 2.5}, TypeError, "normals: n must be an int, got float"),
        ({"n": -1}, ValueError, "normals: n must be at least 0, got -1"),
        ({"tag": 2**32}, ValueError, r"normals: tag must be in \[0, 4294967296\), got 4294967296"),
        ({"tag": -1}, ValueError, "normals: tag must be in"),
        ({"backend": "rocm"}, ValueError, "backend must be one of auto, reference, cpu"),
    ],
)
def test_bad_arguments_are_explained(change, error, message):
    arguments = {"seed": torch.zeros(2, dtype=torch.int64), "call": torch.zeros(2, dtype=torch.int32), "n": 4} | change
    with pytest.raises(error, match=message):
        sage_kernels.normals(**arguments)


@pytest.mark.parametrize("op", ["normals", "normals_reference"])
def test_opcheck(op):
    arguments = (torch.arange(3), torch.arange(3, dtype=torch.int32), 1, torch.empty(3, 9))
    torch.library.opcheck(getattr(torch.ops.sage_kernels, op).default, arguments)
