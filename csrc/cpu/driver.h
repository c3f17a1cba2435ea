// Between PyTorch's stable ABI and the kernels: checks of the arguments, geometry, scratch memory, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "args.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- checks (checks.cpp): errors name the argument, what was expected and what came ---

std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes);
// Whether a 4-D tensor is dense in channels_last, or in contiguous; strides of dimensions of size 1 do not count.
bool dense(const Tensor& t, bool channels_last);

// An operator's activations: the first one sets dtype, shape and layout for the others.
struct Activations {
  Activations(const char* op, const char* name, const Tensor& x);

  // Another activation of the same dtype, shape and layout.
  const void* like(const char* name, const Tensor& t) const;
  // A per-channel vector [C] in the accumulation dtype, as the kernels want it: periodic for channels_last.
  const void* channels(const char* name, const Tensor& t);
  const uint8_t* mask(const char* name, const Tensor& t) const;
  // A pooled activation or its indices [N, C, (H-1)/2+1, (W-1)/2+1] in this layout.
  const void* pooled(const char* name, const Tensor& t, ScalarType dtype) const;

  Tensor new_pooled(ScalarType dtype) const;
  Tensor new_channels() const;
  Tensor new_bytes(i64 n) const;
  Tensor new_mask(bool wanted) const { return new_bytes(wanted ? mask_bytes() : 0); }
  i64 mask_bytes() const { return (numel + 7) / 8; }

  const char* op;
  Tensor x;
  Dtype dtype;
  ScalarType scalar_type, acc_type;
  i64 numel, element_size, acc_size;
  Geometry g;

 private:
  std::vector<std::unique_ptr<char[]>> periodic_;
};

// --- running (driver.cpp) ---

const Table& kernels(Dtype dtype);
const Products& products(Dtype dtype);

// Runs an element-wise kernel over all elements of the tensor.
void run_elements(const Activations& t, RangeKernel kernel, const Args& args);

// Runs a kernel over `units` of `elements` elements each, with `scratch` accumulators per thread.
void run_units(const Activations& t, RangeKernel kernel, const Args& args, i64 units, i64 elements, i64 scratch);

// Partial sums of the tiles, merged in float64 in the order of the tiles.
struct Partials {
  Partials(const Activations& t, int arrays, Args& args);
  // Σ over tiles of sum1 and sum2, as [C] tensors.
  std::tuple<Tensor, Tensor> sums(const Activations& t) const;
  // Mean and biased variance from (tile_shift, sum1, sum2).
  std::tuple<Tensor, Tensor> moments(const Activations& t) const;

 private:
  i64 size_;  // of one array, in accumulators
  std::unique_ptr<char[]> data_;
};

}  // namespace resnet_fused
