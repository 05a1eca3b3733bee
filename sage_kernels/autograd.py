"""Gradients: functional forms of the ops, which allocate their results and know their derivatives.

`branch_step_functional` is linear in the sample, the model outputs, the history and the last sample, apart from the clamp.
Its backward is one launch of `branch_step_backward` for everything that was read through one index: the output rows that read
an input row are its children, a segment of the output rows sorted by that index, and are summed in their order. No atomics, so
gradients reproduce bit for bit.
"""

import torch

from sage_kernels import allocation, arguments, registry
from sage_kernels.allocation import branch_step_outputs

# Places in the op's inputs.
SAMPLE, MODEL_OUTPUT, TABLE, STEP, PARENT, UNCOND, GUIDANCE, HISTORY, HISTORY_PARENT, LAST = map(
    arguments.INPUTS.index,
    ("sample", "model_output", "table", "step", "parent", "uncond_output", "guidance", "history[0]", "history_parent[0]", "last_sample"),
)
DIFFERENTIABLE = (SAMPLE, MODEL_OUTPUT, UNCOND, LAST, HISTORY, HISTORY + 1, HISTORY + 2)  # in the order of the backward's outputs
INPUTS, OPTIONS = len(arguments.INPUTS), 4  # arguments of the functional form: the op's inputs, then what is wanted and the backend

registry.LIBRARY.define(
    f"branch_step_functional({registry.BRANCH_STEP_INPUTS}, bool want_denoised, bool want_corrected, int copies, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
registry.LIBRARY.define(
    "group_mean_functional(Tensor rows, Tensor indptr, Tensor members, Tensor? mask, str backend) -> (Tensor, Tensor)"
)


def _given(like, *values):
    """An op's results cannot be None: what was not asked for is an empty tensor."""
    return tuple(like.new_empty(0) if value is None else value for value in values)


def _allocate(args):
    """x', m0, xc [R_out, *shape] and model input [copies * R_out, *shape] of the functional form; None if not asked for."""
    inputs, wanted = args[:INPUTS], args[INPUTS:-1]
    return branch_step_outputs(inputs[SAMPLE], inputs[MODEL_OUTPUT], inputs[PARENT].shape[0], *wanted)


def _fake_branch_step(*args):
    outputs = _allocate(args)
    return _given(args[SAMPLE], *outputs[:3]) + _given(args[MODEL_OUTPUT], outputs[3])


def _branch_step(*args):
    outputs = _allocate(args)
    registry.choose("branch_step", args[-1], args[SAMPLE].device)[1](*args[:INPUTS], *outputs)
    return _given(args[SAMPLE], *outputs[:3]) + _given(args[MODEL_OUTPUT], outputs[3])


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, want_denoised, want_corrected, copies, ctx.backend = inputs
    ctx.wanted = (True, want_denoised, want_corrected, copies > 0)
    ctx.rows = [None if t is None else t.shape[0] for t in tensors]
    kept = (SAMPLE, MODEL_OUTPUT, TABLE, STEP, PARENT, UNCOND, GUIDANCE, *range(HISTORY_PARENT, HISTORY_PARENT + 3))
    ctx.save_for_backward(*(tensors[i] for i in kept))


def _refuse_second_derivative(op, grads):
    if torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads):
        raise NotImplementedError(f"{op}: there is no second derivative; use create_graph=False")


def _segments(index, rows):
    """(indptr [rows + 1], children [R_out]) of an index [R_out], int32: the places where each row is read, ascending."""
    ordered, children = torch.sort(index, stable=True)
    bounds = torch.arange(rows + 1, dtype=index.dtype, device=index.device)
    return torch.searchsorted(ordered, bounds, out_int32=True), children.int()


def _branch_step_backward(ctx, *grads):
    _refuse_second_derivative("branch_step", grads)
    grads = tuple(None if g is None or not wanted else g.contiguous() for g, wanted in zip(grads, ctx.wanted))
    *forward, i1, i2, i3 = ctx.saved_tensors
    sample, model_output, table, step, parent = forward[:5]
    result = [None] * (INPUTS + OPTIONS)
    if all(g is None for g in grads):
        return tuple(result)
    read_through = {SAMPLE: parent, MODEL_OUTPUT: parent, UNCOND: parent, LAST: parent}
    read_through |= {HISTORY + i: parent if own is None else own for i, own in enumerate((i1, i2, i3))}
    needed = [place for place in DIFFERENTIABLE if ctx.needs_input_grad[place]]
    op = registry.choose("branch_step_backward", ctx.backend, sample.device)[1]
    while needed:
        index, rows = read_through[needed[0]], ctx.rows[needed[0]]
        places = [place for place in needed if read_through[place] is index and ctx.rows[place] == rows]
        needed = [place for place in needed if place not in places]
        outputs = [None] * len(DIFFERENTIABLE)
        for place in places:
            like = model_output if place in (MODEL_OUTPUT, UNCOND) else sample
            outputs[DIFFERENTIABLE.index(place)] = result[place] = allocation.empty((rows, *sample.shape[1:]), like)
        op(*grads, *forward[2:5], sample, model_output, *forward[5:], *_segments(index, rows), *outputs)
    return tuple(result)


def _allocate_groups(rows, indptr, mask):
    """Means [R, *shape] and union [R, *mask_shape], or None without a mask."""
    groups = indptr.shape[0] - 1
    out = allocation.empty((groups, *rows.shape[1:]), rows)
    return out, None if mask is None else allocation.empty((groups, *mask.shape[1:]), mask)


def _fake_group_mean(rows, indptr, members, mask, backend):
    return _given(rows, *_allocate_groups(rows, indptr, mask))


def _group_mean(rows, indptr, members, mask, backend):
    outputs = _allocate_groups(rows, indptr, mask)
    registry.choose("group_mean", backend, rows.device)[1](rows, indptr, members, mask, *outputs)
    return _given(rows, *outputs)


def _save_groups(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:3])
    ctx.rows = inputs[0].shape[0]


def _group_mean_backward(ctx, grad, _):
    """Every row gets the gradient of each group that it is a member of, divided by the group's size: float64, in their order."""
    _refuse_second_derivative("group_mean", (grad,))
    if grad is None:
        return (None,) * 5
    indptr, members = ctx.saved_tensors
    counts = indptr[1:] - indptr[:-1]
    share = grad.double() / counts.view(-1, *[1] * (grad.dim() - 1))
    share = torch.repeat_interleave(share, counts, dim=0, output_size=members.shape[0])
    first, places = _segments(members, ctx.rows)
    total = torch.segment_reduce(share.index_select(0, places), "sum", offsets=first.long(), axis=0, initial=0.0)
    return total.to(grad.dtype), None, None, None, None


def _register(name, run, fake, save, backward):
    registry.LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sage_kernels::{name}", fake, lib=registry.LIBRARY)
    torch.library.register_autograd(f"sage_kernels::{name}", backward, setup_context=save, lib=registry.LIBRARY)
    return getattr(torch.ops.sage_kernels, name).default


branch_step_functional = _register("branch_step_functional", _branch_step, _fake_branch_step, _save, _branch_step_backward)
group_mean_functional = _register("group_mean_functional", _group_mean, _fake_group_mean, _save_groups, _group_mean_backward)
