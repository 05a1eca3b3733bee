"""The Triton kernels. Specification: sage_kernels/reference.py; launchers: sage_kernels/triton_ops.py.

A program computes BLOCK elements of one output row. Rows run fastest over the programs, so that the children of one parent
read it at the same time, out of the L2 cache. An absent input or output is None, which Triton sees when it compiles.

Addresses are int64. Scalars that say how many rows there are do not take part in specialisation: they vary, and nothing is
gained. Strides and lengths do: 128-bit loads need to know that they are multiples of 16.
"""

import triton
import triton.language as tl

from sage_kernels.triton_math import (
    clamp,
    coefficients,
    guided,
    index_of,
    load_row,
    normals,
    product,
    rounded,
    store_row,
    term,
    widened,
)


@triton.jit
def place(rows, BLOCK: tl.constexpr):
    """Row and first element of this program."""
    program = tl.program_id(0)
    return (program % rows).to(tl.int64), (program // rows).to(tl.int64) * BLOCK


@triton.jit(do_not_specialize=["rows", "rows_in", "table_rows", "m1_rows", "m2_rows", "m3_rows", "noise_rows"])
def branch_step_kernel(
    sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, m1_parent, m2_parent, m3_parent,
    last_sample, noise, noise_index, seed, call, next_sample, denoised, corrected, model_input,
    sample_stride, output_stride, uncond_stride, m1_stride, m2_stride, m3_stride, last_stride, noise_stride,
    n, rows, rows_in, table_rows, m1_rows, m2_rows, m3_rows, noise_rows,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r, start = place(rows, BLOCK)
    offset = tl.arange(0, BLOCK)
    limit = n - start
    zero = tl.zeros([BLOCK], tl.float32)

    i = tl.load(parent + r).to(tl.int64)
    x = load_row(sample, sample_stride, i, rows_in, start, offset, limit)
    y = load_row(model_output, output_stride, i, rows_in, start, offset, limit)
    if uncond_output is not None:
        y = guided(y, load_row(uncond_output, uncond_stride, i, rows_in, start, offset, limit), tl.load(guidance + r))

    k = tl.load(step + r).to(tl.int64)
    p, q, u0, u1, u2, u3, u4, u5, a, b0, b1, b2, e, c, s, clip = coefficients(table, k, table_rows)
    # Where its coefficient is 0 an input is not read; x and y, which every solver reads, do not wait for the table.
    i1, i2, i3 = index_of(m1_parent, r, i), index_of(m2_parent, r, i), index_of(m3_parent, r, i)
    last = load_row(last_sample, last_stride, i, rows_in, start, offset, tl.where(u1 != 0.0, limit, 0))
    h1 = load_row(m1, m1_stride, i1, m1_rows, start, offset, tl.where((u3 != 0.0) | (b1 != 0.0), limit, 0))
    h2 = load_row(m2, m2_stride, i2, m2_rows, start, offset, tl.where((u4 != 0.0) | (b2 != 0.0), limit, 0))
    h3 = load_row(m3, m3_stride, i3, m3_rows, start, offset, tl.where(u5 != 0.0, limit, 0))

    m0 = clamp(term(term(zero, p, x), q, y), clip)
    xc = term(term(term(zero, u0, x), u1, last), u2, m0)
    xc = term(term(term(xc, u3, h1), u4, h2), u5, h3)
    following = term(term(term(term(term(zero, a, xc), b0, m0), b1, h1), b2, h2), e, y)
    if seed is None:
        drawn = load_row(noise, noise_stride, index_of(noise_index, r, r), noise_rows, start, offset, tl.where(c != 0.0, limit, 0))
        following = term(following, c, drawn)
    elif c != 0.0:
        following += product(c, normals(tl.load(seed + r), index_of(call, r, k), 0, start, BLOCK))

    store_row(next_sample, n, r, start, offset, limit, following)
    store_row(denoised, n, r, start, offset, limit, m0)
    store_row(corrected, n, r, start, offset, limit, xc)
    if COPIES > 0:
        scaled = s * following
        store_row(model_input, n, r, start, offset, limit, scaled)
        if COPIES > 1:
            store_row(model_input, n, r + rows, start, offset, limit, scaled)


@triton.jit(do_not_specialize=["tag", "rows"])
def normals_kernel(seed, call, tag, out, n, rows, BLOCK: tl.constexpr):
    r, start = place(rows, BLOCK)
    offset = tl.arange(0, BLOCK)
    value = normals(tl.load(seed + r), tl.load(call + r), tag, start, BLOCK)
    store_row(out, n, r, start, offset, n - start, value)


@triton.jit
def members_of(indptr, i, count):
    """The segment indptr[i] ... indptr[i + 1] within [0, count), and whether it had to be cut."""
    first, end = tl.load(indptr + i), tl.load(indptr + i + 1)
    return tl.maximum(first, 0), tl.minimum(end, count), (first < 0) | (end > count)


@triton.jit
def gradient(rows, n, row, count, start, offset, limit):
    """As `load_row`; 0 without `rows`."""
    if rows is None:
        return tl.zeros(offset.shape, tl.float32)
    else:
        return load_row(rows, n, row, count, start, offset, limit)


@triton.jit(do_not_specialize=["rows", "rows_in", "rows_out", "table_rows"])
def branch_step_backward_kernel(
    grad_sample, grad_denoised, grad_corrected, grad_model_input, table, step, parent, sample, model_output, uncond_output,
    guidance, indptr, children, d_sample, d_model_output, d_uncond_output, d_last_sample, d_m1, d_m2, d_m3,
    sample_stride, output_stride, uncond_stride, n, rows, rows_in, rows_out, table_rows,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, start = place(rows, BLOCK)
    offset = tl.arange(0, BLOCK)
    limit = n - start
    zero = tl.zeros([BLOCK], tl.float32)
    first, end, cut = members_of(indptr, i, rows_out)
    total = tl.where(cut, float("nan"), zero)
    to_x, to_cond, to_uncond, to_last, to_m1, to_m2, to_m3 = total, total, total, total, total, total, total

    for j in range(first, end):
        r = tl.load(children + j).to(tl.int64)
        there = (r >= 0) & (r < rows_out)
        source = tl.load(parent + r, there, other=-1).to(tl.int64)
        k = tl.load(step + r, there & (source >= 0) & (source < rows_in), other=-1).to(tl.int64)
        p, q, u0, u1, u2, u3, u4, u5, a, b0, b1, b2, e, _, s, clip = coefficients(table, k, table_rows)
        g = 1.0
        if guidance is not None:
            g = tl.load(guidance + r, there, other=float("nan"))

        g_input = gradient(grad_model_input, n, r, rows_out, start, offset, limit)
        if COPIES > 1:
            g_input += gradient(grad_model_input, n, r + rows_out, 2 * rows_out, start, offset, limit)
        at_next = term(zero + gradient(grad_sample, n, r, rows_out, start, offset, limit), s, g_input)
        at_corrected = term(zero + gradient(grad_corrected, n, r, rows_out, start, offset, limit), a, at_next)
        at_denoised = zero + gradient(grad_denoised, n, r, rows_out, start, offset, limit)
        at_denoised = term(term(at_denoised, b0, at_next), u2, at_corrected)

        clamped = tl.where(clip < float("inf"), limit, 0)  # without a clamp neither x nor y is read
        x = load_row(sample, sample_stride, source, rows_in, start, offset, clamped)
        y = load_row(model_output, output_stride, source, rows_in, start, offset, clamped)
        if uncond_output is not None:
            y = guided(y, load_row(uncond_output, uncond_stride, source, rows_in, start, offset, clamped), g)
        stored = term(term(zero, p, x), q, y)
        at_denoised = tl.where((stored > clip) | (stored < clip * -1.0), 0.0, at_denoised)

        at_output = term(term(zero, q, at_denoised), e, at_next)
        at_cond = at_output
        if guidance is not None:
            at_cond = product(g, at_output)
        to_x += term(term(zero, p, at_denoised), u0, at_corrected)
        to_cond += at_cond
        to_uncond += at_output - at_cond
        to_last += term(zero, u1, at_corrected)
        to_m1 += term(term(zero, u3, at_corrected), b1, at_next)
        to_m2 += term(term(zero, u4, at_corrected), b2, at_next)
        to_m3 += term(zero, u5, at_corrected)

    store_row(d_sample, n, i, start, offset, limit, to_x)
    store_row(d_model_output, n, i, start, offset, limit, to_cond)
    store_row(d_uncond_output, n, i, start, offset, limit, to_uncond)
    store_row(d_last_sample, n, i, start, offset, limit, to_last)
    store_row(d_m1, n, i, start, offset, limit, to_m1)
    store_row(d_m2, n, i, start, offset, limit, to_m2)
    store_row(d_m3, n, i, start, offset, limit, to_m3)


@triton.jit
def mean_block(rows, stride, n, count, members, first, end, cut, out, i, start, BLOCK: tl.constexpr):
    """The mean of one group. A sum that starts at -0 equals its first member; without members it is -0 / 0, NaN."""
    offset = tl.arange(0, BLOCK)
    limit = n - start
    total = tl.zeros([BLOCK], tl.float64) * -1.0  # tl.full would make +0 of -0
    for j in range(first, end):
        row = tl.load(members + j).to(tl.int64)
        there = tl.where((row >= 0) & (row < count), limit, 0)
        value = tl.load(rows + row * stride + start + offset, offset < there, other=float("nan"))
        total += value if value.dtype == tl.float64 else widened(value).to(tl.float64)
    mean = tl.where(cut, float("nan"), total / (end - first).to(tl.float64))
    target = out + i * n + start + offset
    if out.dtype.element_ty == tl.float64:
        tl.store(target, mean, offset < limit)
    else:
        tl.store(target, rounded(mean.to(tl.float32), out.dtype.element_ty), offset < limit)


@triton.jit
def union_block(mask, stride, n, count, members, first, end, union, i, start, BLOCK: tl.constexpr):
    """The maximum of one group; 0 without members."""
    offset = tl.arange(0, BLOCK)
    limit = n - start
    best = tl.zeros([BLOCK], mask.dtype.element_ty)
    for j in range(first, end):
        row = tl.load(members + j).to(tl.int64)
        there = tl.where((row >= 0) & (row < count), limit, 0)
        value = tl.load(mask + row * stride + start + offset, offset < there, other=0)
        best = tl.where((j == first) | (value > best) | (value != value), value, best)
    tl.store(union + i * n + start + offset, best, offset < limit)


@triton.jit(do_not_specialize=["groups", "count", "member_count"])
def group_mean_kernel(
    rows, indptr, members, mask, out, union, stride, mask_stride, n, mask_n, masks_from, groups, count, member_count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs of the means come first; those from element `masks_from` on are for the unions."""
    i, start = place(groups, BLOCK)
    first, end, cut = members_of(indptr, i, member_count)
    if start < masks_from:
        mean_block(rows, stride, n, count, members, first, end, cut, out, i, start, BLOCK)
    elif mask is not None:
        union_block(mask, mask_stride, mask_n, count, members, first, end, union, i, start - masks_from, BLOCK)
