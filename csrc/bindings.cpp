// resnet_fused._C: host functions that take no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {


std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> instruction_sets() {
#if defined(RESNET_FUSED_X86)
  return {"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  return {"baseline"};
#endif
}

// How the library was compiled, and which kernels it chooses here.
py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = RESNET_FUSED_FLAGS;
  info["torch"] = RESNET_FUSED_TORCH;
  info["cuda"] = RESNET_FUSED_CUDA;
  info["instruction_sets"] = instruction_sets();
  info["detected"] = resnet_fused::kIsaNames[static_cast<int>(resnet_fused::detected_isa())];
  info["selected"] = resnet_fused::kIsaNames[static_cast<int>(resnet_fused::selected_isa())];
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host functions of resnet_fused that take no tensors.";
  m.def("build_info", &build_info,
        "Compiler, flags, PyTorch built against, CUDA toolkit, instruction sets compiled, detected and selected.");
}
