// Batch norms folded into the convolutions in front of them, for inference: all layers of a network in one launch.
#pragma once

#include "device.cuh"

namespace resnet_fused::cuda {

// One convolution and its batch norm with running statistics. S: of the parameters, T: of the folded ones.
template <class S, class T>
struct FoldedLayer {
  const S* weight;                         // [outputs, channels, taps], or [outputs, taps, channels] if channels_last
  const S *bias, *gamma, *beta, *mean, *var;  // [outputs]; bias, gamma, beta: or null
  double eps;
  T* folded;  // [outputs, taps, channels]
  T* shift;   // [outputs]
  int outputs, channels, taps;
  bool channels_last;
  int64_t first_row;  // outputs of all layers before this one
};

constexpr int kRowsOfBlock = kThreads / kLanes;  // a warp for each output channel

// folded = weight·s and shift = (bias − mean)·s + beta, s = gamma / √(var + eps). In float64, rounded once.
// Grid: outputs of all layers by kRowsOfBlock. Reads and writes each parameter once.
template <class S, class T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const FoldedLayer<S, T>* layers, int count, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kLanes;
  if (row >= rows) return;
  int low = 0;  // the last layer that begins at row or before it
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (layers[middle].first_row <= row ? low : high) = middle;
  }
  const FoldedLayer<S, T>& layer = layers[low];
  const int64_t k = row - layer.first_row, size = int64_t{layer.channels} * layer.taps;
  const auto or_else = [k](const S* vector, double otherwise) {
    return vector == nullptr ? otherwise : static_cast<double>(vector[k]);
  };
  const double scale = or_else(layer.gamma, 1.0) / sqrt(static_cast<double>(layer.var[k]) + layer.eps);
  for (int64_t i = threadIdx.x % kLanes; i < size; i += kLanes) {
    const int64_t from = layer.channels_last ? i : i % layer.channels * layer.taps + i / layer.channels;
    layer.folded[k * size + i] = static_cast<T>(static_cast<double>(layer.weight[k * size + from]) * scale);
  }
  if (threadIdx.x % kLanes == 0) {
    const double centred = or_else(layer.bias, 0.0) - static_cast<double>(layer.mean[k]);
    layer.shift[k] = static_cast<T>(centred * scale + or_else(layer.beta, 0.0));
  }
}

}  // namespace resnet_fused::cuda
