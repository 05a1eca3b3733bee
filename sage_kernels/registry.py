"""The torch ops: schemas, what runs them, and which overload a backend means.

Every op exists three times: `name` runs the native kernel attached for the device (C++ or CUDA) and without one the reference,
with a warning; `name_triton` and `name_reference` are those backends. All write into tensors that the caller gives. The
functional forms, which allocate and know their gradients, are in sage_kernels/autograd.py.
"""

import importlib

import torch

from sage_kernels import backends, philox, reference

LIBRARY = torch.library.Library("sage_kernels", "DEF")

BRANCH_STEP_INPUTS = (
    "Tensor sample, Tensor model_output, Tensor table, Tensor step, Tensor parent, Tensor? uncond_output, Tensor? guidance, "
    "Tensor? m1, Tensor? m2, Tensor? m3, Tensor? m1_parent, Tensor? m2_parent, Tensor? m3_parent, Tensor? last_sample, "
    "Tensor? noise, Tensor? noise_index, Tensor? seed, Tensor? call"
)
SCHEMAS = {
    "branch_step": (
        f"({BRANCH_STEP_INPUTS}, "
        "Tensor(a!) next_sample, Tensor(b!)? denoised, Tensor(c!)? corrected, Tensor(d!)? model_input) -> ()"
    ),
    "branch_step_backward": (
        "(Tensor? grad_sample, Tensor? grad_denoised, Tensor? grad_corrected, Tensor? grad_model_input, "
        "Tensor table, Tensor step, Tensor parent, Tensor sample, Tensor model_output, Tensor? uncond_output, Tensor? guidance, "
        "Tensor indptr, Tensor children, "
        "Tensor(a!)? d_sample, Tensor(b!)? d_model_output, Tensor(c!)? d_uncond_output, Tensor(d!)? d_last_sample, "
        "Tensor(e!)? d_m1, Tensor(f!)? d_m2, Tensor(g!)? d_m3) -> ()"
    ),
    "normals": "(Tensor seed, Tensor call, int tag, Tensor(a!) out) -> ()",
    "group_mean": "(Tensor rows, Tensor indptr, Tensor members, Tensor? mask, Tensor(a!) out, Tensor(b!)? union) -> ()",
}


def _branch_step(
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
        history=(m1, m2, m3),
        history_parent=[parent if i is None else i for i in (m1_parent, m2_parent, m3_parent)],
        last_sample=last_sample,
        noise=noise,
        noise_index=noise_index,
        seed=seed,
        call=call,
    )
    rows = len(parent)
    _copy((next_sample, denoised, corrected), results)
    if model_input is not None:
        for start in range(0, len(model_input), rows or 1):
            model_input[start : start + rows] = results[3]


def _branch_step_backward(
    grad_sample, grad_denoised, grad_corrected, grad_model_input, table, step, parent, sample, model_output, uncond_output,
    guidance, indptr, children, *outputs,
):  # fmt: skip
    grads = (grad_sample, grad_denoised, grad_corrected, grad_model_input)
    _copy(
        outputs,
        reference.branch_step_backward(
            grads, table, step, parent, sample, model_output, uncond_output, guidance, indptr, children
        ),
    )


def _normals(seed, call, tag, out):
    out.copy_(philox.normals(seed, call, out.shape[1], tag=tag))


def _group_mean(rows, indptr, members, mask, out, union):
    _copy((out, union), reference.group_mean(rows, indptr, members, mask))


def _copy(targets, values):
    for target, value in zip(targets, values):
        if target is not None:
            target.copy_(value)


_REFERENCE = {
    "branch_step": _branch_step,
    "branch_step_backward": _branch_step_backward,
    "normals": _normals,
    "group_mean": _group_mean,
}


def _register(name):
    """Define the three overloads of an op. Returns {"native", "triton", "reference": overload}."""

    def unless_native(*args):
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        backends.warn_reference(device.type)
        _REFERENCE[name](*args)

    def triton(*args):  # importing triton takes a second, so it waits until it is needed
        getattr(importlib.import_module("sage_kernels.triton_ops"), name)(*args)

    overloads = {}
    for kind, full, run in (
        ("native", name, unless_native),
        ("triton", f"{name}_triton", triton),
        ("reference", f"{name}_reference", _REFERENCE[name]),
    ):
        LIBRARY.define(full + SCHEMAS[name])
        LIBRARY.impl(full, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sage_kernels::{full}", lambda *args: None, lib=LIBRARY)
        overloads[kind] = getattr(torch.ops.sage_kernels, full).default
    return overloads


_OVERLOADS = {name: _register(name) for name in SCHEMAS}


def choose(name, requested, device):
    """(backend that runs, overload to call) for a backend asked for by name. Raises as `backends.resolve` does.

    Where "auto" has to take the reference, the overload is the native one, which says so.
    """
    chosen = backends.resolve(requested, device)
    if chosen == "triton" or requested == "reference":
        return chosen, _OVERLOADS[name][chosen]
    return chosen, _OVERLOADS[name]["native"]
