// Normalisation, residual addition and ReLU, forward and backward: one pass over memory, a thread for each octet.
//
// A program's threads take neighbouring octets, then stride over the grid. Each thread's loads are issued before the first
// of them is used: two or three tensors of 16 bytes or more.
#pragma once

#include "device.cuh"

namespace resnet_fused::cuda {

struct Elements {
  int64_t count;
  int inner, channels;
  bool aligned;  // every tensor begins at a multiple of 16 bytes

  // Elements of octet number o that exist.
  __device__ __forceinline__ int in(int64_t o) const {
    const int64_t left = count - o * kOctet;
    return left < kOctet ? static_cast<int>(left) : kOctet;
  }

  __host__ __device__ int64_t octets() const { return (count + kOctet - 1) / kOctet; }
};

__device__ __forceinline__ int64_t first_octet() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t octet_stride() { return int64_t{gridDim.x} * blockDim.x; }

// Element j of an octet as it is stored, act(z); its bit of the mask goes into bits.
template <class T>
__device__ __forceinline__ Accumulate<T> activated(Accumulate<T> z, bool with_relu, int j, uint8_t& bits) {
  z = rounded<T>(z);
  bits |= static_cast<uint8_t>(passes(z)) << j;
  return with_relu ? relu(z) : z;
}

// a·dz + b·(x − mean) + c, the gradient behind a batch norm. Where b = 0 x does not count, nor does its NaN: statistics
// are frozen there.
template <class A>
__device__ __forceinline__ A affine_in_centred(A dz, A x, A mean, A a, A b, A c) {
  return multiply_add(b == A(0) ? A(0) : x - mean, b, multiply_add(dz, a, c));
}

// out = act(x·scale + shift [+ residual]), rounded once; mask: one bit for each element of out, where it passes the
// gradient. out may be x. Absent tensors are null.
template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads, kBlocks)
bn_act_kernel(const T* x, const Accumulate<T>* scale, const Accumulate<T>* shift, const T* residual, T* out,
              uint8_t* mask, Elements e) {
  using A = Accumulate<T>;
  ChannelWalk octet_walk(first_octet() * kOctet, octet_stride() * kOctet, e.inner, e.channels);
  for (int64_t o = first_octet(); o < e.octets(); o += octet_stride(), octet_walk.jump()) {
    const int count = e.in(o);
    Octet<T> z = Octet<T>::load(x + o * kOctet, count, e.aligned), r;
    if (residual != nullptr) r = Octet<T>::load(residual + o * kOctet, count, e.aligned);
    ChannelWalk walk = octet_walk;
    uint8_t bits = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        A value = multiply_add(z.at[j], scale[walk.channel], shift[walk.channel]);
        if (residual != nullptr) value += r.at[j];
        z.at[j] = activated<T>(value, kRelu, j, bits);
        walk.step();
      }
    }
    z.store(out + o * kOctet, count, e.aligned);
    if (mask != nullptr) mask[o] = bits;
  }
}

// out = relu(a + b) and its mask (null: not wanted).
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) add_relu_kernel(const T* a, const T* b, T* out, uint8_t* mask, Elements e) {
  for (int64_t o = first_octet(); o < e.octets(); o += octet_stride()) {
    const int count = e.in(o);
    Octet<T> z = Octet<T>::load(a + o * kOctet, count, e.aligned);
    const Octet<T> other = Octet<T>::load(b + o * kOctet, count, e.aligned);
    uint8_t bits = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) z.at[j] = activated<T>(z.at[j] + other.at[j], true, j, bits);
    }
    z.store(out + o * kOctet, count, e.aligned);
    if (mask != nullptr) mask[o] = bits;
  }
}

// out = (grad where mask, else 0) [+ out].
template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks) mask_grad_kernel(const T* grad, const uint8_t* mask, T* out, Elements e) {
  for (int64_t o = first_octet(); o < e.octets(); o += octet_stride()) {
    const int count = e.in(o);
    Octet<T> z = Octet<T>::load(grad + o * kOctet, count, e.aligned), sum;
    if (kAdd) sum = Octet<T>::load(out + o * kOctet, count, e.aligned);
    const uint8_t bits = mask[o];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const Accumulate<T> dz = bits >> j & 1 ? z.at[j] : Accumulate<T>(0);
      z.at[j] = kAdd ? sum.at[j] + dz : dz;
    }
    z.store(out + o * kOctet, count, e.aligned);
  }
}

// What decides where the gradient passes.
enum class Gate { kOpen, kMask, kActivation };  // everywhere; a mask; x·scale + shift, as it is rounded

template <class T>
struct Norm {
  const Accumulate<T>*mean, *scale, *shift;
};

// dz of element j of an octet.
template <class T, Gate kGate>
__device__ __forceinline__ Accumulate<T> gated(Accumulate<T> grad, Accumulate<T> x, unsigned bit, const Norm<T>& norm,
                                               int channel) {
  if (kGate == Gate::kMask) return bit ? grad : Accumulate<T>(0);
  if (kGate == Gate::kActivation) {
    const Accumulate<T> value = multiply_add(x, norm.scale[channel], norm.shift[channel]);
    return passes(rounded<T>(value)) ? grad : Accumulate<T>(0);
  }
  return grad;
}

// dx = a·dz + b·(x − mean) + c. dx may be grad.
template <class T, Gate kGate>
__global__ void __launch_bounds__(kThreads, kBlocks)
bn_backward_kernel(const T* grad, const T* x, const uint8_t* mask, Norm<T> norm, const Accumulate<T>* a,
                   const Accumulate<T>* b, const Accumulate<T>* c, T* dx, Elements e) {
  using A = Accumulate<T>;
  ChannelWalk octet_walk(first_octet() * kOctet, octet_stride() * kOctet, e.inner, e.channels);
  for (int64_t o = first_octet(); o < e.octets(); o += octet_stride(), octet_walk.jump()) {
    const int count = e.in(o);
    Octet<T> g = Octet<T>::load(grad + o * kOctet, count, e.aligned);
    const Octet<T> values = Octet<T>::load(x + o * kOctet, count, e.aligned);
    const unsigned bits = kGate == Gate::kMask ? mask[o] : 0;
    ChannelWalk walk = octet_walk;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        const int channel = walk.channel;
        const A dz = gated<T, kGate>(g.at[j], values.at[j], bits >> j & 1, norm, channel);
        g.at[j] = affine_in_centred(dz, values.at[j], norm.mean[channel], a[channel], b[channel], c[channel]);
        walk.step();
      }
    }
    g.store(dx + o * kOctet, count, e.aligned);
  }
}

}  // namespace resnet_fused::cuda
