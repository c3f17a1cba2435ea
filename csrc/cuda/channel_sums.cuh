// Sums over the rows of each channel: batch statistics, and the two sums of batch norm's backward.
//
// In two launches, in an order that the shape alone decides. In the first, block (t, s) takes tile t of the octets of channels
// and split s of the rows: its threads are [rows, octets of a tile]; its partial result goes to place s. In the second, the
// splits are joined in float64. Contiguous tensors, whose channels are planes, have a block for each channel and split;
// threads stride over its elements.
#pragma once

#include "elementwise.cuh"

namespace resnet_fused::cuda {

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

// What a pass over an octet adds: elements first … of an activation. channel_step: 1, or 0 where all are of one channel.
template <class T>
struct StatisticsPass {
  using Sums = Moments<Accumulate<T>>;
  static constexpr int kResident = sizeof(T) > 4 ? 2 : 4;  // blocks of a multiprocessor that registers allow without spilling
  const T* x;

  struct Vectors {};
  template <class Take>
  __device__ __forceinline__ Vectors vectors(Take) const {
    return {};
  }

  __device__ __forceinline__ Packed<T> load(int64_t first, int count, bool aligned) const {
    return Packed<T>::load(x + first, count, aligned);
  }

  __device__ __forceinline__ void add(Sums* sums, const Packed<T>& loaded, const Vectors&, int64_t, int count,
                                      int channel_step, bool) const {
    using A = Accumulate<T>;
    const Octet<T> values = Octet<T>::of(loaded);
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

template <class T, Gate kGate>
struct GradientPass {
  using Sums = GradientSums<Accumulate<T>>;
  static constexpr int kResident = sizeof(T) > 4 ? 1 : 2;
  const T *grad, *x;
  const uint8_t* mask;
  Norm<T> norm;
  T* activation;  // of x, with a ReLU or without, on demand; else null
  bool with_relu;

  struct Vectors {
    Octet<Accumulate<T>> mean, scale, shift;
  };

  // take: the eight of a vector.
  template <class Take>
  __device__ __forceinline__ Vectors vectors(Take take) const {
    Vectors of{};
    of.mean = take(norm.mean);
    if (kGate == Gate::kActivation || activation != nullptr) {
      of.scale = take(norm.scale);
      of.shift = take(norm.shift);
    }
    return of;
  }

  __device__ __forceinline__ Loaded<T> load(int64_t first, int count, bool aligned) const {
    Loaded<T> loaded;
    loaded.one = Packed<T>::load(grad + first, count, aligned);
    loaded.other = Packed<T>::load(x + first, count, aligned);
    loaded.bits = 0;
    if (kGate == Gate::kMask) {
      const int skipped = first % 8;
      loaded.bits = mask[first / 8] >> skipped;
      if (!aligned && skipped + count > 8) loaded.bits |= static_cast<uint8_t>(mask[first / 8 + 1] << (8 - skipped));
    }
    return loaded;
  }

  __device__ __forceinline__ void add(Sums* sums, const Loaded<T>& loaded, const Vectors& of, int64_t first, int count,
                                      int channel_step, bool aligned) const {
    const Octet<T> g = Octet<T>::of(loaded.one), values = Octet<T>::of(loaded.other);
    Octet<T> z;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < count) {
        const auto dz =
            gated<T, kGate>(g.at[j], values.at[j], loaded.bits >> j & 1, of.scale.at[j], of.shift.at[j]);
        sums[j * channel_step].add(dz, values.at[j] - of.mean.at[j]);
        if (activation != nullptr) {
          const auto value = multiply_add(values.at[j], of.scale.at[j], of.shift.at[j]);
          z.at[j] = with_relu ? relu(value) : value;
        }
      }
    }
    if (activation != nullptr) z.store(activation + first, count, aligned);
  }
};

// partials [splits, kValues, channels] of a matrix [rows, channels]. kWhole: channels are a multiple of 8; tensors and vectors
// begin at multiples of 16 bytes. Grid: tiles of so many octets (lanes) of channels, splits; threads beyond the last whole row
// of a tile have nothing to add.
template <class T, class Pass, bool kWhole>
__global__ void __launch_bounds__(kThreads, Pass::kResident)
sums_of_columns_kernel(Pass pass, Accumulate<T>* partials, int64_t rows, int64_t rows_of_split, int lanes, Elements e) {
  using A = Accumulate<T>;
  using Sums = typename Pass::Sums;
  const int thread = threadIdx.x, rows_at_once = kThreads / lanes, width = lanes * kOctet;
  const int lane = thread % lanes, row = thread / lanes;
  const int tile = blockIdx.x * width, channel = tile + lane * kOctet, left = e.channels - channel;
  const int count = kWhole || left > kOctet ? kOctet : left;
  const int64_t begin = blockIdx.y * rows_of_split;
  const int64_t end = begin + rows_of_split < rows ? begin + rows_of_split : rows;
  Sums sums[kOctet];
#pragma unroll
  for (int j = 0; j < kOctet; ++j) sums[j].clear();
  if (left > 0 && row < rows_at_once) {
    const auto of = pass.vectors([&](const A* vector) { return Octet<A>::load(vector + channel, count, kWhole); });
    in_batches<kWhole ? kInFlight<T> : 1>(
        begin + row, rows_at_once, end,
        [&](int64_t i) { return pass.load(i * e.channels + channel, count, kWhole); },
        [&](int64_t i, const auto& loaded) {
          pass.add(sums, loaded, of, i * e.channels + channel, count, 1, kWhole);
        });
  }
  RESNET_FUSED_SHARED(Sums, of_rows, kThreads * kOctet);  // [rows_at_once, kOctet, lanes]
  if (row < rows_at_once) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) of_rows[row * width + j * lanes + lane] = sums[j];
  }
  for (int height = rows_at_once; height > 1;) {
    const int half = (height + 1) / 2;
    __syncthreads();
    for (int i = thread; i < (height - half) * width; i += kThreads) of_rows[i].merge(of_rows[i + half * width]);
    height = half;
  }
  __syncthreads();
  if (thread < width && tile + thread < e.channels) {
    const Sums& total = of_rows[thread % kOctet * lanes + thread / kOctet];
#pragma unroll
    for (int i = 0; i < Sums::kValues; ++i) {
      partials[(int64_t{blockIdx.y} * Sums::kValues + i) * e.channels + tile + thread] = total.value(i);
    }
  }
}

// The same of planes: images of e.inner elements for each channel; kWhole: that is a multiple of 8, and tensors begin at
// multiples of 16 bytes. Grid: channels, splits of the images' octets.
template <class T, class Pass, bool kWhole>
__global__ void __launch_bounds__(kThreads, Pass::kResident)
sums_of_planes_kernel(Pass pass, Accumulate<T>* partials, int64_t images, int64_t octets_of_split, Elements e) {
  using A = Accumulate<T>;
  using Sums = typename Pass::Sums;
  const int thread = threadIdx.x, channel = blockIdx.x, in_plane = (e.inner + kOctet - 1) / kOctet;
  const int64_t octets = images * in_plane;
  const int64_t begin = blockIdx.y * octets_of_split;
  const int64_t end = begin + octets_of_split < octets ? begin + octets_of_split : octets;
  Sums sums;
  sums.clear();
  const auto of = pass.vectors([&](const A* vector) { return Octet<A>::filled(vector[channel]); });
  ChannelWalk loading(begin + thread, kThreads, in_plane, static_cast<int>(images)), adding = loading;  // images as channels
  const auto first = [&](const ChannelWalk& walk) {
    return (int64_t{walk.channel} * e.channels + channel) * e.inner + walk.offset * kOctet;
  };
  const auto count = [&](const ChannelWalk& walk) {
    const int left = e.inner - walk.offset * kOctet;
    return kWhole || left > kOctet ? kOctet : left;
  };
  in_batches<kWhole ? kInFlight<T> : 1>(
      begin + thread, kThreads, end,
      [&](int64_t) {
        const auto loaded = pass.load(first(loading), count(loading), kWhole);
        loading.jump();
        return loaded;
      },
      [&](int64_t, const auto& loaded) {
        pass.add(&sums, loaded, of, first(adding), count(adding), 0, kWhole);
        adding.jump();
      });
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

// A thread's share of joining splits: [kThreads / kChannelsOfJoin, kChannelsOfJoin] threads; those of a channel take splits
// in turns.
struct Joining {
  static constexpr int kRows = kThreads / kChannelsOfJoin;
  int row = threadIdx.x / kChannelsOfJoin;
  int64_t channel = int64_t{blockIdx.x} * kChannelsOfJoin + threadIdx.x % kChannelsOfJoin;

  // What the rows of a channel have found, merged in row 0. Every thread of the block calls it.
  template <class Sums>
  __device__ __forceinline__ void merge(Sums& sums) const {
    RESNET_FUSED_SHARED(Sums, of_threads, kThreads);
    of_threads[threadIdx.x] = sums;
    for (int half = kRows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (row < half) of_threads[threadIdx.x].merge(of_threads[threadIdx.x + half * kChannelsOfJoin]);
    }
    sums = of_threads[threadIdx.x];
  }
};

// Moments of splits begin … end together, in row 0.
//
// A thread sums about the first mean it meets, which takes no division and costs no more digits than the number of its splits
// has: the square of that mean's distance from the mean of all is at most so many times their variance.
template <class A>
__device__ __forceinline__ Moments<double> joined_moments(const Joining& of, const A* partials, int begin, int end,
                                                          int64_t channels) {
  double count = 0, pivot = 0, sum = 0, square = 0;
  if (of.channel < channels) {
#pragma unroll 4
    for (int s = begin + of.row; s < end; s += Joining::kRows) {
      const A* const part = partials + int64_t{s} * 3 * channels + of.channel;
      const double counted = part[0], its_mean = part[channels], its_square = part[2 * channels];
      if (count == 0) pivot = its_mean;
      count += counted;
      sum += counted * (its_mean - pivot);
      square += its_square + counted * (its_mean - pivot) * (its_mean - pivot);
    }
  }
  Moments<double> total{0, 0, 0};
  if (count > 0) {
    const double distance = sum / count, squares = square - sum * distance;
    total = {count, pivot + distance, squares < 0 ? 0 : squares};
  }
  of.merge(total);
  return total;
}

// mean and biased variance of each channel. Grid: channels by kChannelsOfJoin.
template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_moments_kernel(const A* partials, int splits, int64_t channels, A* mean, A* var) {
  const Joining of;
  const Moments<double> total = joined_moments(of, partials, 0, splits, channels);
  if (of.row > 0 || of.channel >= channels) return;
  mean[of.channel] = static_cast<A>(total.mean);
  var[of.channel] = static_cast<A>(total.square / total.count);
}

// Moments of every so many splits together: joined [⌈splits / each⌉, 3, channels]. Grid: channels by kChannelsOfJoin, those.
template <class A>
__global__ void __launch_bounds__(kThreads)
join_moments_kernel(const A* partials, int splits, int each, int64_t channels, A* joined) {
  const Joining of;
  const int begin = blockIdx.y * each, end = splits - begin < each ? splits : begin + each;
  const Moments<double> total = joined_moments(of, partials, begin, end, channels);
  if (of.row > 0 || of.channel >= channels) return;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    joined[(int64_t{blockIdx.y} * 3 + i) * channels + of.channel] = static_cast<A>(total.value(i));
  }
}

// Grid: channels by kChannelsOfJoin.
template <class A>
__global__ void __launch_bounds__(kThreads)
finalise_sums_kernel(const A* partials, int splits, int64_t channels, A* sum, A* centred) {
  const Joining of;
  GradientSums<double> total;
  total.clear();
  if (of.channel < channels) {
#pragma unroll 4
    for (int s = of.row; s < splits; s += Joining::kRows) {
      const A* const part = partials + int64_t{s} * 2 * channels + of.channel;
      total.merge({part[0], part[channels]});
    }
  }
  of.merge(total);
  if (of.row > 0 || of.channel >= channels) return;
  sum[of.channel] = static_cast<A>(total.sum);
  centred[of.channel] = static_cast<A>(total.centred);
}

}  // namespace resnet_fused::cuda
