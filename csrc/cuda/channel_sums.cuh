// Sums over the rows of each channel: batch statistics, and the two sums of batch norm's backward.
//
// In two launches, in an order that the shape alone decides. In the first, block (t, s) takes tile t of 32 × 8 channels and
// split s of the rows: lanes along channels, an octet each, warps along rows; its partial result goes to place s. In the
// second, a thread for each channel joins the splits, in float64. Contiguous tensors, whose channels are planes, have a block
// for each channel and split; threads stride over its elements.
#pragma once

#include "elementwise.cuh"

namespace resnet_fused::cuda {

constexpr int kWarps = kThreads / kLanes;

// Blocks of a multiprocessor at once: as many as registers allow without spilling.
template <class T>
inline constexpr int kBlocksOfSums = sizeof(T) > 2 ? 2 : 3;

// Count, mean and sum of squared deviations: Welford, and Chan, Golub and LeVeque's merge.
template <class A>
struct Moments {
  static constexpr int kValues = 3;
  A count, mean, square;

  __device__ __forceinline__ void clear() { count = mean = square = A(0); }

  // The nth value; a caller that adds to several at once divides once.
  __device__ __forceinline__ void add(A x, A nth, A reciprocal) {
    count = nth;
    const A delta = x - mean;
    mean += delta * reciprocal;
    square += delta * (x - mean);
  }

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    square += other.square + delta * delta * count * share;
    count = total;
  }

  __device__ __forceinline__ A value(int i) const { return i == 0 ? count : i == 1 ? mean : square; }
  __device__ __forceinline__ void set(int i, A v) { (i == 0 ? count : i == 1 ? mean : square) = v; }
};

// Σ dz and Σ dz·(x − mean).
template <class A>
struct GradientSums {
  static constexpr int kValues = 2;
  A sum, centred;

  __device__ __forceinline__ void clear() { sum = centred = A(0); }

  __device__ __forceinline__ void add(A dz, A deviation) {
    sum += dz;
    centred += dz * deviation;
  }

  __device__ __forceinline__ void merge(const GradientSums& other) {
    sum += other.sum;
    centred += other.centred;
  }

  __device__ __forceinline__ A value(int i) const { return i == 0 ? sum : centred; }
  __device__ __forceinline__ void set(int i, A v) { (i == 0 ? sum : centred) = v; }
};

// What a pass over an octet adds: elements first … of an activation, channels from the walk's on.
template <class T>
struct StatisticsPass {
  using Sums = Moments<Accumulate<T>>;
  const T* x;

  __device__ __forceinline__ void add(Sums* sums, int64_t first, int count, int, int channel_step, bool aligned) const {
    using A = Accumulate<T>;
    const Octet<T> values = Octet<T>::load(x + first, count, aligned);
    A nth = sums[0].count + A(1), reciprocal = A(1) / nth;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        sums[j * channel_step].add(values.at[j], nth, reciprocal);
        if (channel_step == 0) reciprocal = A(1) / (nth += A(1));
      }
    }
  }
};

template <class T, Gate kGate, bool kRelu>
struct GradientPass {
  using Sums = GradientSums<Accumulate<T>>;
  const T *grad, *x;
  const uint8_t* mask;
  Norm<T> norm;
  T* activation;  // of x, on demand; else null

  __device__ __forceinline__ void add(Sums* sums, int64_t first, int count, int channel, int channel_step,
                                      bool aligned) const {
    const Octet<T> g = Octet<T>::load(grad + first, count, aligned);
    const Octet<T> values = Octet<T>::load(x + first, count, aligned);
    Octet<T> z;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        const int c = channel + j * channel_step;
        const int64_t i = first + j;
        const unsigned bit = kGate == Gate::kMask ? mask[i / 8] >> (i % 8) & 1 : 0;
        sums[j * channel_step].add(gated<T, kGate>(g.at[j], values.at[j], bit, norm, c), values.at[j] - norm.mean[c]);
        if (activation != nullptr) {
          const Accumulate<T> value = rounded<T>(multiply_add(values.at[j], norm.scale[c], norm.shift[c]));
          z.at[j] = kRelu ? relu(value) : value;
        }
      }
    }
    if (activation != nullptr) z.store(activation + first, count, aligned);
  }
};

// partials [splits, kValues, channels] of a matrix [rows, channels]. Grid: tiles of channels, splits.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, kBlocksOfSums<T>)
sums_of_columns_kernel(Pass pass, Accumulate<T>* partials, int64_t rows, int64_t rows_of_split, Elements e) {
  using Sums = typename Pass::Sums;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int channel = (blockIdx.x * kLanes + lane) * kOctet, left = e.channels - channel;
  const int count = left < 0 ? 0 : left < kOctet ? left : kOctet;
  const int64_t begin = blockIdx.y * rows_of_split;
  const int64_t end = begin + rows_of_split < rows ? begin + rows_of_split : rows;
  Sums sums[kOctet];
#pragma unroll
  for (int j = 0; j < kOctet; ++j) sums[j].clear();
  if (count > 0) {
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      pass.add(sums, row * e.channels + channel, count, channel, 1, e.aligned && e.channels % kOctet == 0);
    }
  }
  RESNET_FUSED_SHARED(Sums, of_warps, kThreads);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    of_warps[warp * kLanes + lane] = sums[j];
    __syncthreads();
    if (warp == 0 && j < count) {
      Sums total = of_warps[lane];
      for (int w = 1; w < kWarps; ++w) total.merge(of_warps[w * kLanes + lane]);
#pragma unroll
      for (int i = 0; i < Sums::kValues; ++i) {
        partials[(int64_t{blockIdx.y} * Sums::kValues + i) * e.channels + channel + j] = total.value(i);
      }
    }
    __syncthreads();
  }
}

// The same of planes: images of e.inner elements for each channel. Grid: channels, splits of the images' octets.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, kBlocksOfSums<T>)
sums_of_planes_kernel(Pass pass, Accumulate<T>* partials, int64_t images, int64_t octets_of_split, Elements e) {
  using Sums = typename Pass::Sums;
  const int thread = threadIdx.x, channel = blockIdx.x, in_plane = (e.inner + kOctet - 1) / kOctet;
  const int64_t octets = images * in_plane;
  const int64_t begin = blockIdx.y * octets_of_split;
  const int64_t end = begin + octets_of_split < octets ? begin + octets_of_split : octets;
  Sums sums;
  sums.clear();
  for (int64_t o = begin + thread; o < end; o += kThreads) {
    const int64_t pixel = o % in_plane * kOctet, left = e.inner - pixel;
    const int64_t first = (o / in_plane * e.channels + channel) * e.inner + pixel;
    pass.add(&sums, first, left < kOctet ? static_cast<int>(left) : kOctet, channel, 0, e.aligned && e.inner % kOctet == 0);
  }
  RESNET_FUSED_SHARED(Sums, of_threads, kThreads);
  of_threads[thread] = sums;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) of_threads[thread].merge(of_threads[thread + half]);
  }
  if (thread == 0) {
    for (int i = 0; i < Sums::kValues; ++i) {
      partials[(int64_t{blockIdx.y} * Sums::kValues + i) * e.channels + channel] = of_threads[0].value(i);
    }
  }
}

// Statistics of a training step: what batch norm does behind its sums.
template <class A>
struct Running {
  A *mean, *var;           // null: there are none
  const int64_t* batches;  // with momentum < 0: batches counted, this one too, and the average is cumulative
  double momentum;
};

// mean and biased variance of each channel, and the running statistics with the unbiased one.
template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_moments_kernel(const A* partials, int splits, int64_t channels, A* mean, A* var, Running<A> running) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= channels) return;
  Moments<double> total;
  total.clear();
  for (int s = 0; s < splits; ++s) {
    Moments<double> part;
    for (int i = 0; i < 3; ++i) part.set(i, partials[(int64_t{s} * 3 + i) * channels + channel]);
    total.merge(part);
  }
  mean[channel] = static_cast<A>(total.mean);
  var[channel] = static_cast<A>(total.square / total.count);
  if (running.mean != nullptr) {
    const double factor = running.momentum < 0 ? 1.0 / static_cast<double>(*running.batches) : running.momentum;
    const double unbiased = total.square / (total.count - 1);
    running.mean[channel] = static_cast<A>(running.mean[channel] + factor * (total.mean - running.mean[channel]));
    running.var[channel] = static_cast<A>(running.var[channel] + factor * (unbiased - running.var[channel]));
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_sums_kernel(const A* partials, int splits, int64_t channels, A* sum, A* centred) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= channels) return;
  double one = 0, two = 0;
  for (int s = 0; s < splits; ++s) {
    one += partials[(int64_t{s} * 2) * channels + channel];
    two += partials[(int64_t{s} * 2 + 1) * channels + channel];
  }
  sum[channel] = static_cast<A>(one);
  centred[channel] = static_cast<A>(two);
}

}  // namespace resnet_fused::cuda
