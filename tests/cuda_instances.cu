// Every kernel of csrc/cuda in every dtype, so that nvcc makes its machine code (test_cuda_build.py).
#include "channel_sums.cuh"
#include "conv/implicit_gemm.cuh"
#include "elementwise.cuh"
#include "fold.cuh"
#include "pool.cuh"

namespace resnet_fused::cuda {

template <class T, Gate kGate>
void instances_of_gate(const void** at) {
  *at++ = reinterpret_cast<const void*>(bn_backward_kernel<T, kGate>);
  *at++ = reinterpret_cast<const void*>(sums_of_columns_kernel<T, GradientPass<T, kGate, true>>);
  *at++ = reinterpret_cast<const void*>(sums_of_planes_kernel<T, GradientPass<T, kGate, true>>);
}

template <class T, Taking kTaking>
void instances_of_pool(const void** at) {
  *at++ = reinterpret_cast<const void*>(bn_relu_maxpool_kernel<T, kTaking>);
  *at++ = reinterpret_cast<const void*>(bn_relu_maxpool_backward_kernel<T, kTaking>);
  *at++ = reinterpret_cast<const void*>(bn_relu_maxpool_backward_reduce_kernel<T, kTaking>);
}

template <class T>
void instances(const void** at) {
  *at++ = reinterpret_cast<const void*>(bn_act_kernel<T, true>);
  *at++ = reinterpret_cast<const void*>(bn_act_kernel<T, false>);
  *at++ = reinterpret_cast<const void*>(add_relu_kernel<T>);
  *at++ = reinterpret_cast<const void*>(mask_grad_kernel<T, true>);
  *at++ = reinterpret_cast<const void*>(mask_grad_kernel<T, false>);
  *at++ = reinterpret_cast<const void*>(sums_of_columns_kernel<T, StatisticsPass<T>>);
  *at++ = reinterpret_cast<const void*>(sums_of_planes_kernel<T, StatisticsPass<T>>);
  *at++ = reinterpret_cast<const void*>(finalise_moments_kernel<Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(finalise_sums_kernel<Accumulate<T>>);
  instances_of_gate<T, Gate::kOpen>(at);
  instances_of_gate<T, Gate::kMask>(at + 3);
  instances_of_gate<T, Gate::kActivation>(at + 6);
  instances_of_pool<T, Taking::kOctets>(at + 9);
  instances_of_pool<T, Taking::kRagged>(at + 12);
  instances_of_pool<T, Taking::kPlanes>(at + 15);
}

void instances_of_fold(const void** at) {
  *at++ = reinterpret_cast<const void*>(fold_kernel<double, double>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, float>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, BFloat16>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, Half>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<BFloat16, BFloat16>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<Half, Half>);
}

template <class T, class Tile>
void instances_of_conv(const void** at) {
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 1, false, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 1, true, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 3, false, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 3, true, Tile>);
}

void all_instances(const void** at) {
  instances_of_fold(at);
  instances_of_conv<BFloat16, ConvTile128x128>(at);
  instances_of_conv<BFloat16, ConvTile128x64>(at);
  instances_of_conv<BFloat16, ConvTile64x64>(at);
  instances_of_conv<Half, ConvTile128x128>(at);
  instances_of_conv<Half, ConvTile128x64>(at);
  instances_of_conv<Half, ConvTile64x64>(at);
  instances<double>(at);
  instances<float>(at);
  instances<BFloat16>(at);
  instances<Half>(at);
}

}  // namespace resnet_fused::cuda
