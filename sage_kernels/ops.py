"""The public ops: contract, checks, dispatch. `sage_kernels.reference` is the specification of what they compute."""

from typing import NamedTuple

import torch

from sage_kernels import allocation, arguments, registry
from sage_kernels.allocation import MODEL_INPUT, branch_step_outputs
from sage_kernels.autograd import branch_step_functional, group_mean_functional


class BranchStepOut(NamedTuple):
    """What `branch_step` returns; see there."""

    sample: torch.Tensor  # [R_out, *shape], state dtype
    denoised: torch.Tensor | None = None  # [R_out, *shape], state dtype
    corrected: torch.Tensor | None = None  # [R_out, *shape], state dtype
    model_input: torch.Tensor | None = None  # [R_out, *shape] or [2 * R_out, *shape], model dtype


class GroupMeanOut(NamedTuple):
    """What `group_mean` returns; see there."""

    rows: torch.Tensor  # [R, *shape], dtype of the rows
    mask: torch.Tensor | None = None  # [R, *mask_shape], dtype of the mask


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
    want_denoised=True,
    want_corrected=False,
    model_input=None,
    out=None,
    backend="auto",
):
    """Everything between two denoiser calls: guidance, solver update, copy at a branch, next model input.

    For output row r with parent p = parent[r] and table row k = table[step[r]] (see `sage_kernels.reference`):

        y  = uncond[p] + g * (model_output[p] - uncond[p])         g = guidance[r]; y = model_output[p] without guidance
        m0 = clamp(p*x + q*y, -clip, +clip)                        x = sample[p]
        xc = u0*x + u1*L + u2*m0 + u3*m1 + u4*m2 + u5*m3           L = last_sample[p], m_k = history[k-1][history_parent[k-1][r]]
        x' = a*xc + b0*m0 + b1*m1 + b2*m2 + e*y + c*noise
        model_input = s * x'

    Args:
        sample (Tensor): [R_in, *shape], state dtype S: float32 or the model output's dtype.
        model_output (Tensor): [R_in, *shape], model dtype M: float32, bfloat16 or float16. With guidance: the conditional output.
        table (Tensor): [rows, 16], float32, contiguous: `CoefficientTable.tensor(device)`.
        step (Tensor): [R_out], int32: the table row of each output row.
        parent (Tensor): [R_out], int32, 0 <= parent < R_in: the input row of each output row; repeats allowed, order free.
        uncond_output (Tensor | None): [R_in, *shape], M.
        guidance (Tensor | None): [R_out], float32; together with uncond_output.
        history: up to three tensors m1, m2, m3 (newest first), each [R_k, *shape], S: earlier `denoised` outputs.
        history_parent: None (all use `parent`), or one [R_out] int32 tensor per history tensor: their rows may be older than
            the sample's (after a branch m1 has the new rows only once the next step has stored it).
        last_sample (Tensor | None): [R_in, *shape], S: the corrected sample of the call before (UniPC, Heun).
        noise (Tensor | None): [R_noise, *shape], float32, not scaled.
        noise_index (Tensor | None): [R_out], int32, row of `noise` for each output row; None: row r, and R_noise = R_out.
        seed (Tensor | None): [R_out], int64: Philox noise instead of a tensor. A row's noise depends on its seed and call alone.
        call (Tensor | None): [R_out], int32: counter word of the noise, the index of the denoiser call; None: `step`.
        want_denoised (bool): also return m0, which a solver without history does not need.
        want_corrected (bool): also return xc, the next `last_sample`.
        model_input (None | "single" | "double"): also return the next model input, once or twice over (for guidance).
        out (BranchStepOut | None): contiguous tensors to write into, apart from every input; then nothing is allocated, and
            nothing is differentiable. The form for captured loops.
        backend: "auto", or one of `sage_kernels.backends.available()` by name.

    Inputs but `table`, `step`, `parent` and other vectors may have any row stride as long as each row is dense; another
    layout (channels_last) is copied.

    Returns:
        BranchStepOut(sample, denoised, corrected, model_input): x' (S), m0 (S) or None, xc (S) or None, model input (M) or
        None. [R_out, *shape], the double model input [2 * R_out, *shape] in two equal halves. Never aliases an input.

    Raises:
        TypeError on dtype or device, ValueError on shapes, ranges and combinations, NotImplementedError when a gradient would
        be needed that does not exist, RuntimeError when a backend forced by name cannot run here. On devices other than CPU, index ranges and missing inputs are not looked at (that would
        wait for the device): a row that needs an input which was not given, or whose index is out of range, comes out as NaN
        there (the reference lets torch's own device assertion stop it).

    Notes:
        **Deterministic, and every backend gives the same bits**: float32 arithmetic, unfused, in one fixed order. A term with
        coefficient 0 is skipped and never reads its input. NaN propagates. Differentiable in sample, model_output,
        uncond_output, history and last_sample (once; rounding counts as the identity): the gradient of a row is the sum over
        the output rows that read it, taken in their order. Reads distinct parents * D per input, writes R_out * D per output
        [elements].
    """
    chosen, op = registry.choose("branch_step", backend, getattr(sample, "device", "cpu"))
    wanted = (want_denoised, want_corrected, model_input)
    arguments.check_flags(history, history_parent, parent, out, *wanted)
    m1, m2, m3 = (*history, None, None, None)[:3]
    i1, i2, i3 = (None, None, None) if history_parent is None else (*history_parent, None, None, None)[:3]
    inputs = (
        sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, i1, i2, i3, last_sample,
        noise, noise_index, seed, call,
    )  # fmt: skip
    if arguments.check_gradient(inputs, out):
        return _differentiable(inputs, history, history_parent, *wanted, backend, chosen)
    refusal = None
    if chosen in ("cpu", "cuda") and not torch.compiler.is_compiling():
        try:  # the native op checks its arguments itself; a refusal is explained below
            return _run(op, inputs, out, *wanted)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            refusal = error
    arguments.check_inputs(inputs, history, history_parent)
    arguments.check_outputs(out, inputs, model_input)
    dense = inputs if chosen == "reference" else arguments.dense_rows(inputs)
    if refusal is not None and dense is inputs:
        raise refusal
    return _run(op, dense, out, *wanted)


def _run(op, inputs, out, want_denoised, want_corrected, model_input):
    if out is None:
        copies = MODEL_INPUT.index(model_input)
        out = BranchStepOut(*branch_step_outputs(inputs[0], inputs[1], inputs[4].shape[0], want_denoised, want_corrected, copies))
        op(*inputs, *out)
        return out
    op(*inputs, *out)
    if not torch.compiler.is_compiling():
        _bump(out)
    return out


def _bump(out):
    """Tell autograd that these tensors have changed, so that nothing differentiates through what they held before."""
    changed = [t for t in out if t is not None and not t.is_inference()]
    if changed:
        torch.autograd.graph.increment_version(changed)


def _differentiable(inputs, history, history_parent, want_denoised, want_corrected, model_input, backend, chosen):
    arguments.check_inputs(inputs, history, history_parent)
    dense = inputs if chosen == "reference" else arguments.dense_rows(inputs)
    copies = MODEL_INPUT.index(model_input)
    results = branch_step_functional(*dense, want_denoised, want_corrected, copies, backend)
    return BranchStepOut(*(t if wanted else None for t, wanted in zip(results, (True, want_denoised, want_corrected, copies))))


def normals(seed, call, n, *, tag=0, backend="auto"):
    """Standard normals from Philox4x32-10 and Box-Muller: the noise of `branch_step`, alone (which uses tag 0).

    Args:
        seed (Tensor): [R], int64.
        call (Tensor): [R], int32: counter word, the index of the denoiser call.
        n (int): elements per row.
        tag (int): counter word, separates streams of one seed and call; 0 <= tag < 2**32.
        backend: as for `branch_step`.

    Returns:
        [R, n], float32. A row depends on its seed, call and tag alone; a shorter row is a prefix of a longer one.

    Raises:
        TypeError on dtype, ValueError on shape or range, RuntimeError when a backend forced by name cannot run here.

    Notes:
        **Deterministic, the same bits from every backend.** Definition: `sage_kernels.philox`.
    """
    arguments.check_normals(seed, call, n, tag)
    out = allocation.empty((len(seed), n), seed, torch.float32)
    registry.choose("normals", backend, seed.device)[1](seed, call, tag, out)
    return out


def group_mean(rows, indptr, members, *, mask=None, backend="auto"):
    """The mean of the rows of every group, and the union of their masks: the trunk's conditions, in one launch.

        out[i] = (rows[members[indptr[i]]] + … + rows[members[indptr[i + 1] - 1]]) / (indptr[i + 1] - indptr[i])
        union[i] = max over the same members of mask[member], element by element

    Args:
        rows (Tensor): [B, *shape], float64, float32, bfloat16 or float16; any row stride, each row dense (another layout is
            copied).
        indptr (Tensor): [R + 1], int32: where each group's members begin; ascending from 0 to len(members).
        members (Tensor): [n], int32, 0 <= members < B: the row numbers, group after group; repeats allowed.
        mask (Tensor | None): [B, *mask_shape], bool, uint8, int32, int64, float32, bfloat16 or float16.
        backend: as for `branch_step`.

    Returns:
        GroupMeanOut(rows [R, *shape], mask [R, *mask_shape] or None), in the dtypes that came. Never aliases an input.

    Raises:
        TypeError on dtype or device, ValueError on shapes, empty groups and ranges, RuntimeError when a backend forced by name
        cannot run here. On devices other than CPU, values are not looked at (that would wait for the device): a group without
        members gives NaN and mask 0; one with a member out of range, or whose bounds are, gives NaN, and 0 for that member's
        mask (the reference lets torch's own device assertion stop it).

    Notes:
        **Deterministic, and every backend gives the same bits.** Sums are float64, in the order of `members`, divided once and
        rounded to float32 and then to the rows' dtype: the mean of equal rows is exactly that row. Differentiable in rows
        (once). Reads len(members) * D, writes R * D [elements] of rows and mask each.
    """
    arguments.check_groups(rows, indptr, members, mask)
    if backend != "reference":
        rows, mask = arguments.dense_groups(rows, mask)
    mean, union = group_mean_functional(rows, indptr, members, mask, backend)
    return GroupMeanOut(mean, None if mask is None else union)
