// The op branch_step: argument checks, plain arguments, launch.
#include <utility>
#include <vector>

#include "launch.h"
#include "ops.h"

namespace sage {
namespace {

constexpr const char* kStep = "branch_step";

// Outputs share no memory with inputs or with each other.
class Memory {
 public:
  void input(const char* name, const Tensor& t, int64_t row_bytes) {
    if (t.numel() == 0) return;
    const char* first = static_cast<const char*>(t.data_ptr());
    const int64_t reach = (t.size(0) - 1) * t.stride(0) * static_cast<int64_t>(t.element_size());
    taken_[count_++] = {name, first, first + reach + row_bytes};
  }
  void input(const char* name, const MaybeTensor& t) {  // a vector
    if (t) input(name, *t, static_cast<int64_t>(t->element_size()));
  }

  void output(const char* name, const Tensor& t) {
    const char* first = static_cast<const char*>(t.data_ptr());
    const char* last = first + t.numel() * static_cast<int64_t>(t.element_size());
    for (int i = 0; i < count_ && first != last; i++) {
      if (first < taken_[i].last && taken_[i].first < last) {
        refuse(kStep, ": ", name, " overlaps ", taken_[i].name, "; give each output memory of its own (swap two buffers)");
      }
    }
    taken_[count_++] = {name, first, last};
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

bool alike(const int32_t* index, int64_t r) { return index == nullptr || index[r] == index[r - 1]; }

// Whether output row r is made of the same as the row before it: siblings at a branch.
bool repeats(const BranchStep& args, int64_t r) {
  const RowsIn& noise = args.noise;
  bool same = alike(args.sample.index, r) && alike(args.step, r) && alike(noise.index, r) && (noise.data == nullptr || noise.index);
  for (const RowsIn& m : args.m) same = same && alike(m.index, r);
  if (args.guidance) same = same && args.guidance[r] == args.guidance[r - 1];
  if (args.seed) same = same && args.seed[r] == args.seed[r - 1] && args.call[r] == args.call[r - 1];
  return same;
}

void copy_place(void* data, int64_t width, int64_t elements, int64_t from, int64_t to, int64_t begin, int64_t end) {
  if (data == nullptr) return;
  char* const bytes = static_cast<char*>(data) + begin * width;
  memcpy(bytes + to * elements * width, bytes + from * elements * width, (end - begin) * width);
}

// The outputs of row `from` are those of row `to` too, at elements [begin, end).
void copy_outputs(const BranchStep& args, int64_t from, int64_t to, int64_t begin, int64_t end) {
  for (void* data : {args.next, args.denoised, args.corrected}) {
    copy_place(data, size_of(args.state), args.elements, from, to, begin, end);
  }
  for (int32_t copy = 0; copy < args.copies; copy++) {
    const int64_t half = copy * args.rows;
    copy_place(args.model_input, size_of(args.model), args.elements, half + from, half + to, begin, end);
  }
}

// On the CPU siblings are computed once and copied while they are in a cache.
void branch_step_on_cpu(const BranchStep& args) {
  std::vector<int64_t> first;  // of every run of rows that repeat
  for (int64_t r = 0; r < args.rows; r++) {
    if (r == 0 || !repeats(args, r)) first.push_back(r);
  }
  const auto runs = static_cast<int64_t>(first.size());
  first.push_back(args.rows);
  over_chunks(runs, args.elements, kSerialChunks, [&](int64_t run, int64_t begin, int64_t end) {
    branch_step_cpu(args, first[run], begin, end);
    for (int64_t r = first[run] + 1; r < first[run + 1]; r++) copy_outputs(args, first[run], r, begin, end);
  });
}

}  // namespace

void branch_step(Tensor sample, Tensor model_output, Tensor table, Tensor step, Tensor parent, MaybeTensor uncond_output,
                 MaybeTensor guidance, MaybeTensor m1, MaybeTensor m2, MaybeTensor m3, MaybeTensor m1_parent,
                 MaybeTensor m2_parent, MaybeTensor m3_parent, MaybeTensor last_sample, MaybeTensor noise,
                 MaybeTensor noise_index, MaybeTensor seed, MaybeTensor call, Tensor next_sample, MaybeTensor denoised,
                 MaybeTensor corrected, MaybeTensor model_input) {
  const Checks check(kStep, sample);
  SAGE_WANT(sample.dim() > 0, kStep, "sample", "[R_in, *shape]", sample, "add a row dimension");
  SAGE_WANT(parent.dim() == 1, kStep, "parent", "[R_out]", parent, "pass one index per output row");
  BranchStep args{};
  args.rows = parent.size(0);
  args.model = dtype_of(kStep, "model_output", model_output);
  args.state = state_of(kStep, sample, model_output);
  const ScalarType state = sample.scalar_type(), model = model_output.scalar_type();
  args.elements = elements_of(sample);
  const int64_t rows = args.rows, rows_in = sample.size(0);

  args.table = table_of(check, table);
  args.table_rows = table.size(0);
  const int32_t* const from = check.index("parent", parent, rows, rows_in);
  args.step = check.index("step", step, rows, table.size(0));

  Memory memory;
  const auto rows_input = [&](const char* name, const Tensor& t, ScalarType dtype, const int32_t* index) {
    const RowsIn in = check.rows(name, t, dtype, sample, index);
    memory.input(name, t, args.elements * static_cast<int64_t>(t.element_size()));
    return in;
  };
  args.sample = rows_input("sample", sample, state, from);
  args.model_output = rows_input("model_output", model_output, model, from);
  check.count("model_output", model_output, rows_in);

  if (uncond_output.has_value() != guidance.has_value()) {
    refuse(kStep, ": uncond_output and guidance belong together; pass both, or neither for an unguided step");
  }
  if (guidance) {
    args.uncond = rows_input("uncond_output", *uncond_output, model, from);
    check.count("uncond_output", *uncond_output, rows_in);
    args.guidance = check.vector<float>("guidance", *guidance, ScalarType::Float, rows);
  }

  const std::pair<const MaybeTensor&, const MaybeTensor&> history[3] = {{m1, m1_parent}, {m2, m2_parent}, {m3, m3_parent}};
  constexpr const char* kHistory[3] = {"history[0]", "history[1]", "history[2]"};
  constexpr const char* kHistoryParent[3] = {"history_parent[0]", "history_parent[1]", "history_parent[2]"};
  for (int i = 0; i < 3; i++) {
    const auto& [m, index] = history[i];
    if (!m) continue;
    const int32_t* own = index ? check.index(kHistoryParent[i], *index, rows, m->size(0)) : from;
    if (!index && m->size(0) != rows_in) check.range("parent", from, rows, m->size(0));
    args.m[i] = rows_input(kHistory[i], *m, state, own);
  }
  if (last_sample) {
    args.last = rows_input("last_sample", *last_sample, state, from);
    check.count("last_sample", *last_sample, rows_in);
  }

  if (noise && seed) refuse(kStep, ": noise and seed were both given; pass the noise tensor, or seeds for Philox noise");
  if (noise_index && !noise) refuse(kStep, ": noise_index was given without noise; pass noise too, or leave noise_index out");
  if (call && !seed) refuse(kStep, ": call was given without seed; pass seed too, or leave call out");
  if (noise) {
    if (!noise_index) check.count("noise", *noise, rows);
    const int32_t* own = noise_index ? check.index("noise_index", *noise_index, rows, noise->size(0)) : nullptr;
    args.noise = rows_input("noise", *noise, ScalarType::Float, own);
  }
  if (seed) {
    args.seed = check.vector<int64_t>("seed", *seed, ScalarType::Long, rows);
    args.call = call ? check.vector<int32_t>("call", *call, ScalarType::Int, rows) : args.step;
  }
  if (check.on_cpu()) check_needs(args);

  memory.input("table", table, sizeof(Row));
  memory.input("step", step);
  memory.input("parent", parent);
  memory.input("guidance", guidance);
  memory.input("seed", seed);
  memory.input("call", call);
  memory.input("noise_index", noise_index);
  for (int i = 0; i < 3; i++) memory.input(kHistoryParent[i], history[i].second);

  const auto output = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t count) {
    void* const data = check.output(name, t, dtype, sample, count);
    memory.output(name, t);
    return data;
  };
  args.next = output("out.sample", next_sample, state, rows);
  if (denoised) args.denoised = output("out.denoised", *denoised, state, rows);
  if (corrected) args.corrected = output("out.corrected", *corrected, state, rows);
  if (model_input) {
    args.copies = model_input->size(0) == 2 * rows ? 2 : 1;
    args.model_input = output("out.model_input", *model_input, model, args.copies * rows);
  }

#ifdef SAGE_CUDA
  if (!check.on_cpu()) return launch(check, branch_step_cuda, args);
#endif
  branch_step_on_cpu(args);
}

}  // namespace sage
