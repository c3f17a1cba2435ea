// What the CUDA kernels share. The same text is compiled by nvcc, and by a host compiler behind an emulation of CUDA's
// vocabulary, which tests use to run the kernels on a processor (tests/cuda_on_cpu).
//
// An activation is its elements in memory order; the channel of element i is i / inner % channels, where inner is 1 in
// channels_last and H·W in contiguous tensors. Threads take octets, eight neighbours: in half precision 16 bytes, and one
// byte of a mask.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <type_traits>

#include "sizes.h"

#if defined(__CUDACC__)
#define RESNET_FUSED_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace resnet_fused::cuda {

using c10::BFloat16;
using c10::Half;

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kBlocks = 4;  // of a multiprocessor: up to 64 registers a thread, where ptxas would spill for the sake of six

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

// Eight elements in the accumulation type.
template <class T>
struct Octet {
  Accumulate<T> at[kOctet];

  // count of them from p; others are 0. aligned: p is a multiple of 16 bytes.
  static __device__ __forceinline__ Octet load(const T* p, int count, bool aligned) {
    Octet octet;
    if (aligned && count == kOctet) {
      constexpr int kLoads = kOctet * sizeof(T) / sizeof(Bytes16), kEach = sizeof(Bytes16) / sizeof(T);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Bytes16 bytes = reinterpret_cast<const Bytes16*>(p)[i];
        T values[kEach];
        memcpy(values, &bytes, sizeof(bytes));
#pragma unroll
        for (int j = 0; j < kEach; ++j) octet.at[i * kEach + j] = static_cast<Accumulate<T>>(values[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) octet.at[j] = j < count ? static_cast<Accumulate<T>>(p[j]) : Accumulate<T>(0);
    }
    return octet;
  }

  __device__ __forceinline__ void store(T* p, int count, bool aligned) const {
    if (aligned && count == kOctet) {
      constexpr int kStores = kOctet * sizeof(T) / sizeof(Bytes16), kEach = sizeof(Bytes16) / sizeof(T);
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        T values[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) values[j] = static_cast<T>(at[i * kEach + j]);
        Bytes16 bytes;
        memcpy(&bytes, values, sizeof(bytes));
        reinterpret_cast<Bytes16*>(p)[i] = bytes;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (j < count) p[j] = static_cast<T>(at[j]);
      }
    }
  }
};

// As it will be stored.
template <class T>
__device__ __forceinline__ Accumulate<T> rounded(Accumulate<T> z) {
  return static_cast<Accumulate<T>>(static_cast<T>(z));
}

// a·b + c rounded once: forward and backward find the same bits, whatever the compiler would have contracted.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// where(z <= 0, 0, z): NaN stays NaN, as in stock PyTorch.
template <class A>
__device__ __forceinline__ A relu(A z) {
  return z <= A(0) ? A(0) : z;
}

// Where ReLU lets the gradient through: also at NaN.
template <class A>
__device__ __forceinline__ bool passes(A z) {
  return !(z <= A(0));
}

// Channels of neighbouring elements, from any element on; and then from ``stride`` elements further, without a division.
struct ChannelWalk {
  int inner, channels;
  int channel, offset;  // offset: of the element among the inner ones
  int jump_channels, jump_offset;

  __device__ __forceinline__ ChannelWalk(int64_t first, int64_t stride, int inner, int channels)
      : inner(inner),
        channels(channels),
        channel(static_cast<int>(first / inner % channels)),
        offset(static_cast<int>(first % inner)),
        jump_channels(static_cast<int>(stride / inner % channels)),
        jump_offset(static_cast<int>(stride % inner)) {}

  __device__ __forceinline__ void advance(int by_channels, int by_offset) {
    offset += by_offset;
    channel += by_channels;
    if (offset >= inner) {
      offset -= inner;
      ++channel;
    }
    if (channel >= channels) channel -= channels;
  }

  __device__ __forceinline__ void step() {
    if (inner == 1) {
      advance(1, 0);
    } else {
      advance(0, 1);
    }
  }

  __device__ __forceinline__ void jump() { advance(jump_channels, jump_offset); }
};

}  // namespace resnet_fused::cuda
