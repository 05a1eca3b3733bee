"""The public ops: contract, dispatch, registration. `sage_kernels.reference` is the specification of what they compute."""

from typing import NamedTuple

import torch

from sage_kernels import arguments, backends, philox, reference

_LIBRARY = torch.library.Library("sage_kernels", "DEF")
_BRANCH_STEP = (
    "(Tensor sample, Tensor model_output, Tensor table, Tensor step, Tensor parent, Tensor? uncond_output, Tensor? guidance, "
    "Tensor? m1, Tensor? m2, Tensor? m3, Tensor? m1_parent, Tensor? m2_parent, Tensor? m3_parent, Tensor? last_sample, "
    "Tensor? noise, Tensor? noise_index, Tensor? seed, Tensor? call, "
    "Tensor(a!) next_sample, Tensor(b!) denoised, Tensor(c!)? corrected, Tensor(d!)? model_input) -> ()"
)
_NORMALS = "(Tensor seed, Tensor call, int tag, Tensor(a!) out) -> ()"


class BranchStepOut(NamedTuple):
    """What `branch_step` returns; see there."""

    sample: torch.Tensor  # [R_out, *shape], state dtype
    denoised: torch.Tensor  # [R_out, *shape], state dtype
    corrected: torch.Tensor | None = None  # [R_out, *shape], state dtype
    model_input: torch.Tensor | None = None  # [R_out, *shape] or [2 * R_out, *shape], model dtype


def _branch_step_reference(
    sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, m1_parent, m2_parent, m3_parent,
    last_sample, noise, noise_index, seed, call, next_sample, denoised, corrected, model_input,
):  # fmt: skip
    results = reference.branch_step(
        sample,
        model_output,
        table,
        step,
        parent,
        uncond_output=uncond_output,
        guidance=guidance,
        history=[m for m in (m1, m2, m3) if m is not None],
        history_parent=[parent if i is None else i for i in (m1_parent, m2_parent, m3_parent)],
        last_sample=last_sample,
        noise=noise,
        noise_index=noise_index,
        seed=seed,
        call=call,
    )
    rows = len(parent)
    for target, value in zip((next_sample, denoised, corrected), results):
        if target is not None:
            target.copy_(value)
    if model_input is not None:
        for start in range(0, len(model_input), rows or 1):
            model_input[start : start + rows] = results[3]


def _normals_reference(seed, call, tag, out):
    out.copy_(philox.normals(seed, call, out.shape[1], tag=tag))


def _register(name, schema, function):
    """`name` runs the kernel attached for the device, else the reference, with a warning; `name`_reference the reference."""

    def unless_native(*args):
        backends.warn_reference(args[0].device.type)
        function(*args)

    overloads = {}
    for backend, full, kernel in (("auto", name, unless_native), ("reference", f"{name}_reference", function)):
        _LIBRARY.define(full + schema)
        _LIBRARY.impl(full, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sage_kernels::{full}", lambda *args: None, lib=_LIBRARY)
        overloads[backend] = getattr(torch.ops.sage_kernels, full).default
    return overloads


_BRANCH_STEP_OPS = _register("branch_step", _BRANCH_STEP, _branch_step_reference)
_NORMALS_OPS = _register("normals", _NORMALS, _normals_reference)


def _op(overloads, backend):
    """The overload to call once `backends.resolve` has agreed: the dispatcher finds the native kernel, or there is none."""
    return overloads["reference" if backend == "reference" else "auto"]


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
        want_corrected (bool): also return xc, the next `last_sample`.
        model_input (None | "single" | "double"): also return the next model input, once or twice over (for guidance).
        out (BranchStepOut | None): contiguous tensors to write into, apart from every input; then nothing is allocated.
        backend: "auto", or one of `sage_kernels.backends.available()` by name.

    Inputs but `table`, `step`, `parent` and other vectors may have any row stride as long as each row is dense; another
    layout (channels_last) is copied.

    Returns:
        BranchStepOut(sample, denoised, corrected, model_input): x' and m0 (both S), xc (S) or None, model input (M) or None.
        [R_out, *shape], the double model input [2 * R_out, *shape] in two equal halves. Never aliases an input.

    Raises:
        TypeError on dtype or device, ValueError on shapes, ranges and combinations, NotImplementedError when a gradient would
        be needed. On devices other than CPU, index ranges and missing inputs are not looked at (that would wait for the
        device): a row that needs an input which was not given comes out as NaN there.

    Notes:
        **Deterministic, and every backend gives the same bits**: float32 arithmetic, unfused, in one fixed order. A term with
        coefficient 0 is skipped and never reads its input. NaN propagates. Not differentiable. Reads distinct parents * D per
        input, writes R_out * D per output [elements].
    """
    name = backends.resolve(backend, getattr(sample, "device", "cpu"))
    arguments.check_flags(history, history_parent, out, want_corrected, model_input)
    m1, m2, m3 = (*history, None, None, None)[:3]
    i1, i2, i3 = (None, None, None) if history_parent is None else (*history_parent, None, None, None)[:3]
    inputs = (
        sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, i1, i2, i3, last_sample,
        noise, noise_index, seed, call,
    )  # fmt: skip
    arguments.check_gradient(inputs)
    op, refusal = _op(_BRANCH_STEP_OPS, backend), None
    if name != "reference" and not torch.compiler.is_compiling():
        try:  # the native op checks its arguments itself; a refusal is explained below
            return _run(op, inputs, out, want_corrected, model_input)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            refusal = error
    arguments.check_inputs(inputs, history, history_parent)
    arguments.check_outputs(out, inputs, model_input)
    dense = inputs if name == "reference" else arguments.dense_rows(inputs)
    if refusal is not None and dense is inputs:
        raise refusal
    return _run(op, dense, out, want_corrected, model_input)


def _run(op, inputs, out, want_corrected, model_input):
    if out is None:
        out = _allocate(inputs[0], inputs[1], inputs[4].shape[0], want_corrected, model_input)
    op(*inputs, *out)
    return out


def _empty(shape, like, dtype=None):
    """Every output is allocated here, so that tests can fill what nobody has written yet with NaN."""
    return like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)


def _allocate(sample, model_output, rows, want_corrected, model_input):
    shape = (rows, *sample.shape[1:])
    following = None
    if model_input is not None:
        following = _empty((2 * rows, *shape[1:]) if model_input == "double" else shape, model_output)
    corrected = _empty(shape, sample) if want_corrected else None
    return BranchStepOut(_empty(shape, sample), _empty(shape, sample), corrected, following)


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
        TypeError on dtype, ValueError on shape or range.

    Notes:
        **Deterministic, the same bits from every backend.** Definition: `sage_kernels.philox`.
    """
    arguments.check_normals(seed, call, n, tag)
    out = _empty((len(seed), n), seed, torch.float32)
    backends.resolve(backend, seed.device)
    _op(_NORMALS_OPS, backend)(seed, call, tag, out)
    return out
