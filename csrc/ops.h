// The native ops, one file each. Arguments are those of the schemas in sage_kernels/registry.py, in their order.
#pragma once
#include "checks.h"

namespace sage {

void branch_step(Tensor sample, Tensor model_output, Tensor table, Tensor step, Tensor parent, MaybeTensor uncond_output,
                 MaybeTensor guidance, MaybeTensor m1, MaybeTensor m2, MaybeTensor m3, MaybeTensor m1_parent,
                 MaybeTensor m2_parent, MaybeTensor m3_parent, MaybeTensor last_sample, MaybeTensor noise,
                 MaybeTensor noise_index, MaybeTensor seed, MaybeTensor call, Tensor next_sample, MaybeTensor denoised,
                 MaybeTensor corrected, MaybeTensor model_input);
void branch_step_backward(MaybeTensor grad_sample, MaybeTensor grad_denoised, MaybeTensor grad_corrected,
                          MaybeTensor grad_model_input, Tensor table, Tensor step, Tensor parent, Tensor sample,
                          Tensor model_output, MaybeTensor uncond_output, MaybeTensor guidance, Tensor indptr, Tensor children,
                          MaybeTensor d_sample, MaybeTensor d_model_output, MaybeTensor d_uncond_output,
                          MaybeTensor d_last_sample, MaybeTensor d_m1, MaybeTensor d_m2, MaybeTensor d_m3);
void normals(Tensor seed, Tensor call, int64_t tag, Tensor out);
void group_mean(Tensor rows, Tensor indptr, Tensor members, MaybeTensor mask, Tensor out, MaybeTensor united);

}  // namespace sage
