// The native ops: argument checks, plain arguments for the kernels, registration. The schemas live in sage_kernels/ops.py;
// this file attaches CPU kernels to them, through torch's stable ABI: one binary for every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "branch_step.h"
#include "checks.h"

namespace sage {
namespace {

constexpr const char* kStep = "branch_step";
constexpr int64_t kSerialChunks = 8;  // a thread gets at least this many chunks of kChunk elements

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: SAGE_WANT(false, kStep, name, "float32, bfloat16 or float16", t, "convert it");
  }
  return DType::kFloat32;
}

int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

const int32_t* index_of(const char* name, const Tensor& t, int64_t rows, int64_t bound) {
  check_vector(kStep, name, t, ScalarType::Int, rows);
  const auto* index = static_cast<const int32_t*>(t.data_ptr());
  check_range(kStep, name, index, rows, bound);
  return index;
}

// Outputs are dense and share no memory with inputs or with each other.
class Memory {
 public:
  void input(const char* name, const Tensor& t, int64_t row_bytes) {
    if (t.numel() == 0) return;
    const char* first = static_cast<const char*>(t.data_ptr());
    const int64_t reach = (t.size(0) - 1) * t.stride(0) * static_cast<int64_t>(t.element_size());
    taken_[count_++] = {name, first, first + reach + row_bytes};
  }

  void* output(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like, int64_t rows, int64_t row_bytes) {
    check_rows(kStep, name, t, dtype, like);
    check_count(kStep, name, t, rows);
    SAGE_WANT(t.is_contiguous(), kStep, name, "contiguous", t, "use torch.empty");
    char* first = static_cast<char*>(t.data_ptr());
    const char* last = first + rows * row_bytes;
    for (int i = 0; i < count_ && first != last; i++) {
      if (first < taken_[i].last && taken_[i].first < last) {
        refuse(kStep, ": ", name, " overlaps ", taken_[i].name, "; give each output memory of its own (swap two buffers)");
      }
    }
    taken_[count_++] = {name, first, last};
    return first;
  }

 private:
  struct Span {
    const char *name, *first, *last;
  };
  Span taken_[22];  // 18 inputs, 4 outputs
  int count_ = 0;
};

// Every input that a used table row reads is there.
void check_needs(const BranchStep& args) {
  struct Need {
    const char* name;
    const void* given;
    const float first, second;
  };
  for (int64_t r = 0; r < args.rows; r++) {
    const Row& k = args.table[args.step[r]];
    const void* noise = args.seed ? static_cast<const void*>(args.seed) : args.noise.data;
    const Need needs[] = {{"noise or seed", noise, k.c, 0.0f},
                          {"last_sample", args.last.data, k.u[1], 0.0f},
                          {"history[0]", args.m[0].data, k.u[3], k.b[1]},
                          {"history[1]", args.m[1].data, k.u[4], k.b[2]},
                          {"history[2]", args.m[2].data, k.u[5], 0.0f}};
    for (const Need& need : needs) {
      if (__builtin_expect(need.given == nullptr && (need.first != 0.0f || need.second != 0.0f), 0)) {
        refuse(kStep, ": table row ", args.step[r], " reads ", need.name, ", which is missing; pass it");
      }
    }
  }
}

void branch_step(Tensor sample, Tensor model_output, Tensor table, Tensor step, Tensor parent, MaybeTensor uncond_output,
                 MaybeTensor guidance, MaybeTensor m1, MaybeTensor m2, MaybeTensor m3, MaybeTensor m1_parent,
                 MaybeTensor m2_parent, MaybeTensor m3_parent, MaybeTensor last_sample, MaybeTensor noise,
                 MaybeTensor noise_index, MaybeTensor seed, MaybeTensor call, Tensor next_sample, Tensor denoised,
                 MaybeTensor corrected, MaybeTensor model_input) {
  SAGE_WANT(sample.dim() > 0, kStep, "sample", "[R_in, *shape]", sample, "add a row dimension");
  SAGE_WANT(parent.dim() == 1, kStep, "parent", "[R_out]", parent, "pass one index per output row");
  BranchStep args{};
  args.rows = parent.size(0);
  args.model = dtype_of("model_output", model_output);
  args.state = dtype_of("sample", sample);
  SAGE_WANT(args.state == DType::kFloat32 || args.state == args.model, kStep, "sample", "float32 or model_output's dtype",
            sample, "use sample.float()");
  const ScalarType state = sample.scalar_type(), model = model_output.scalar_type();
  const auto sizes = sample.sizes();
  args.elements = 1;
  for (size_t i = 1; i < sizes.size(); i++) args.elements *= sizes[i];
  const int64_t rows = args.rows, rows_in = sizes[0];
  const int64_t state_bytes = args.elements * size_of(args.state), model_bytes = args.elements * size_of(args.model);

  SAGE_WANT(table.is_cpu() && table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(1) == 16 &&
                table.is_contiguous(),
            kStep, "table", "contiguous float32 [rows, 16] on cpu", table, "use CoefficientTable.tensor(device)");
  args.table = static_cast<const Row*>(table.data_ptr());
  const int32_t* const from = index_of("parent", parent, rows, rows_in);
  args.step = index_of("step", step, rows, table.size(0));

  Memory memory;
  const auto rows_input = [&](const char* name, const Tensor& t, ScalarType dtype, const int32_t* index) {
    const int64_t stride = check_rows(kStep, name, t, dtype, sample);
    memory.input(name, t, args.elements * static_cast<int64_t>(t.element_size()));
    return RowsIn{t.data_ptr(), stride, index};
  };
  args.sample = rows_input("sample", sample, state, from);
  args.model_output = rows_input("model_output", model_output, model, from);
  check_count(kStep, "model_output", model_output, rows_in);

  if (uncond_output.has_value() != guidance.has_value()) {
    refuse(kStep, ": uncond_output and guidance belong together; pass both, or neither for an unguided step");
  }
  if (guidance) {
    args.uncond = rows_input("uncond_output", *uncond_output, model, from);
    check_count(kStep, "uncond_output", *uncond_output, rows_in);
    check_vector(kStep, "guidance", *guidance, ScalarType::Float, rows);
    args.guidance = static_cast<const float*>(guidance->data_ptr());
  }

  const std::pair<const MaybeTensor&, const MaybeTensor&> history[3] = {{m1, m1_parent}, {m2, m2_parent}, {m3, m3_parent}};
  constexpr const char* kHistory[3] = {"history[0]", "history[1]", "history[2]"};
  constexpr const char* kHistoryParent[3] = {"history_parent[0]", "history_parent[1]", "history_parent[2]"};
  for (int i = 0; i < 3; i++) {
    const auto& [m, index] = history[i];
    if (!m) continue;
    const int32_t* own = index ? index_of(kHistoryParent[i], *index, rows, m->size(0)) : from;
    if (!index && m->size(0) != rows_in) check_range(kStep, "parent", from, rows, m->size(0));
    args.m[i] = rows_input(kHistory[i], *m, state, own);
  }
  if (last_sample) {
    args.last = rows_input("last_sample", *last_sample, state, from);
    check_count(kStep, "last_sample", *last_sample, rows_in);
  }

  if (noise && seed) refuse(kStep, ": noise and seed were both given; pass the noise tensor, or seeds for Philox noise");
  if (noise_index && !noise) refuse(kStep, ": noise_index was given without noise; pass noise too, or leave noise_index out");
  if (call && !seed) refuse(kStep, ": call was given without seed; pass seed too, or leave call out");
  if (noise) {
    if (!noise_index) check_count(kStep, "noise", *noise, rows);
    const int32_t* own = noise_index ? index_of("noise_index", *noise_index, rows, noise->size(0)) : nullptr;
    args.noise = rows_input("noise", *noise, ScalarType::Float, own);
  }
  if (seed) {
    check_vector(kStep, "seed", *seed, ScalarType::Long, rows);
    args.seed = static_cast<const int64_t*>(seed->data_ptr());
    args.call = args.step;
    if (call) {
      check_vector(kStep, "call", *call, ScalarType::Int, rows);
      args.call = static_cast<const int32_t*>(call->data_ptr());
    }
  }
  check_needs(args);

  memory.input("table", table, sizeof(Row));
  const auto given = [](const MaybeTensor& t) { return t ? &*t : nullptr; };
  const std::pair<const char*, const Tensor*> vectors[] = {
      {"step", &step}, {"parent", &parent}, {"guidance", given(guidance)}, {"seed", given(seed)}, {"call", given(call)},
      {"noise_index", given(noise_index)}, {kHistoryParent[0], given(m1_parent)}, {kHistoryParent[1], given(m2_parent)},
      {kHistoryParent[2], given(m3_parent)}};
  for (const auto& [name, t] : vectors) {
    if (t) memory.input(name, *t, static_cast<int64_t>(t->element_size()));
  }

  args.next = memory.output("out.sample", next_sample, state, sample, rows, state_bytes);
  args.denoised = memory.output("out.denoised", denoised, state, sample, rows, state_bytes);
  if (corrected) args.corrected = memory.output("out.corrected", *corrected, state, sample, rows, state_bytes);
  if (model_input) {
    args.copies = model_input->size(0) == 2 * rows ? 2 : 1;
    args.model_input = memory.output("out.model_input", *model_input, model, sample, args.copies * rows, model_bytes);
  }

  const int64_t chunks = (args.elements + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks * rows, kSerialChunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / chunks, begin = i % chunks * kChunk;
      branch_step_cpu(args, row, begin, begin + kChunk < args.elements ? begin + kChunk : args.elements);
    }
  });
}

void normals(Tensor seed, Tensor call, int64_t tag, Tensor out) {
  constexpr const char* op = "normals";
  SAGE_WANT(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.dim() == 2 && out.is_contiguous(), op, "out",
            "contiguous float32 [R, n] on cpu", out, "use torch.empty");
  Normals args{};
  args.rows = out.size(0);
  args.elements = out.size(1);
  args.tag = static_cast<uint32_t>(tag);
  check_vector(op, "seed", seed, ScalarType::Long, args.rows);
  check_vector(op, "call", call, ScalarType::Int, args.rows);
  args.seed = static_cast<const int64_t*>(seed.data_ptr());
  args.call = static_cast<const int32_t*>(call.data_ptr());
  args.out = static_cast<float*>(out.data_ptr());
  const int64_t chunks = (args.elements + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks * args.rows, 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / chunks, begin = i % chunks * kChunk;
      normals_cpu(args, row, begin, begin + kChunk < args.elements ? begin + kChunk : args.elements);
    }
  });
}

int64_t choose_isa(int64_t force) {
  const int isa = cpu_isa(static_cast<int>(force));
  if (isa < 0) refuse("cpu_isa: this processor, or this build, cannot run that instruction set; use \"auto\"");
  return isa;
}

}  // namespace
}  // namespace sage

STABLE_TORCH_LIBRARY_FRAGMENT(sage_kernels, m) { m.def("cpu_isa(int force) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(sage_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&sage::choose_isa)); }

STABLE_TORCH_LIBRARY_IMPL(sage_kernels, CPU, m) {
  m.impl("branch_step", TORCH_BOX(&sage::branch_step));
  m.impl("normals", TORCH_BOX(&sage::normals));
}

// `import sage_kernels._C` loads this library, which runs the registrations above; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
