// The list of native ops, attached to the schemas of sage_kernels/registry.py through torch's stable ABI: one binary for every
// torch from 2.10 on.
#include "ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

namespace sage {
namespace {

int64_t choose_isa(int64_t force) {
  const int isa = cpu_isa(static_cast<int>(force));
  if (isa < 0) refuse("cpu_isa: this processor, or this build, cannot run that instruction set; use \"auto\"");
  return isa;
}

template <class Library>
void attach(Library& m) {
  m.impl("branch_step", TORCH_BOX(&branch_step));
  m.impl("branch_step_backward", TORCH_BOX(&branch_step_backward));
  m.impl("normals", TORCH_BOX(&normals));
  m.impl("group_mean", TORCH_BOX(&group_mean));
}

}  // namespace
}  // namespace sage

STABLE_TORCH_LIBRARY_FRAGMENT(sage_kernels, m) { m.def("cpu_isa(int force) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(sage_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&sage::choose_isa)); }
STABLE_TORCH_LIBRARY_IMPL(sage_kernels, CPU, m) { sage::attach(m); }
#ifdef SAGE_CUDA
STABLE_TORCH_LIBRARY_IMPL(sage_kernels, CUDA, m) { sage::attach(m); }
#endif

// `import sage_kernels._C` loads this library, which runs the registrations above; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
