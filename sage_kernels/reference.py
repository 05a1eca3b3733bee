"""THE SPECIFICATION of `branch_step`, in plain torch and without cleverness. Every backend gives these bits.

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
"""

import torch

from sage_kernels.coefficients import COLUMNS
from sage_kernels.philox import normals

CORRECTOR = ("u0", "u1", "u2", "u3", "u4", "u5")


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
    column = lambda values: values.to(dtype).view(-1, *([1] * (sample.dim() - 1)))  # noqa: E731   [R_out, 1, ...]
    row = dict(zip(COLUMNS, (column(k) for k in table[step.long()].unbind(1))))
    parents = (parent,) * 3 if history_parent is None else history_parent
    x = _gather(sample, parent, dtype)
    y = _guided(model_output, uncond_output, guidance, parent, dtype, column)

    missing = torch.full((), float("nan"), dtype=dtype, device=x.device)
    m1, m2, m3 = (
        _gather(history[i], parents[i], dtype) if i < len(history) else missing for i in range(3)
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
