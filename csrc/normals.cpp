// The op normals: argument checks, plain arguments, launch.
#include "launch.h"
#include "ops.h"

namespace sage {

void normals(Tensor seed, Tensor call, int64_t tag, Tensor out) {
  const Checks check("normals", out);
  check.type("out", out, ScalarType::Float);
  SAGE_WANT(out.dim() == 2 && out.is_contiguous(), check.op(), "out", "contiguous float32 [R, n]", out, "use torch.empty");
  Normals args{};
  args.rows = out.size(0);
  args.elements = out.size(1);
  args.tag = static_cast<uint32_t>(tag);
  args.seed = check.vector<int64_t>("seed", seed, ScalarType::Long, args.rows);
  args.call = check.vector<int32_t>("call", call, ScalarType::Int, args.rows);
  args.out = static_cast<float*>(out.data_ptr());
#ifdef SAGE_CUDA
  if (!check.on_cpu()) return launch(check, normals_cuda, args);
#endif
  over_chunks(args.rows, args.elements, kSerialHeavyChunks,
              [&](int64_t row, int64_t begin, int64_t end) { normals_cpu(args, row, begin, end); });
}

}  // namespace sage
