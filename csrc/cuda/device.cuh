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

// Memory at a multiple of 16 bytes, as it is read and written. A processor would take any address: it checks this one.
template <class T>
__device__ __forceinline__ auto* pieces_at(T* p) {
#if !defined(__CUDACC__)
  emulation::check_aligned(p);
#endif
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Bytes16, Bytes16>*>(p);
}

// Eight elements as they are stored: in half precision half the registers of an octet.
template <class T>
struct Packed {
  static constexpr int kPieces = kOctet * sizeof(T) / sizeof(Bytes16);
  Bytes16 pieces[kPieces];

  // count of them from p; others are 0. aligned: p is a multiple of 16 bytes.
  static __device__ __forceinline__ Packed load(const T* p, int count, bool aligned) {
    Packed packed;
    if (aligned && count == kOctet) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) packed.pieces[i] = pieces_at(p)[i];
    } else {
      T values[kOctet];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) values[j] = j < count ? p[j] : T(0);
      memcpy(packed.pieces, values, sizeof(values));
    }
    return packed;
  }
};

// Eight elements in the accumulation type.
template <class T>
struct Octet {
  Accumulate<T> at[kOctet];

  static __device__ __forceinline__ Octet of(const Packed<T>& packed) {
    T values[kOctet];
    memcpy(values, packed.pieces, sizeof(values));
    Octet octet;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) octet.at[j] = static_cast<Accumulate<T>>(values[j]);
    return octet;
  }

  static __device__ __forceinline__ Octet filled(Accumulate<T> value) {
    Octet octet;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) octet.at[j] = value;
    return octet;
  }

  // As Packed.
  static __device__ __forceinline__ Octet load(const T* p, int count, bool aligned) {
    return of(Packed<T>::load(p, count, aligned));
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
        pieces_at(p)[i] = bytes;
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

// The largest number that is stored as 0: half the smallest subnormal, a tie that goes to even.
template <class T>
inline constexpr Accumulate<T> kStoredAsZero = std::is_same_v<T, BFloat16> ? 0x1p-134f
                                               : std::is_same_v<T, Half>   ? 0x1p-25f
                                                                           : 0.0f;

// Where ReLU lets the gradient through: also at NaN. Of z as it is stored, without a conversion: those of single elements are
// slow, and neighbours are stored in pairs.
template <class T>
__device__ __forceinline__ bool passes_as_stored(Accumulate<T> z) {
  return !(z <= kStoredAsZero<T>);
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

// Elements of each tensor that a thread has under way at once: in half precision 64 bytes. What bandwidth times latency asks
// of a multiprocessor is about 25 KiB: of four blocks 24 bytes a thread, of two 48.
template <class T>
inline constexpr int kInFlight = sizeof(T) > 4 ? 1 : 8 / sizeof(T);

// finish(i, load(i)) for i = first, first + stride, … below end, so many loads under way at once.
template <int kAtOnce, class Load, class Finish>
__device__ __forceinline__ void in_batches(int64_t first, int64_t stride, int64_t end, Load load, Finish finish) {
  for (int64_t i = first; i < end; i += kAtOnce * stride) {
    decltype(load(i)) loaded[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k == 0 || i + k * stride < end) loaded[k] = load(i + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k == 0 || i + k * stride < end) finish(i + k * stride, loaded[k]);
    }
  }
}

}  // namespace resnet_fused::cuda
