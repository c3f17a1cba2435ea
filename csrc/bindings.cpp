// resnet_fused._C: host functions that take no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cuda/launch_plan.h"

namespace py = pybind11;

namespace {

using namespace resnet_fused::cuda;

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

py::dict described(int64_t blocks_x, int64_t blocks_y, int threads, int vector, int64_t shared_bytes, int64_t bytes) {
  py::dict plan;
  plan["grid"] = py::make_tuple(blocks_x, blocks_y);
  plan["block"] = threads;
  plan["vector"] = vector;
  plan["shared_bytes"] = shared_bytes;
  plan["bytes"] = bytes;
  return plan;
}

py::dict described(const LaunchPlan& plan) {
  return described(plan.blocks_x, plan.blocks_y, plan.threads, plan.whole ? kOctet : 1, plan.shared_bytes, plan.bytes);
}

// The grids of the CUDA kernels, as their launchers have them.
void define_plans(py::module_& m) {
  m.def(
      "plan_pass",
      [](int64_t count, int64_t inner, int64_t channels, int element_size, int tensors, int masks, int64_t resident) {
        return described(plan_elementwise(count, inner, channels, true, element_size, tensors, masks, resident));
      },
      py::arg("count"), py::arg("inner"), py::arg("channels"), py::arg("element_size"), py::arg("tensors"),
      py::arg("masks"), py::arg("resident"),
      "Of a pass over count elements that reads and writes so many tensors of them and bits of masks. inner: 1 in channels_last,"
      " H * W in contiguous tensors; resident: blocks that a device runs at once. Returns grid, block, vector (elements of a"
      " channel's neighbours that a thread keeps), shared_bytes and the bytes that have to be moved.");
  m.def(
      "plan_sums",
      [](int64_t images, int64_t inner, int64_t channels, bool channels_last, int element_size, int tensors, int values) {
        const int accumulate_size = element_size == 8 ? 8 : 4;
        return described(plan_channel_sums(images, inner, channels, channels_last, true, element_size, accumulate_size,
                                           tensors, values));
      },
      py::arg("images"), py::arg("inner"), py::arg("channels"), py::arg("channels_last"), py::arg("element_size"),
      py::arg("tensors"), py::arg("values"),
      "Of so many sums (values) over the inner elements of each channel of all images, from so many tensors; for any device.");
  m.def(
      "plan_convolution",
      [](int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int size, int stride) {
        const int64_t rows = n * ((h - 1) / stride + 1) * ((w - 1) / stride + 1);
        const ConvPlan plan = plan_conv(n * c * h * w, rows, k, c, size * size);
        py::dict found = described(plan.blocks, 1, kConvTiles[plan.tile].threads, kOctet, plan.shared_bytes, plan.bytes);
        found["tile"] = py::make_tuple(kConvTiles[plan.tile].m, kConvTiles[plan.tile].n);
        return found;
      },
      py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("k"), py::arg("size"), py::arg("stride"),
      "Of a convolution in half precision with a filter [k, c, size, size]; also the tile of outputs of a block.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host functions of resnet_fused that take no tensors.";
  m.def("build_info", &build_info,
        "Compiler, flags, PyTorch built against, CUDA toolkit, instruction sets compiled, detected and selected.");
  define_plans(m);
}
