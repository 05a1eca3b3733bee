// The op branch_step_backward: argument checks, plain arguments, launch.
#include "launch.h"
#include "ops.h"

namespace sage {

void branch_step_backward(MaybeTensor grad_sample, MaybeTensor grad_denoised, MaybeTensor grad_corrected,
                          MaybeTensor grad_model_input, Tensor table, Tensor step, Tensor parent, Tensor sample,
                          Tensor model_output, MaybeTensor uncond_output, MaybeTensor guidance, Tensor indptr, Tensor children,
                          MaybeTensor d_sample, MaybeTensor d_model_output, MaybeTensor d_uncond_output,
                          MaybeTensor d_last_sample, MaybeTensor d_m1, MaybeTensor d_m2, MaybeTensor d_m3) {
  constexpr const char* op = "branch_step_backward";
  const Checks check(op, sample);
  SAGE_WANT(sample.dim() > 0, op, "sample", "[R_in, *shape]", sample, "add a row dimension");
  SAGE_WANT(parent.dim() == 1, op, "parent", "[R_out]", parent, "pass one index per output row");
  SAGE_WANT(indptr.dim() == 1 && indptr.size(0) > 0, op, "indptr", "[R + 1]", indptr, "no rows are [0]");
  BranchStepBackward args{};
  args.rows = indptr.size(0) - 1;
  args.rows_out = parent.size(0);
  args.elements = elements_of(sample);
  args.model = dtype_of(op, "model_output", model_output);
  args.state = state_of(op, sample, model_output);
  const ScalarType state = sample.scalar_type(), model = model_output.scalar_type();
  const int64_t rows_out = args.rows_out, rows_in = sample.size(0);

  args.table = table_of(check, table);
  args.table_rows = table.size(0);
  args.step = check.index("step", step, rows_out, table.size(0));
  const int32_t* const from = check.index("parent", parent, rows_out, rows_in);
  args.sample = check.rows("sample", sample, state, sample, from);
  args.model_output = check.rows("model_output", model_output, model, sample, from);
  check.count("model_output", model_output, rows_in);
  if (uncond_output.has_value() != guidance.has_value()) refuse(op, ": uncond_output and guidance belong together; pass both");
  if (guidance) {
    args.uncond = check.rows("uncond_output", *uncond_output, model, sample, from);
    check.count("uncond_output", *uncond_output, rows_in);
    args.guidance = check.vector<float>("guidance", *guidance, ScalarType::Float, rows_out);
  }
  args.indptr = check.vector<int32_t>("indptr", indptr, ScalarType::Int, args.rows + 1);
  args.children = check.index("children", children, rows_out, rows_out);
  check.range("indptr", args.indptr, args.rows + 1, rows_out + 1);

  const auto given = [&](const char* name, const MaybeTensor& t, ScalarType dtype, int64_t rows) -> void* {
    return t ? check.output(name, *t, dtype, sample, rows) : nullptr;
  };
  args.g_sample = given("grad_sample", grad_sample, state, rows_out);
  args.g_denoised = given("grad_denoised", grad_denoised, state, rows_out);
  args.g_corrected = given("grad_corrected", grad_corrected, state, rows_out);
  if (grad_model_input) args.copies = grad_model_input->size(0) == 2 * rows_out ? 2 : 1;
  args.g_model_input = given("grad_model_input", grad_model_input, model, args.copies * rows_out);
  args.d_sample = given("d_sample", d_sample, state, args.rows);
  args.d_model_output = given("d_model_output", d_model_output, model, args.rows);
  args.d_uncond = given("d_uncond_output", d_uncond_output, model, args.rows);
  args.d_last = given("d_last_sample", d_last_sample, state, args.rows);
  args.d_m[0] = given("d_m1", d_m1, state, args.rows);
  args.d_m[1] = given("d_m2", d_m2, state, args.rows);
  args.d_m[2] = given("d_m3", d_m3, state, args.rows);

#ifdef SAGE_CUDA
  if (!check.on_cpu()) return launch(check, branch_step_backward_cuda, args);
#endif
  over_chunks(args.rows, args.elements, kSerialChunks,
              [&](int64_t row, int64_t begin, int64_t end) { branch_step_backward_cpu(args, row, begin, end); });
}

}  // namespace sage
