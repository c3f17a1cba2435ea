// Normalisation, residual addition and ReLU, forward and backward: one pass over memory, a thread for each octet.
//
// A program's threads take neighbouring octets, then stride over the grid. Where octets are whole and aligned, a thread has
// the loads of several under way before the first is used.
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

// Blocks of a multiprocessor at once where per-channel vectors stay in registers: as many as registers allow without spilling.
template <class T>
inline constexpr int kBlocksOfAct = sizeof(T) > 4 ? 2 : 3;

// Vectors at the channels of an octet, in registers.
template <class A, int kCount>
struct FixedVectors {
  Octet<A> vectors[kCount];

  __device__ __forceinline__ FixedVectors(const A* const (&from)[kCount], int64_t channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) vectors[i] = Octet<A>::load(from[i] + channel, kOctet, true);
  }

  __device__ __forceinline__ A at(int i, int j) const { return vectors[i].at[j]; }
  __device__ __forceinline__ void step() {}
};

// The same in memory: element j is that after j steps.
template <class A, int kCount>
struct WalkedVectors {
  const A* const (&from)[kCount];
  ChannelWalk walk;

  __device__ __forceinline__ A at(int i, int) const { return from[i][walk.channel]; }
  __device__ __forceinline__ void step() { walk.step(); }
};

// finish(o, count, load(o, count)) for the octets of a thread, of channels that do not count.
template <class T, class Load, class Finish>
__device__ __forceinline__ void over_octets(const Elements& e, Load load, Finish finish) {
  const int64_t whole = e.aligned ? e.count / kOctet : 0;
  in_batches<kInFlight<T>>(
      first_octet(), octet_stride(), whole, [&](int64_t o) { return load(o, kOctet, true); },
      [&](int64_t o, const auto& loaded) { finish(o, kOctet, true, loaded); });
  in_batches<1>(
      whole + first_octet(), octet_stride(), e.octets(), [&](int64_t o) { return load(o, e.in(o), false); },
      [&](int64_t o, const auto& loaded) { finish(o, e.in(o), false, loaded); });
}

// The same with vectors at the octets' channels. kSteady: every octet is whole and aligned, as the vectors are, and the
// stride of the grid is a multiple of a pixel's octets, so that the channels of a thread never change.
template <class T, bool kSteady, int kVectors, class Load, class Finish>
__device__ __forceinline__ void over_octets(const Elements& e, const Accumulate<T>* const (&from)[kVectors], Load load,
                                            Finish finish) {
  using A = Accumulate<T>;
  if constexpr (kSteady) {
    if (first_octet() >= e.octets()) return;
    const FixedVectors<A, kVectors> vectors(from, first_octet() % (e.channels / kOctet) * kOctet);
    in_batches<kInFlight<T>>(
        first_octet(), octet_stride(), e.octets(), [&](int64_t o) { return load(o, kOctet, true); },
        [&](int64_t o, const auto& loaded) { finish(o, kOctet, true, loaded, vectors); });
  } else {
    ChannelWalk walk(first_octet() * kOctet, octet_stride() * kOctet, e.inner, e.channels);
    in_batches<1>(
        first_octet(), octet_stride(), e.octets(), [&](int64_t o) { return load(o, e.in(o), e.aligned); },
        [&](int64_t o, const auto& loaded) {
          finish(o, e.in(o), e.aligned, loaded, WalkedVectors<A, kVectors>{from, walk});
          walk.jump();
        });
  }
}

// Of two tensors; of the second one or of neither a mask's byte.
template <class T>
struct Loaded {
  Packed<T> one, other;
  uint8_t bits;
};

// act(z) of element j of an octet; its bit of the mask, of what is stored, goes into bits.
template <class T>
__device__ __forceinline__ Accumulate<T> activated(Accumulate<T> z, bool with_relu, int j, uint8_t& bits) {
  bits |= static_cast<uint8_t>(passes_as_stored<T>(z)) << j;
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
template <class T, bool kSteady>
__global__ void __launch_bounds__(kThreads, kSteady ? kBlocksOfAct<T> : kBlocks)
bn_act_kernel(const T* x, const Accumulate<T>* scale, const Accumulate<T>* shift, const T* residual, bool with_relu,
              T* out, uint8_t* mask, Elements e) {
  using A = Accumulate<T>;
  const auto load = [&](int64_t o, int count, bool aligned) {
    Loaded<T> loaded;
    loaded.one = Packed<T>::load(x + o * kOctet, count, aligned);
    if (residual != nullptr) loaded.other = Packed<T>::load(residual + o * kOctet, count, aligned);
    return loaded;
  };
  const auto finish = [&](int64_t o, int count, bool aligned, const Loaded<T>& loaded, auto vectors) {
    Octet<T> z = Octet<T>::of(loaded.one), r;
    if (residual != nullptr) r = Octet<T>::of(loaded.other);
    uint8_t bits = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        A value = multiply_add(z.at[j], vectors.at(0, j), vectors.at(1, j));
        if (residual != nullptr) value += r.at[j];
        z.at[j] = activated<T>(value, with_relu, j, bits);
        vectors.step();
      }
    }
    z.store(out + o * kOctet, count, aligned);
    if (mask != nullptr) mask[o] = bits;
  };
  over_octets<T, kSteady>(e, {scale, shift}, load, finish);
}

// out = relu(a + b) and its mask (null: not wanted).
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) add_relu_kernel(const T* a, const T* b, T* out, uint8_t* mask, Elements e) {
  const auto load = [&](int64_t o, int count, bool aligned) {
    return Loaded<T>{Packed<T>::load(a + o * kOctet, count, aligned), Packed<T>::load(b + o * kOctet, count, aligned), 0};
  };
  over_octets<T>(e, load, [&](int64_t o, int count, bool aligned, const Loaded<T>& loaded) {
    Octet<T> z = Octet<T>::of(loaded.one);
    const Octet<T> other = Octet<T>::of(loaded.other);
    uint8_t bits = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) z.at[j] = activated<T>(z.at[j] + other.at[j], true, j, bits);
    }
    z.store(out + o * kOctet, count, aligned);
    if (mask != nullptr) mask[o] = bits;
  });
}

// out = (grad where mask, else 0) [+ out].
template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks)
mask_grad_kernel(const T* grad, const uint8_t* mask, T* out, Elements e) {
  const auto load = [&](int64_t o, int count, bool aligned) {
    Loaded<T> loaded;
    loaded.one = Packed<T>::load(grad + o * kOctet, count, aligned);
    if (kAdd) loaded.other = Packed<T>::load(out + o * kOctet, count, aligned);
    loaded.bits = mask[o];
    return loaded;
  };
  over_octets<T>(e, load, [&](int64_t o, int count, bool aligned, const Loaded<T>& loaded) {
    Octet<T> z = Octet<T>::of(loaded.one), sum;
    if (kAdd) sum = Octet<T>::of(loaded.other);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const Accumulate<T> dz = loaded.bits >> j & 1 ? z.at[j] : Accumulate<T>(0);
      z.at[j] = kAdd ? sum.at[j] + dz : dz;
    }
    z.store(out + o * kOctet, count, aligned);
  });
}

// What decides where the gradient passes.
enum class Gate { kOpen, kMask, kActivation };  // everywhere; a mask; x·scale + shift, as it is rounded

template <class T>
struct Norm {
  const Accumulate<T>*mean, *scale, *shift;
};

// dz of an element. scale and shift of its channel count for kActivation alone.
template <class T, Gate kGate>
__device__ __forceinline__ Accumulate<T> gated(Accumulate<T> grad, Accumulate<T> x, unsigned bit, Accumulate<T> scale,
                                               Accumulate<T> shift) {
  if (kGate == Gate::kMask) return bit ? grad : Accumulate<T>(0);
  if (kGate == Gate::kActivation) {
    return passes_as_stored<T>(multiply_add(x, scale, shift)) ? grad : Accumulate<T>(0);
  }
  return grad;
}

template <class T, bool kSteady>
inline constexpr int kBlocksOfBackward = !kSteady ? kBlocks : sizeof(T) > 4 ? 1 : 2;

// dx = a·dz + b·(x − mean) + c. dx may be grad.
template <class T, Gate kGate, bool kSteady>
__global__ void __launch_bounds__(kThreads, (kBlocksOfBackward<T, kSteady>))
bn_backward_kernel(const T* grad, const T* x, const uint8_t* mask, Norm<T> norm, const Accumulate<T>* a,
                   const Accumulate<T>* b, const Accumulate<T>* c, T* dx, Elements e) {
  using A = Accumulate<T>;
  const auto load = [&](int64_t o, int count, bool aligned) {
    Loaded<T> loaded;
    loaded.one = Packed<T>::load(grad + o * kOctet, count, aligned);
    loaded.other = Packed<T>::load(x + o * kOctet, count, aligned);
    loaded.bits = kGate == Gate::kMask ? mask[o] : 0;
    return loaded;
  };
  const auto finish = [&](int64_t o, int count, bool aligned, const Loaded<T>& loaded, auto vectors) {
    Octet<T> g = Octet<T>::of(loaded.one);
    const Octet<T> values = Octet<T>::of(loaded.other);
    constexpr int kScale = kGate == Gate::kActivation ? 4 : 0, kShift = kGate == Gate::kActivation ? 5 : 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        const A dz = gated<T, kGate>(g.at[j], values.at[j], loaded.bits >> j & 1, vectors.at(kScale, j),
                                     vectors.at(kShift, j));
        g.at[j] = affine_in_centred(dz, values.at[j], vectors.at(0, j), vectors.at(1, j), vectors.at(2, j),
                                    vectors.at(3, j));
        vectors.step();
      }
    }
    g.store(dx + o * kOctet, count, aligned);
  };
  if constexpr (kGate == Gate::kActivation) {
    over_octets<T, kSteady>(e, {norm.mean, a, b, c, norm.scale, norm.shift}, load, finish);
  } else {
    over_octets<T, kSteady>(e, {norm.mean, a, b, c}, load, finish);
  }
}

}  // namespace resnet_fused::cuda
