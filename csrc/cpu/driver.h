// Between PyTorch's stable ABI and the kernels: geometry, scratch memory, threads.
#pragma once

#include <memory>
#include <vector>

#include "../arguments.h"
#include "args.h"

namespace resnet_fused {

// Activations as the kernels take them: a dtype's number, and how they are cut into tiles (tiles.cpp).
struct TiledActivations : Activations {
  TiledActivations(const char* op, const char* name, const Tensor& x);

  // A per-channel vector [C] in the accumulation dtype, as the kernels want it: periodic for channels_last.
  const void* channels(const char* name, const Tensor& t);

  Dtype dtype;
  Geometry g;

 private:
  std::vector<std::unique_ptr<char[]>> periodic_;
};

// --- running (driver.cpp) ---

const Table& kernels(Dtype dtype);
const Products& products(Dtype dtype);

// Runs an element-wise kernel over all elements of the tensor.
void run_elements(const TiledActivations& t, RangeKernel kernel, const Args& args);

// Runs a kernel over `units` of `elements` elements each, with `scratch` accumulators per thread.
void run_units(const TiledActivations& t, RangeKernel kernel, const Args& args, i64 units, i64 elements, i64 scratch);

// Partial sums of the tiles, merged in float64 in the order of the tiles.
struct Partials {
  Partials(const TiledActivations& t, int arrays, Args& args);
  // Σ over tiles of sum1 and sum2, as [C] tensors.
  std::tuple<Tensor, Tensor> sums(const TiledActivations& t) const;
  // Mean and biased variance from (tile_shift, sum1, sum2).
  std::tuple<Tensor, Tensor> moments(const TiledActivations& t) const;

 private:
  i64 size_;  // of one array, in accumulators
  std::unique_ptr<char[]> data_;
};

}  // namespace resnet_fused
