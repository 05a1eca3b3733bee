"""THE SPECIFICATION of the ops, in plain torch and without cleverness. Every backend gives these bits.

`branch_step`:

For output row r with parent p = parent[r] and table row k = table[step[r]]:

    y  = uncond[p] + g * (cond[p] - uncond[p])              classifier-free guidance (arXiv:2207.12598, eq. 6); g = guidance[r]
    m0 = clamp(p*x + q*y, -clip, +clip)                     what the solver stores: x0, velocity or derivative
    xc = u0*x + u1*L + u2*m0 + u3*m1 + u4*m2 + u5*m3        only UniPC's corrector and Heun's second stage; else xc = x
    x' = a*xc + b0*m0 + b1*m1 + b2*m2 + e*y + c*noise
    model_input = s * x'

Arithmetic is float32, unfused. A sum starts at +0 and adds its terms from left to right, each product rounded, then each sum;
a term whose coefficient is 0 is skipped, so it never reads its input (0 * NaN is NaN). Guidance is (cond - uncond) * g + uncond.
m0, xc and x' go into later terms as float32, and are rounded to the state's dtype only where they are stored; the
model input is rounded from float32 too. A clamp passes NaN on.

`branch_step_backward`: the transpose of the above, and the sum over the children of every input row.

`group_mean`: the mean of the rows of a group, and the union of their masks.
"""

import torch

from sage_kernels.coefficients import COLUMNS
from sage_kernels.philox import normals

CORRECTOR = ("u0", "u1", "u2", "u3", "u4", "u5")


def _over(values, like):
    """[R] values with a dimension for each of those that follow the first of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _gather(tensor, index, dtype):
    return tensor[index.long()].to(dtype)  # [R_out, *shape]


def _sum(terms, like):
    total = torch.zeros_like(like)
    for k, value in terms:
        total = torch.where(k != 0, total + k * value, total)
    return total


def _clamp(value, clip):
    value = torch.where(value > clip, clip, value)
    return torch.where(value < -clip, -clip, value)


def _guided(model_output, uncond_output, guidance, parent, dtype, column):
    cond = _gather(model_output, parent, dtype)
    if uncond_output is None:
        return cond
    uncond = _gather(uncond_output, parent, dtype)
    return (cond - uncond) * column(guidance) + uncond


def _noise(noise, noise_index, seed, call, step, x, dtype, missing):
    if noise is not None:
        return noise.to(dtype) if noise_index is None else _gather(noise, noise_index, dtype)
    if seed is not None:
        return normals(seed, step if call is None else call, x[0].numel() if len(x) else 0, dtype=dtype).view_as(x)
    return missing


def branch_step(
    sample,
    model_output,
    table,
    step,
    parent,
    *,
    uncond_output=None,
    guidance=None,
    history=(),
    history_parent=None,
    last_sample=None,
    noise=None,
    noise_index=None,
    seed=None,
    call=None,
    dtype=torch.float32,
):
    """One solver update with copy-on-branch; arguments as in `sage_kernels.branch_step`, which checks them.

    Args:
        dtype: float32 is the specification. float64 computes the same formula in double, from the same inputs and the
            same float32 coefficients, without rounding to any storage dtype: for checking the specification itself.

    Returns:
        (x', m0, xc, model_input), each [R_out, *shape]. With float32: x', m0 and xc in the sample's dtype, model_input in
        the model output's. With float64: all float64.

    Notes:
        A row which needs an input that was not given (history, last_sample, noise) comes out as NaN.
    """
    column = lambda values: _over(values.to(dtype), sample)  # noqa: E731   [R_out, 1, ...]
    row = dict(zip(COLUMNS, (column(k) for k in table[step.long()].unbind(1))))
    parents = (parent,) * 3 if history_parent is None else history_parent
    x = _gather(sample, parent, dtype)
    y = _guided(model_output, uncond_output, guidance, parent, dtype, column)

    missing = torch.full((), float("nan"), dtype=dtype, device=x.device)
    m1, m2, m3 = (
        _gather(history[i], parents[i], dtype) if i < len(history) and history[i] is not None else missing for i in range(3)
    )
    last = missing if last_sample is None else _gather(last_sample, parent, dtype)
    draw = _noise(noise, noise_index, seed, call, step, x, dtype, missing)

    m0 = _clamp(_sum([(row["p"], x), (row["q"], y)], x), row["clip"])
    xc = _sum([(row[u], value) for u, value in zip(CORRECTOR, (x, last, m0, m1, m2, m3))], x)
    terms = (("a", xc), ("b0", m0), ("b1", m1), ("b2", m2), ("e", y), ("c", draw))
    x_next = _sum([(row[name], value) for name, value in terms], x)
    model_input = row["s"] * x_next
    if dtype == torch.float64:
        return x_next, m0, xc, model_input
    state = sample.dtype
    return x_next.to(state), m0.to(state), xc.to(state), model_input.to(model_output.dtype)


def _children(indptr, children):
    """For j = 0, 1, …: (child j of every row, whether the row has one); rows with fewer children repeat some valid child."""
    first, count = indptr[:-1].long(), (indptr[1:] - indptr[:-1]).long()
    for j in range(int(count.max()) if len(count) else 0):
        yield children.long()[torch.where(j < count, first + j, 0)], j < count


def branch_step_backward(
    grads,
    table,
    step,
    parent,
    sample,
    model_output,
    uncond_output,
    guidance,
    indptr,
    children,
    *,
    dtype=torch.float32,
):
    """Gradients of the rows that were read through one index, summed over the output rows that read them.

    For input row i with the output rows r = children[indptr[i]], …, children[indptr[i + 1] - 1] in that order, table row
    k = table[step[r]], and G_… the gradients that arrive at row r (a missing one is 0):

        N = G_sample + s * (G_model_input, both halves added)          at x'
        C = G_corrected + a*N                                          at xc
        M = G_denoised + b0*N + u2*C, 0 where the clamp was active     at m0
        Y = q*M + e*N                                                  at y
        d_sample        += p*M + u0*C                                  x
        d_model_output  += g*Y    (Y without guidance)                 cond
        d_uncond_output += Y - g*Y                                     uncond
        d_last_sample   += u1*C                                        L
        d_m1, d_m2, d_m3 += u3*C + b1*N, u4*C + b2*N, u5*C

    Arithmetic as in the forward direction: float32, unfused, sums start at +0 and add from left to right, a term whose
    coefficient is 0 is skipped. The clamp is active where p*x + q*y, computed as in the forward direction, is beyond its bound.

    Args:
        grads: (G_sample, G_denoised, G_corrected, G_model_input), each [R_out, *shape] or None; the last may have 2 * R_out rows.
        table, step, parent, sample, model_output, uncond_output, guidance: as they went into `branch_step`.
        indptr (Tensor): [R + 1], int32, ascending from 0 to R_out.
        children (Tensor): [R_out], int32: the output rows, those of input row i at indptr[i] … indptr[i + 1] - 1.
        dtype: as in `branch_step`.

    Returns:
        (d_sample, d_model_output, d_uncond_output, d_last_sample, d_m1, d_m2, d_m3), each [R, *shape]; with float32 the
        second and third in the model output's dtype and the others in the sample's, with float64 all float64.
    """
    column = lambda values: _over(values.to(dtype), sample)  # noqa: E731   [R_out, 1, ...]
    row = dict(zip(COLUMNS, (column(k) for k in table[step.long()].unbind(1))))
    x = _gather(sample, parent, dtype)
    y = _guided(model_output, uncond_output, guidance, parent, dtype, column)
    zero, one = torch.zeros_like(x), column(torch.ones_like(table[step.long(), 0]))

    g_sample, g_denoised, g_corrected, g_input = (zero if g is None else g.to(dtype) for g in grads)
    if len(g_input) == 2 * len(x) and len(x):
        g_input = g_input[: len(x)] + g_input[len(x) :]
    n = _sum([(one, g_sample), (row["s"], g_input)], x)
    c = _sum([(one, g_corrected), (row["a"], n)], x)
    m = _sum([(one, g_denoised), (row["b0"], n), (row["u2"], c)], x)
    stored = _sum([(row["p"], x), (row["q"], y)], x)
    m = torch.where((stored > row["clip"]) | (stored < -row["clip"]), zero, m)
    dy = _sum([(row["q"], m), (row["e"], n)], x)
    guided = dy if guidance is None else column(guidance) * dy

    terms = (
        _sum([(row["p"], m), (row["u0"], c)], x),
        guided,
        dy - guided,
        _sum([(row["u1"], c)], x),
        _sum([(row["u3"], c), (row["b1"], n)], x),
        _sum([(row["u4"], c), (row["b2"], n)], x),
        _sum([(row["u5"], c)], x),
    )
    totals = [zero.new_zeros(len(indptr) - 1, *x.shape[1:]) for _ in terms]
    for child, there in _children(indptr, children):
        there = _over(there, x)
        totals = [torch.where(there, total + term[child], total) for total, term in zip(totals, terms)]
    if dtype == torch.float64:
        return tuple(totals)
    model = {1, 2}
    return tuple(total.to(model_output.dtype if i in model else sample.dtype) for i, total in enumerate(totals))


def group_mean(rows, indptr, members, mask=None):
    """out[i] = mean of rows[members[k]] over indptr[i] <= k < indptr[i + 1]; masks: their element-wise maximum.

    The sum is float64, from the first member on in order, divided by the count once and rounded to float32 and then to the
    rows' dtype (float64 rows: not rounded), so that the mean of equal rows is exactly that row. Of equal values
    (+0 and -0 are) a maximum keeps the earlier one, and a NaN for good.

    Args:
        rows (Tensor): [B, *shape], float64, float32, bfloat16 or float16.
        indptr (Tensor): [R + 1], int32, ascending from 0.
        members (Tensor): [indptr[R]], int32, 0 <= members < B.
        mask (Tensor | None): [B, *mask_shape], any dtype that has an order.

    Returns:
        (mean [R, *shape], union [R, *mask_shape] or None), in the dtypes of rows and mask. A group without members: NaN and 0.
    """
    groups = len(indptr) - 1
    total = rows.new_full((groups, *rows.shape[1:]), float("nan"), dtype=torch.float64)
    union = None if mask is None else mask.new_zeros(groups, *mask.shape[1:])
    for j, (member, there) in enumerate(_children(indptr, members)):
        value = rows[member].double()
        total = torch.where(_over(there, rows), total + value if j else value, total)
        if mask is not None:
            keeps = (union >= mask[member]) | (union != union)
            best = torch.where(keeps, union, mask[member]) if j else mask[member]
            union = torch.where(_over(there, mask), best, union)
    mean = total / _over(indptr[1:] - indptr[:-1], rows)
    return mean if rows.dtype == torch.float64 else mean.float().to(rows.dtype), union
