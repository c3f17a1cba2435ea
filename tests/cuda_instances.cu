// Every kernel of csrc/cuda, so that nvcc makes its machine code (test_cuda_build.py): with ALL_DTYPES in every dtype, else in
// bfloat16.
#include "channel_sums.cuh"
#include "conv/implicit_gemm.cuh"
#include "covariance.cuh"
#include "elementwise.cuh"
#include "fold.cuh"
#include "pool.cuh"

namespace resnet_fused::cuda {

template <class T, class Pass>
void instances_of_sums(const void** at) {
  *at++ = reinterpret_cast<const void*>(sums_of_columns_kernel<T, Pass, true>);
  *at++ = reinterpret_cast<const void*>(sums_of_columns_kernel<T, Pass, false>);
  *at++ = reinterpret_cast<const void*>(sums_of_planes_kernel<T, Pass, true>);
  *at++ = reinterpret_cast<const void*>(sums_of_planes_kernel<T, Pass, false>);
}

template <class T, Gate kGate>
void instances_of_gate(const void** at) {
  *at++ = reinterpret_cast<const void*>(bn_backward_kernel<T, kGate, true>);
  *at++ = reinterpret_cast<const void*>(bn_backward_kernel<T, kGate, false>);
  instances_of_sums<T, GradientPass<T, kGate>>(at);
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
  *at++ = reinterpret_cast<const void*>(finalise_moments_kernel<Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(join_moments_kernel<Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(finalise_sums_kernel<Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(update_running_kernel<Accumulate<T>, T>);
  instances_of_sums<T, StatisticsPass<T>>(at);
  instances_of_gate<T, Gate::kOpen>(at + 4);
  instances_of_gate<T, Gate::kMask>(at + 10);
  instances_of_gate<T, Gate::kActivation>(at + 16);
  instances_of_pool<T, Taking::kOctets>(at + 22);
  instances_of_pool<T, Taking::kRagged>(at + 25);
  instances_of_pool<T, Taking::kPlanes>(at + 28);
}

void instances_of_fold(const void** at) {
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, float>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, BFloat16>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<BFloat16, BFloat16>);
#if defined(ALL_DTYPES)
  *at++ = reinterpret_cast<const void*>(fold_kernel<double, double>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<float, Half>);
  *at++ = reinterpret_cast<const void*>(fold_kernel<Half, Half>);
#endif
}

// D: of moments, U: of sums of products, P and W: of the parameters of norm and convolution.
template <class T, class D, class U, class P, class W>
void instances_of_covariance(const void** at) {
  *at++ = reinterpret_cast<const void*>(through_covariance_kernel<T, double, D>);
  *at++ = reinterpret_cast<const void*>(covariance_rows_kernel<T, D, U, P, W>);
  *at++ = reinterpret_cast<const void*>(coupling_kernel<T, D>);
  *at++ = reinterpret_cast<const void*>(coupling_shift_kernel<T>);
  *at++ = reinterpret_cast<const void*>(scale_shift_kernel<D, P, Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(scale_shift_kernel<Accumulate<T>, P, Accumulate<T>>);
  *at++ = reinterpret_cast<const void*>(coefficients_kernel<Accumulate<T>, P>);
}

void instances_of_algebra(const void** at) {
  instances_of_covariance<float, double, double, float, float>(at);
  instances_of_covariance<BFloat16, float, float, float, float>(at + 7);
#if defined(ALL_DTYPES)
  instances_of_covariance<double, double, double, double, double>(at + 14);
  instances_of_covariance<BFloat16, float, float, BFloat16, BFloat16>(at + 21);
  instances_of_covariance<Half, float, double, float, float>(at + 28);
  instances_of_covariance<Half, float, double, Half, Half>(at + 35);
  instances_of_covariance<Half, float, double, float, Half>(at + 42);
#endif
}

template <class T, class Tile>
void instances_of_conv(const void** at) {
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 1, false, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 1, true, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 3, false, Tile>);
  *at++ = reinterpret_cast<const void*>(conv_kernel<T, 3, true, Tile>);
}

template <class T>
void instances_of_tensor_cores(const void** at) {
  instances_of_conv<T, ConvTile128x128>(at);
  instances_of_conv<T, ConvTile128x64>(at + 4);
  instances_of_conv<T, ConvTile64x64>(at + 8);
}

void all_instances(const void** at) {
  instances_of_fold(at);
  instances_of_algebra(at);
  instances_of_tensor_cores<BFloat16>(at);
  instances<BFloat16>(at);
#if defined(ALL_DTYPES)
  instances<float>(at);
  instances_of_tensor_cores<Half>(at);
  instances<double>(at);
  instances<Half>(at);
#endif
}

}  // namespace resnet_fused::cuda
