"""The ops on Triton, for any GPU it compiles for: launchers. Contract: `sage_kernels.ops`, which checks the arguments.

Importing this imports Triton; kernels are compiled when first used, and Triton keeps them on disk.
"""

import functools

import torch
import triton

from sage_kernels import triton_kernels as kernels

# All kernels are bound by memory. 8 elements per thread are one 128-bit load of a 16-bit dtype and two of float32, which at
# some 80 registers keeps more bytes in flight than an H100 or H200 needs; 128 threads, because the smallest latents
# (16384 elements) are then 16 programs per row, and the last program of a row wastes little.
BLOCK = 1024
THREADS = 128


@functools.cache
def _options(kernel):
    options = {"enable_fp_fusion": False}  # every product is rounded before it is added: see sage_kernels.reference
    if not triton.knobs.runtime.interpret:
        target = triton.runtime.driver.active.get_current_target()
        options["num_warps"] = THREADS // target.warp_size
        if kernel is kernels.branch_step_backward_kernel and target.backend == "cuda":
            options["maxnreg"] = 168  # seven sums: left alone, ptxas aims at 128 and spills; 168 leave three programs at a time
    return options


def _launch(kernel, rows, n, like, *arguments, **constants):
    """One program per row and BLOCK elements, on the device of `like`."""
    grid = (rows * -(-n // BLOCK),)
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants, BLOCK=BLOCK, **_options(kernel))


def _stride(rows, n):
    """Elements between rows. One row says anything about it, and a stride that varies at random would be compiled for."""
    if rows is None:
        return 0
    return rows.stride(0) if rows.shape[0] > 1 else n


def _count(rows):
    return 0 if rows is None else rows.shape[0]


def branch_step(
    sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, m1_parent, m2_parent, m3_parent,
    last_sample, noise, noise_index, seed, call, next_sample, denoised, corrected, model_input,
):  # fmt: skip
    """See `sage_kernels.branch_step`; writes into the last four."""
    rows = parent.shape[0]
    if next_sample.numel() == 0:
        return
    n = next_sample.numel() // rows
    with_rows = (sample, model_output, uncond_output, m1, m2, m3, last_sample, noise)
    _launch(
        kernels.branch_step_kernel, rows, n, sample,
        sample, model_output, table, step, parent, uncond_output, guidance, m1, m2, m3, m1_parent, m2_parent, m3_parent,
        last_sample, noise, noise_index, seed, call, next_sample, denoised, corrected, model_input,
        *[_stride(t, n) for t in with_rows],
        n, rows, sample.shape[0], table.shape[0], _count(m1), _count(m2), _count(m3), _count(noise),
        COPIES=_count(model_input) // rows,
    )  # fmt: skip


def normals(seed, call, tag, out):
    """See `sage_kernels.normals`; writes into `out`."""
    rows, n = out.shape
    if out.numel():
        _launch(kernels.normals_kernel, rows, n, out, seed, call, tag, out, n, rows)


def branch_step_backward(
    grad_sample, grad_denoised, grad_corrected, grad_model_input, table, step, parent, sample, model_output, uncond_output,
    guidance, indptr, children, d_sample, d_model_output, d_uncond_output, d_last_sample, d_m1, d_m2, d_m3,
):  # fmt: skip
    """See `sage_kernels.reference.branch_step_backward`; writes into those of the last seven that are not None."""
    rows, rows_out = indptr.shape[0] - 1, parent.shape[0]
    wanted = next((d for d in (d_sample, d_model_output, d_uncond_output, d_last_sample, d_m1, d_m2, d_m3) if d is not None), None)
    if wanted is None or wanted.numel() == 0:
        return
    n = wanted.numel() // rows
    _launch(
        kernels.branch_step_backward_kernel, rows, n, sample,
        grad_sample, grad_denoised, grad_corrected, grad_model_input, table, step, parent, sample, model_output, uncond_output,
        guidance, indptr, children, d_sample, d_model_output, d_uncond_output, d_last_sample, d_m1, d_m2, d_m3,
        _stride(sample, n), _stride(model_output, n), _stride(uncond_output, n), n, rows, sample.shape[0], rows_out, table.shape[0],
        COPIES=_count(grad_model_input) // max(rows_out, 1),
    )  # fmt: skip


def group_mean(rows, indptr, members, mask, out, union):
    """See `sage_kernels.reference.group_mean`; writes into the last two."""
    groups = out.shape[0]
    if groups == 0:
        return
    if mask is not None and mask.dtype == torch.bool:  # compared as bytes: one bit would be a sign
        mask, union = mask.view(torch.uint8), union.view(torch.uint8)
    n, mask_n = out.numel() // groups, 0 if mask is None else union.numel() // groups
    masks_from = -(-n // BLOCK) * BLOCK
    if masks_from + mask_n == 0:
        return
    _launch(
        kernels.group_mean_kernel, groups, masks_from + mask_n, out, rows, indptr, members, mask, out, union,
        _stride(rows, n), _stride(mask, mask_n), n, mask_n, masks_from, groups, rows.shape[0], members.shape[0],
    )  # fmt: skip
