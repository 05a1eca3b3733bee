// Drives the CPU kernels over exactly sized heap buffers, for AddressSanitizer and UndefinedBehaviorSanitizer. No torch.
//
//     c++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined csrc/tests/sanitize.cpp csrc/cpu/kernels_cpu.cpp
//
// Prints the instruction sets it ran; a fault ends the program with the sanitizer's report.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../kernels.h"

using namespace sage;

namespace {

std::mt19937 random_bits(1);

int64_t between(int64_t low, int64_t high) { return low + random_bits() % (high - low + 1); }

using Bytes = std::vector<std::vector<uint8_t>>;

void* buffer(Bytes& owner, int64_t bytes) {
  owner.emplace_back(bytes);
  for (uint8_t& byte : owner.back()) byte = static_cast<uint8_t>(random_bits());
  return owner.back().data();
}

constexpr DType kModels[] = {DType::kFloat32, DType::kBFloat16, DType::kBFloat16, DType::kFloat16, DType::kFloat16};
constexpr DType kStates[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat32, DType::kFloat16};

// One random call of every kernel: memory of exactly the size that is said.
struct Case {
  Bytes memory;
  const int kind = static_cast<int>(between(0, 4));
  const DType model = kModels[kind], state = kStates[kind];
  const int64_t elements, rows_in = between(1, 3), rows = between(1, 3), gap = between(0, 5);
  std::vector<int32_t> parent, step, call;
  std::vector<int64_t> seed;
  std::vector<float> guidance;
  std::vector<Row> table;

  explicit Case(int64_t d) : elements(d), parent(rows), step(rows), call(rows), seed(rows), guidance(rows, 7.5f), table(3) {
    memory.reserve(64);
    for (Row& k : table) {
      float* values = &k.p;
      for (int i = 0; i < 15; i++) values[i] = between(0, 2) ? static_cast<float>(between(-9, 9)) / 7 : 0.0f;
      k.clip = between(0, 1) ? INFINITY : 1.5f;
    }
    for (int64_t r = 0; r < rows; r++) {
      parent[r] = static_cast<int32_t>(between(0, rows_in - 1));
      step[r] = static_cast<int32_t>(between(0, 2));
      call[r] = static_cast<int32_t>(random_bits());
      seed[r] = static_cast<int64_t>(random_bits()) << 31;
    }
  }

  RowsIn input(DType type, int64_t count, int64_t width, const int32_t* index) {  // rows `gap` apart, nothing behind the last
    const int64_t stride = width + gap;
    return RowsIn{buffer(memory, ((count - 1) * stride + width) * size_of(type)), stride, count, index};
  }
  void* output(DType type, int64_t count, int64_t width) { return buffer(memory, count * width * size_of(type)); }
  void* maybe(DType type, int64_t count) { return between(0, 1) ? output(type, count, elements) : nullptr; }

  template <class Run>
  void over_row(const Run& run) const {
    for (int64_t begin = 0; begin < elements; begin += kChunk) run(begin, begin + kChunk < elements ? begin + kChunk : elements);
  }

  void branch_step() {
    BranchStep args{};
    args.sample = input(state, rows_in, elements, parent.data());
    args.last = input(state, rows_in, elements, parent.data());
    for (RowsIn& m : args.m) m = input(state, rows_in, elements, parent.data());
    args.model_output = input(model, rows_in, elements, parent.data());
    if (between(0, 1)) args.uncond = input(model, rows_in, elements, parent.data()), args.guidance = guidance.data();
    if (between(0, 1)) args.seed = seed.data(), args.call = call.data();
    else args.noise = input(DType::kFloat32, rows_in, elements, parent.data());
    args.table = table.data(), args.table_rows = 3, args.step = step.data();
    args.rows = rows, args.elements = elements, args.model = model, args.state = state;
    args.next = output(state, rows, elements);
    args.denoised = maybe(state, rows);
    args.corrected = maybe(state, rows);
    args.copies = static_cast<int32_t>(between(0, 2));
    if (args.copies) args.model_input = output(model, args.copies * rows, elements);
    for (int64_t row = 0; row < rows; row++) over_row([&](int64_t b, int64_t e) { branch_step_cpu(args, row, b, e); });
  }

  void branch_step_backward() {
    std::vector<int32_t> indptr(rows_in + 1), children;
    for (int64_t i = 0; i < rows_in; i++) {
      for (int64_t r = 0; r < rows; r++) {
        if (parent[r] == i) children.push_back(static_cast<int32_t>(r));
      }
      indptr[i + 1] = static_cast<int32_t>(children.size());
    }
    BranchStepBackward args{};
    args.copies = static_cast<int32_t>(between(1, 2));
    args.g_sample = maybe(state, rows), args.g_denoised = maybe(state, rows), args.g_corrected = maybe(state, rows);
    args.g_model_input = maybe(model, args.copies * rows);
    args.sample = input(state, rows_in, elements, parent.data());
    args.model_output = input(model, rows_in, elements, parent.data());
    if (between(0, 1)) args.uncond = input(model, rows_in, elements, parent.data()), args.guidance = guidance.data();
    args.table = table.data(), args.table_rows = 3, args.step = step.data();
    args.indptr = indptr.data(), args.children = children.data();
    args.d_sample = maybe(state, rows_in), args.d_last = maybe(state, rows_in);
    for (void*& d : args.d_m) d = maybe(state, rows_in);
    args.d_model_output = maybe(model, rows_in), args.d_uncond = maybe(model, rows_in);
    args.rows = rows_in, args.rows_out = rows, args.elements = elements, args.model = model, args.state = state;
    for (int64_t row = 0; row < rows_in; row++) over_row([&](int64_t b, int64_t e) { branch_step_backward_cpu(args, row, b, e); });
  }

  void normals() {
    const Normals args{seed.data(), call.data(), 3, static_cast<float*>(output(DType::kFloat32, rows, elements)), rows, elements};
    for (int64_t row = 0; row < rows; row++) over_row([&](int64_t b, int64_t e) { normals_cpu(args, row, b, e); });
  }

  void group_mean() {
    constexpr DType types[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    constexpr DType masks[] = {DType::kUInt8, DType::kInt32, DType::kInt64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    const std::vector<int32_t> indptr{0, 1, 1 + static_cast<int32_t>(rows)};
    std::vector<int32_t> members{0};
    members.insert(members.end(), parent.begin(), parent.end());
    GroupMean args{};
    args.type = types[between(0, 3)], args.mask_type = masks[between(0, 5)];
    args.rows = 2, args.elements = elements, args.mask_elements = between(0, 9);
    args.in = input(args.type, rows_in, elements, nullptr);
    args.mask = input(args.mask_type, rows_in, args.mask_elements, nullptr);
    args.indptr = indptr.data(), args.members = members.data();
    args.out = output(args.type, 2, elements);
    args.united = output(args.mask_type, 2, args.mask_elements);
    for (int64_t row = 0; row < 2; row++) {
      over_row([&](int64_t b, int64_t e) { group_mean_cpu(args, row, b, e); });
      group_union_cpu(args, row);
    }
  }
};

void run_case(int64_t elements) {
  Case(elements).branch_step();
  Case(elements).branch_step_backward();
  Case(elements).normals();
  Case(elements).group_mean();
}

}  // namespace

int main() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  for (int isa = 0; isa < 3; isa++) {
    if (cpu_isa(isa) < 0) continue;
    for (int64_t elements : {1, 2, 3, 7, 8, 31, 64, 255, 256, 257, 4096, 4099, 8195}) {
      for (int repeat = 0; repeat < 12; repeat++) run_case(elements);
    }
    std::printf("%s\n", names[isa]);
  }
  return 0;
}
