// Drives the CPU kernels over exactly sized heap buffers, for AddressSanitizer and UndefinedBehaviorSanitizer. No torch.
//
//     c++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined csrc/tests/sanitize.cpp csrc/cpu/branch_step_cpu.cpp
//
// Prints the instruction sets it ran; a fault ends the program with the sanitizer's report.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../branch_step.h"

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

void run_case(int64_t elements) {
  const DType models[] = {DType::kFloat32, DType::kBFloat16, DType::kBFloat16, DType::kFloat16, DType::kFloat16};
  const DType states[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat32, DType::kFloat16};
  const int kind = static_cast<int>(between(0, 4));
  const int64_t rows_in = between(1, 3), rows = between(1, 3), gap = between(0, 5);
  const int64_t model_bytes = models[kind] == DType::kFloat32 ? 4 : 2, state_bytes = states[kind] == DType::kFloat32 ? 4 : 2;
  Bytes memory;
  memory.reserve(32);

  std::vector<int32_t> parent(rows), step(rows), call(rows);
  std::vector<int64_t> seed(rows);
  std::vector<float> guidance(rows, 7.5f);
  std::vector<Row> table(3);
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
  const auto input = [&](int64_t width) {  // rows_in rows, `gap` elements apart, and nothing behind the last one
    const int64_t stride = elements + gap;
    return RowsIn{buffer(memory, ((rows_in - 1) * stride + elements) * width), stride, parent.data()};
  };
  BranchStep args{};
  args.sample = input(state_bytes);
  args.last = input(state_bytes);
  for (RowsIn& m : args.m) m = input(state_bytes);
  args.model_output = input(model_bytes);
  if (between(0, 1)) args.uncond = input(model_bytes), args.guidance = guidance.data();
  if (between(0, 1)) {
    args.seed = seed.data(), args.call = call.data();
  } else {
    args.noise = input(4);
  }
  args.table = table.data();
  args.step = step.data();
  args.rows = rows, args.elements = elements;
  args.model = models[kind], args.state = states[kind];
  args.next = buffer(memory, rows * elements * state_bytes);
  args.denoised = buffer(memory, rows * elements * state_bytes);
  if (between(0, 1)) args.corrected = buffer(memory, rows * elements * state_bytes);
  args.copies = static_cast<int32_t>(between(0, 2));
  if (args.copies) args.model_input = buffer(memory, args.copies * rows * elements * model_bytes);

  std::vector<float> normals(rows * elements);
  const Normals draws{seed.data(), call.data(), 3, normals.data(), rows, elements};
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t begin = 0; begin < elements; begin += kChunk) {
      const int64_t end = begin + kChunk < elements ? begin + kChunk : elements;
      branch_step_cpu(args, row, begin, end);
      normals_cpu(draws, row, begin, end);
    }
  }
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
