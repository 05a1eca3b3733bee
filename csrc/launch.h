// Runs a kernel where its tensors are: over the threads of the CPU, or as one launch on torch's current stream of the GPU.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace sage {

// A thread gets at least this many chunks; fewer where an element costs more than its traffic.
constexpr int64_t kSerialChunks = 8, kSerialHeavyChunks = 2;

// run(row, begin, end) for every chunk of every row.
template <class Run>
void over_chunks(int64_t rows, int64_t elements, int64_t serial, const Run& run) {
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks * rows, serial, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / chunks, begin = i % chunks * kChunk;
      run(row, begin, begin + kChunk < elements ? begin + kChunk : elements);
    }
  });
}

#ifdef SAGE_CUDA
// The stream's getter lives in libtorch_cuda.so, which a torch without CUDA lacks; tensors on a GPU mean that it is loaded.
inline void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (getter == nullptr || getter(device, &stream) != 0) refuse("sage_kernels: torch's current CUDA stream was not found");
  return stream;
}

template <class Args>
void launch(const Checks& check, int (*kernel)(const Args&, void*), const Args& args) {
  const torch::stable::accelerator::DeviceGuard guard(check.device());
  const int code = kernel(args, current_stream(check.device()));
  if (code != 0) refuse(check.op(), ": the CUDA launch failed: ", cuda_error(code));
}
#endif

}  // namespace sage
