// normals on a GPU: one launch; a thread draws the four elements of one counter.
#include "device.cuh"

namespace sage {
namespace device {
namespace {

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) normals_kernel(const __grid_constant__ Normals args) {
  const int64_t row = blockIdx.x;
  float* const out = args.out + row * args.elements;
  for (int64_t at = first_element(4); at < args.elements; at += next_element(4)) {
    const int count = static_cast<int>(args.elements - at < 4 ? args.elements - at : 4);
    store<kAligned, float, 4>(draw<4>(args.seed[row], args.call[row], args.tag, at), out, at, count);
  }
}

}  // namespace
}  // namespace device

int normals_cuda(const Normals& args, void* stream) {
  if (args.rows == 0 || args.elements == 0) return cudaSuccess;
  const dim3 grid = device::grid_of(args.rows, args.elements, 4);
  const auto on = static_cast<cudaStream_t>(stream);
  if (device::aligned<4>(args.out, args.elements, 4)) {
    device::normals_kernel<true><<<grid, device::kThreads, 0, on>>>(args);
  } else {
    device::normals_kernel<false><<<grid, device::kThreads, 0, on>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace sage
