"""Device functions of the Triton kernels: arithmetic, rows in and out of memory, noise.

Specification: sage_kernels/reference.py and sage_kernels/philox.py. The same bits come out because every product and every
sum is rounded on its own, in the same order (the launchers pass enable_fp_fusion=False).
"""

import triton
import triton.language as tl
from triton.language import target_info

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# On Blackwell LLVM pairs float32 operations, and the ptxas that comes with Triton 3.6 fuses such pairs even when told not to.
FUSES_PAIRS = tl.constexpr(triton.__version__.startswith("3.6."))


@triton.jit
def product(a, b):
    """a * b, rounded on its own even if a sum follows."""
    if FUSES_PAIRS and target_info.cuda_capability_geq(10):
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def horner(y, x, c):
    return product(y, x) + c


@triton.jit
def term(total, k, value):
    """Adds the rounded product; where the coefficient k is 0, nothing, whatever `value` holds."""
    return tl.where(k != 0.0, total + product(k, value), total)


@triton.jit
def clamp(value, clip):
    """NaN passes."""
    low = clip * -1.0  # Triton's -clip is 0 - clip, which has the wrong sign at 0
    value = tl.where(value > clip, clip, value)
    return tl.where(value < low, low, value)


@triton.jit
def guided(cond, uncond, g):
    return product(cond - uncond, g) + uncond


@triton.jit
def coefficients(table, row, count):
    """One row of the table, in the order of sage_kernels.coefficients.COLUMNS; NaN if there is no such row."""
    there = (row >= 0) & (row < count)
    k, nan = table + row * 16, float("nan")
    return (
        tl.load(k, there, other=nan),
        tl.load(k + 1, there, other=nan),
        tl.load(k + 2, there, other=nan),
        tl.load(k + 3, there, other=nan),
        tl.load(k + 4, there, other=nan),
        tl.load(k + 5, there, other=nan),
        tl.load(k + 6, there, other=nan),
        tl.load(k + 7, there, other=nan),
        tl.load(k + 8, there, other=nan),
        tl.load(k + 9, there, other=nan),
        tl.load(k + 10, there, other=nan),
        tl.load(k + 11, there, other=nan),
        tl.load(k + 12, there, other=nan),
        tl.load(k + 13, there, other=nan),
        tl.load(k + 14, there, other=nan),
        tl.load(k + 15, there, other=nan),
    )


@triton.jit
def index_of(index, r, default):
    """index[r], or `default` without an index."""
    if index is None:
        return default
    else:
        return tl.load(index + r).to(tl.int64)


@triton.jit
def widened(value):
    """float32 of a float32, bfloat16 or float16 value."""
    if INTERPRETED and value.dtype == tl.bfloat16:  # whose subnormals the interpreter gets wrong
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to the nearest `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates, the hardware rounds
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def load_row(rows, stride, row, count, start, offset, limit):
    """Elements start + offset of one row, float32; NaN from `limit` on, in a row that does not exist, and without `rows`."""
    if rows is None:
        return tl.full(offset.shape, float("nan"), tl.float32)
    else:
        limit = tl.where((row >= 0) & (row < count), limit, 0)
        return widened(tl.load(rows + row * stride + start + offset, offset < limit, other=float("nan")))


@triton.jit
def store_row(rows, n, row, start, offset, limit, value):
    """Elements start + offset, up to `limit`, of one of the dense rows [n]; nothing without `rows`."""
    if rows is not None:
        tl.store(rows + row * n + start + offset, rounded(value, rows.dtype.element_ty), offset < limit)


@triton.jit
def radius(word):
    """sqrt(-2 ln u), u = (float(word) + 1) * 2^-32."""
    u = (word.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    bits = u.to(tl.int32, bitcast=True) - 0x3F330000
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F330000).to(tl.float32, bitcast=True) - 1.0
    z = product(f, f)
    y = horner(f, 7.0376836292e-2, -1.1514610310e-1)
    y = horner(y, f, 1.1676998740e-1)
    y = horner(y, f, -1.2420140846e-1)
    y = horner(y, f, 1.4249322787e-1)
    y = horner(y, f, -1.6668057665e-1)
    y = horner(y, f, 2.0000714765e-1)
    y = horner(y, f, -2.4999993993e-1)
    y = horner(y, f, 3.3333331174e-1)
    y = product(product(y, f), z)
    y = horner(exponent, -2.12194440e-4, y)
    y = horner(z, -0.5, y)
    log_u = horner(exponent, 0.693359375, f + y)
    square = log_u * -2.0
    return tl.sqrt_rn(tl.where(square > 0.0, square, 0.0))


@triton.jit
def with_sign(value, sign):
    """`value` with its sign flipped where bit 31 of `sign` is set; Triton's -value is 0 - value, which is wrong at 0."""
    return (value.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def cos_sin(word):
    """Cosine and sine of 2 pi word / 2^32: the quadrant comes from the top bits, the rest is an exact signed integer."""
    quadrant = (word + 0x20000000) >> 30
    x = product((word << 2).to(tl.int32, bitcast=True).to(tl.float32), 3.6572952e-10)
    z = product(x, x)
    s = horner(horner(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1)
    s = horner(product(s, z), x, x)
    c = horner(horner(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2)
    c = (product(product(c, z), z) + product(z, -0.5)) + 1.0
    swap = (quadrant & 1) == 1
    return with_sign(tl.where(swap, s, c), (quadrant + 1) << 30), with_sign(tl.where(swap, c, s), quadrant << 30)


@triton.jit
def normals(seed, call, tag, start, BLOCK: tl.constexpr):
    """Elements start ... start + BLOCK - 1 of the noise of (seed, call, tag); start is a multiple of BLOCK."""
    lane = tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = lane * 0
    first = start // 4  # of 64 bits: a block starts at a multiple of its length, so that lanes never carry into the high word
    j, high = lane + first.to(tl.uint32), zero + (first >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, j, high, zero + call.to(tl.uint32), (zero + tag).to(tl.uint32))
    r0, r1 = radius(w0), radius(w2)
    c0, s0 = cos_sin(w1)
    c1, s1 = cos_sin(w3)
    return tl.reshape(tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1)), [BLOCK])
