// Partial sums [splits, values, C] become those of the channels: the launch behind channel_sums.cuh, pool.cuh and conv/.
//
// kParts threads share a channel: each takes every kParts-th split, in float64 and in this order; a tree adds them up. Eight
// neighbouring channels of float32 are a sector of memory, so that nothing is read in vain.
#pragma once

#include "device.cuh"
#include "moments.cuh"

namespace resnet_fused::cuda {

constexpr int kParts = kThreads / kChannelsOfFinalise;

// Of a thread of these kernels: its channel, and which of the splits it takes.
struct Share {
  int64_t channel;
  int part;
  bool exists;

  __device__ __forceinline__ explicit Share(int64_t channels)
      : channel(int64_t{blockIdx.x} * kChannelsOfFinalise + threadIdx.x % kChannelsOfFinalise),
        part(threadIdx.x / kChannelsOfFinalise),
        exists(channel < channels) {}
};

// Σ of value over the threads that share a channel, for each of them; memory [kThreads].
__device__ __forceinline__ double sum_of_parts(double value, double* memory) {
  const int thread = threadIdx.x;
  memory[thread] = value;
  for (int half = kThreads / 2; half >= kChannelsOfFinalise; half /= 2) {
    __syncthreads();
    if (thread < half) memory[thread] += memory[thread + half];
  }
  __syncthreads();
  const double sum = memory[thread % kChannelsOfFinalise];
  __syncthreads();
  return sum;
}

// Of splits begin … end together: the mean first, then every split's squares about it.
template <class A>
__device__ __forceinline__ Moments<double> joined_moments(const A* partials, int64_t begin, int64_t end,
                                                          int64_t channels, const Share& share, double* memory) {
  const auto of = [=](int64_t split, int i) {
    return static_cast<double>(partials[(split * 3 + i) * channels + share.channel]);
  };
  double count = 0, total = 0, square = 0;
  if (share.exists) {
#pragma unroll 4
    for (int64_t s = begin + share.part; s < end; s += kParts) {
      count += of(s, 0);
      total += of(s, 0) * of(s, 1);
    }
  }
  count = sum_of_parts(count, memory);
  const double mean = sum_of_parts(total, memory) / count;
  if (share.exists) {
#pragma unroll 4
    for (int64_t s = begin + share.part; s < end; s += kParts) {
      const double delta = of(s, 1) - mean;
      square += of(s, 2) + of(s, 0) * delta * delta;
    }
  }
  return {count, mean, sum_of_parts(square, memory)};
}

// mean and biased variance of each channel, [C]. Grid: blocks_of_finalise.
template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_moments_kernel(const A* partials, int splits, int64_t channels, A* mean, A* var) {
  RESNET_FUSED_SHARED(double, memory, kThreads);
  const Share share(channels);
  const Moments<double> total = joined_moments(partials, 0, splits, channels, share, memory);
  if (share.exists && share.part == 0) {
    mean[share.channel] = static_cast<A>(total.mean);
    var[share.channel] = static_cast<A>(total.square / total.count);
  }
}

// Moments of every so many splits together: [⌈splits / each⌉, 3, C]. Grid: blocks_of_finalise, groups.
template <class A>
__global__ void __launch_bounds__(kThreads)
join_moments_kernel(const A* partials, int splits, int each, int64_t channels, A* joined) {
  RESNET_FUSED_SHARED(double, memory, kThreads);
  const Share share(channels);
  const int64_t begin = int64_t{blockIdx.y} * each, end = begin + each < splits ? begin + each : splits;
  const Moments<double> total = joined_moments(partials, begin, end, channels, share, memory);
  if (share.exists && share.part == 0) {
    for (int i = 0; i < 3; ++i) {
      joined[(int64_t{blockIdx.y} * 3 + i) * channels + share.channel] = static_cast<A>(total.value(i));
    }
  }
}

// Two sums of each channel, [C]. Grid: blocks_of_finalise.
template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_sums_kernel(const A* partials, int splits, int64_t channels, A* sum, A* centred) {
  RESNET_FUSED_SHARED(double, memory, kThreads);
  const Share share(channels);
  double one = 0, two = 0;
  if (share.exists) {
#pragma unroll 4
    for (int64_t s = share.part; s < splits; s += kParts) {
      one += partials[(s * 2) * channels + share.channel];
      two += partials[(s * 2 + 1) * channels + share.channel];
    }
  }
  one = sum_of_parts(one, memory);
  two = sum_of_parts(two, memory);
  if (share.exists && share.part == 0) {
    sum[share.channel] = static_cast<A>(one);
    centred[share.channel] = static_cast<A>(two);
  }
}

}  // namespace resnet_fused::cuda
