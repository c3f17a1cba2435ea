// The stem's max pooling, 3 × 3 with stride 2 and padding 1, behind batch norm and ReLU: the activation is never
// stored.
//
// Window (p, q) of [P, Q] = [⌈H/2⌉, ⌈W/2⌉] covers pixels (2p − 1, 2q − 1) … (2p + 1, 2q + 1) of [H, W]. A thread takes
// a window and an octet of channels. In the backward passes it takes the window's own pixels, (2p, 2q) …
// (2p + 1, 2q + 1), which lie in windows (p, q) … (p + 1, q + 1) and no others: these four hold all the gradients that
// reach four pixels.
//
// Where a window or a pixel lies outside, its neighbour inside is read and does not count: without branches between
// them all loads of a thread are under way at once.
#pragma once

#include "channel_sums.cuh"

namespace resnet_fused::cuda {

// What a thread takes of a pixel. kOctets: 8 channels of channels_last, where C is a multiple of 8 and every tensor and
// vector begins at a multiple of 16 bytes. kRagged: at most 8 channels of channels_last. kPlanes: the one of a
// contiguous tensor's plane.
enum class Taking { kOctets, kRagged, kPlanes };

template <Taking kTaking>
inline constexpr int kWidth = kTaking == Taking::kPlanes ? 1 : kOctet;

constexpr uint32_t kNoWinner = 255;  // the ReLU stops the gradient

// Blocks of a multiprocessor at once in the backward passes. One alone has few loads under way; where two are too many
// for the registers, one is better than spilling.
template <class T, Taking kTaking>
inline constexpr int kResidentBlocks = kTaking == Taking::kRagged || (sizeof(T) > 2 && kTaking == Taking::kOctets) ? 1 : 2;

struct Images {
  int64_t n;
  int channels, h, w;

  __host__ __device__ int p() const { return (h - 1) / 2 + 1; }
  __host__ __device__ int q() const { return (w - 1) / 2 + 1; }
  __host__ __device__ int64_t windows() const { return n * p() * q(); }

  // What the threads of a window take its channels in.
  template <Taking kTaking>
  __host__ __device__ int units() const {
    return (channels - 1) / kWidth<kTaking> + 1;
  }

  // Elements from a channel on.
  template <Taking kTaking>
  __device__ __forceinline__ int count(int channel) const {
    const int left = channels - channel;
    return left < kWidth<kTaking> ? left : kWidth<kTaking>;
  }

  // The element (image, channel, i, j) of a tensor whose images are [height, width]; of plane number ``image``.
  template <Taking kTaking>
  __device__ __forceinline__ int64_t at(int64_t image, int channel, int height, int width, int i, int j) const {
    if (kTaking == Taking::kPlanes) return (image * height + i) * width + j;
    return ((image * height + i) * width + j) * channels + channel;
  }
};

template <class T, Taking kTaking>
__device__ __forceinline__ Octet<T> take(const T* from, int count) {
  return Octet<T>::load(from, kTaking == Taking::kRagged ? count : kWidth<kTaking>, kTaking == Taking::kOctets);
}

template <class T, Taking kTaking>
__device__ __forceinline__ void put(const Octet<T>& values, T* to, int count) {
  values.store(to, kTaking == Taking::kRagged ? count : kWidth<kTaking>, kTaking == Taking::kOctets);
}

// Winners of a window: places 3r + s in it, or kNoWinner. Packed, because a thread holds those of four windows.
template <Taking kTaking>
struct alignas(8) Winners {
  uint32_t words[2];

  static __device__ __forceinline__ Winners load(const uint8_t* p, int count) {
    if (kTaking == Taking::kOctets) return *reinterpret_cast<const Winners*>(p);
    Winners winners{};
#pragma unroll
    for (int j = 0; j < kWidth<kTaking>; ++j) {
      if (j < count) winners.set(j, p[j]);
    }
    return winners;
  }

  __device__ __forceinline__ void store(uint8_t* p, int count) const {
    if (kTaking == Taking::kOctets) {
      *reinterpret_cast<Winners*>(p) = *this;
    } else {
#pragma unroll
      for (int j = 0; j < kWidth<kTaking>; ++j) {
        if (j < count) p[j] = static_cast<uint8_t>((*this)[j]);
      }
    }
  }

  __device__ __forceinline__ uint32_t operator[](int j) const { return words[j / 4] >> (j % 4 * 8) & 255; }

  // Of a place that is 0.
  __device__ __forceinline__ void set(int j, uint32_t place) { words[j / 4] |= place << (j % 4 * 8); }
};

// Number ``first`` of units × windows × images, and then from ``stride`` to ``stride``, without a division.
struct WindowWalk {
  int units, p_count, q_count;
  int64_t image, jump_image;
  int unit, p, q;
  int jump_unit, jump_p, jump_q;

  __device__ __forceinline__ WindowWalk(int64_t first, int64_t stride, int units, const Images& g)
      : units(units), p_count(g.p()), q_count(g.q()) {
    unit = static_cast<int>(first % units), first /= units;
    q = static_cast<int>(first % q_count), first /= q_count;
    p = static_cast<int>(first % p_count), image = first / p_count;
    jump_unit = static_cast<int>(stride % units), stride /= units;
    jump_q = static_cast<int>(stride % q_count), stride /= q_count;
    jump_p = static_cast<int>(stride % p_count), jump_image = stride / p_count;
  }

  __device__ __forceinline__ void jump() {
    unit += jump_unit, q += jump_q, p += jump_p, image += jump_image;
    if (unit >= units) unit -= units, ++q;
    if (q >= q_count) q -= q_count, ++p;
    if (p >= p_count) p -= p_count, ++image;
  }
};

// Unit by unit of all windows: neighbouring threads take neighbours in memory.
template <Taking kTaking>
struct ImageWalk : WindowWalk {
  int channels;

  __device__ __forceinline__ explicit ImageWalk(const Images& g)
      : WindowWalk(first_octet(), octet_stride(), kTaking == Taking::kPlanes ? 1 : g.units<kTaking>(), g),
        channels(g.channels) {}

  // Planes are walked as if they were images.
  __device__ __forceinline__ bool inside(const Images& g) const {
    return image < (kTaking == Taking::kPlanes ? g.n * channels : g.n);
  }
  __device__ __forceinline__ int channel() const {
    return static_cast<int>(kTaking == Taking::kPlanes ? image % channels : unit * kOctet);
  }
};

// out = maxpool(relu(x·scale + shift)) [N, C, P, Q] and index, its winners (the first maximum, the last NaN), compared
// as rounded. The ReLU is where the comparison begins: at 0, with no winner.
// Reads x once from memory and nine times in all from caches; writes a quarter of its elements, and as many bytes.
template <class T, Taking kTaking>
__global__ void __launch_bounds__(kThreads)
bn_relu_maxpool_kernel(const T* x, const Accumulate<T>* scale, const Accumulate<T>* shift, T* out, uint8_t* index,
                       Images g) {
  using A = Accumulate<T>;
  for (ImageWalk<kTaking> walk(g); walk.inside(g); walk.jump()) {
    const int channel = walk.channel(), count = g.count<kTaking>(channel);
    const Octet<A> scales = take<A, kTaking>(scale + channel, count), shifts = take<A, kTaking>(shift + channel, count);
    Octet<T> best;
    uint32_t winners[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      best.at[j] = A(0);
      winners[j] = kNoWinner;
    }
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const int h = 2 * walk.p - 1 + r;
      const bool row_inside = h >= 0 && h < g.h;
      Octet<T> row[3];
      bool inside[3];
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const int w = 2 * walk.q - 1 + s;
        inside[s] = row_inside && w >= 0 && w < g.w;
        const int64_t at = g.at<kTaking>(walk.image, channel, g.h, g.w, h < 0 ? 0 : h < g.h ? h : g.h - 1,
                                         w < 0 ? 0 : w < g.w ? w : g.w - 1);
        row[s] = take<T, kTaking>(x + at, count);
      }
#pragma unroll
      for (int s = 0; s < 3; ++s) {
#pragma unroll
        for (int j = 0; j < kWidth<kTaking>; ++j) {
          const A value = rounded<T>(multiply_add(row[s].at[j], scales.at[j], shifts.at[j]));
          const bool better = inside[s] && (value > best.at[j] || value != value);
          best.at[j] = better ? value : best.at[j];
          winners[j] = better ? 3 * r + s : winners[j];
        }
      }
    }
    const int64_t at = g.at<kTaking>(walk.image, channel, g.p(), g.q(), walk.p, walk.q);
    put<T, kTaking>(best, out + at, count);
    Winners<kTaking> packed{};
#pragma unroll
    for (int j = 0; j < kWidth<kTaking>; ++j) packed.set(j, winners[j]);
    packed.store(index + at, count);
  }
}

// An octet as it is stored: that of a gradient waits for several pixels, in half the registers.
template <class T, Taking kTaking>
struct Stored {
  T at[kWidth<kTaking>];

  static __device__ __forceinline__ Stored load(const T* p, int count) {
    Stored stored;
    if constexpr (kTaking == Taking::kOctets) {
      constexpr int kLoads = sizeof(stored) / sizeof(Bytes16);
      Bytes16 bytes[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) bytes[i] = pieces_at(p)[i];
      memcpy(stored.at, bytes, sizeof(stored));
    } else {
#pragma unroll
      for (int j = 0; j < kWidth<kTaking>; ++j) stored.at[j] = j < count ? p[j] : T(0);
    }
    return stored;
  }
};

// Gradients and winners of windows (p, q) … (p + 1, q + 1).
template <class T, Taking kTaking>
struct FourWindows {
  Stored<T, kTaking> grad[2][2];
  Winners<kTaking> winners[2][2];

  __device__ __forceinline__ FourWindows(const T* from, const uint8_t* index, const Images& g, int64_t image,
                                         int channel, int count, int p, int q) {
#pragma unroll
    for (int dp = 0; dp < 2; ++dp) {
#pragma unroll
      for (int dq = 0; dq < 2; ++dq) {
        const bool last_p = p + dp == g.p(), last_q = q + dq == g.q();
        const int64_t at = g.at<kTaking>(image, channel, g.p(), g.q(), p + dp - last_p, q + dq - last_q);
        grad[dp][dq] = Stored<T, kTaking>::load(from + at, count);
        winners[dp][dq] = Winners<kTaking>::load(index + at, count);
        for (uint32_t& word : winners[dp][dq].words) word |= last_p || last_q ? ~0u : 0u;
      }
    }
  }

  // dz of pixel (2p + dh, 2q + dw): the gradients of the windows that it has won, added in the order of the windows.
  __device__ __forceinline__ Accumulate<T> dz(int dh, int dw, int j) const {
    Accumulate<T> sum(0);
#pragma unroll
    for (int dp = 0; dp < 2; ++dp) {
#pragma unroll
      for (int dq = 0; dq < 2; ++dq) {
        if (dp > dh || dq > dw) continue;
        const uint32_t place = 3 * (1 + dh - 2 * dp) + 1 + dw - 2 * dq;
        sum += winners[dp][dq][j] == place ? static_cast<Accumulate<T>>(grad[dp][dq].at[j]) : Accumulate<T>(0);
      }
    }
    return sum;
  }
};

// Pixels (2p + dh, 2q) and (2p + dh, 2q + 1).
template <class T, Taking kTaking>
struct TwoPixels {
  Octet<T> values[2];
  int64_t at[2];
  bool exists[2];

  __device__ __forceinline__ TwoPixels(const T* x, const Images& g, int64_t image, int channel, int count, int p, int q,
                                       int dh) {
#pragma unroll
    for (int dw = 0; dw < 2; ++dw) {
      const bool outside_h = 2 * p + dh == g.h, outside_w = 2 * q + dw == g.w;
      exists[dw] = !(outside_h || outside_w);
      at[dw] = g.at<kTaking>(image, channel, g.h, g.w, 2 * p + dh - outside_h, 2 * q + dw - outside_w);
      values[dw] = take<T, kTaking>(x + at[dw], count);
    }
  }
};

// dx = a·dz + b·(x − mean) + c [N, C, H, W], dz being grad [N, C, P, Q] at the winners.
// Reads x, grad and index once from memory (grad and index three times more from caches), writes dx.
template <class T, Taking kTaking>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kTaking>)
bn_relu_maxpool_backward_kernel(const T* grad, const uint8_t* index, const T* x, const Accumulate<T>* mean,
                                const Accumulate<T>* a, const Accumulate<T>* b, const Accumulate<T>* c, T* dx,
                                Images g) {
  using A = Accumulate<T>;
  for (ImageWalk<kTaking> walk(g); walk.inside(g); walk.jump()) {
    const int channel = walk.channel(), count = g.count<kTaking>(channel);
    const FourWindows<T, kTaking> windows(grad, index, g, walk.image, channel, count, walk.p, walk.q);
#pragma unroll
    for (int dh = 0; dh < 2; ++dh) {
      const TwoPixels<T, kTaking> pixels(x, g, walk.image, channel, count, walk.p, walk.q, dh);
      const Octet<A> means = take<A, kTaking>(mean + channel, count), as = take<A, kTaking>(a + channel, count);
      const Octet<A> bs = take<A, kTaking>(b + channel, count), cs = take<A, kTaking>(c + channel, count);
#pragma unroll
      for (int dw = 0; dw < 2; ++dw) {
        Octet<T> d;
#pragma unroll
        for (int j = 0; j < kWidth<kTaking>; ++j) {
          d.at[j] = affine_in_centred(windows.dz(dh, dw, j), pixels.values[dw].at[j], means.at[j], as.at[j], bs.at[j],
                                      cs.at[j]);
        }
        if (pixels.exists[dw]) put<T, kTaking>(d, dx + pixels.at[dw], count);
      }
    }
  }
}

// partials [splits, 2, C]: Σ dz and Σ dz·(x − mean) of each split of the windows' pixels, which finalise_sums_kernel
// joins. All pixels count, also those that won nothing: where such a one is infinite or NaN the sum is NaN.
// Grid: tiles of ``lanes`` units of channels, splits; the kThreads of a block are [windows, lanes], lanes being a power
// of two that may depend on the shape alone.
// Reads x, grad and index once from memory (grad and index three times more from caches).
template <class T, Taking kTaking>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kTaking>)
bn_relu_maxpool_backward_reduce_kernel(const T* grad, const uint8_t* index, const T* x, const Accumulate<T>* mean,
                                       Accumulate<T>* partials, int64_t windows_of_split, int lanes, Images g) {
  using A = Accumulate<T>;
  using Sums = GradientSums<A>;
  const int thread = threadIdx.x, rows = kThreads / lanes;
  const int64_t unit = int64_t{blockIdx.x} * lanes + thread % lanes;
  const bool exists = unit < g.units<kTaking>();
  const int channel = exists ? static_cast<int>(unit * kWidth<kTaking>) : 0, count = g.count<kTaking>(channel);
  const int64_t begin = blockIdx.y * windows_of_split, left = g.windows() - begin;
  const int64_t end = begin + (left < windows_of_split ? left : windows_of_split);
  Sums sums[kWidth<kTaking>];
#pragma unroll
  for (int j = 0; j < kWidth<kTaking>; ++j) sums[j].clear();
  if (exists) {
    const Octet<A> means = take<A, kTaking>(mean + channel, count);
    WindowWalk walk(begin + thread / lanes, rows, 1, g);
    for (int64_t window = begin + thread / lanes; window < end; window += rows, walk.jump()) {
      const int64_t image = kTaking == Taking::kPlanes ? walk.image * g.channels + channel : walk.image;
      const FourWindows<T, kTaking> windows(grad, index, g, image, channel, count, walk.p, walk.q);
#pragma unroll
      for (int dh = 0; dh < 2; ++dh) {
        const TwoPixels<T, kTaking> pixels(x, g, image, channel, count, walk.p, walk.q, dh);
#pragma unroll
        for (int dw = 0; dw < 2; ++dw) {
#pragma unroll
          for (int j = 0; j < kWidth<kTaking>; ++j) {
            if (pixels.exists[dw]) sums[j].add(windows.dz(dh, dw, j), pixels.values[dw].at[j] - means.at[j]);
          }
        }
      }
    }
  }
  RESNET_FUSED_SHARED(Sums, of_threads, kWidth<kTaking> * kThreads);
#pragma unroll
  for (int j = 0; j < kWidth<kTaking>; ++j) of_threads[j * kThreads + thread] = sums[j];
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int j = 0; j < kWidth<kTaking>; ++j) {
        of_threads[j * kThreads + thread].merge(of_threads[j * kThreads + thread + half]);
      }
    }
  }
  if (thread < lanes && exists) {
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < Sums::kValues; ++i) {
        partials[(int64_t{blockIdx.y} * Sums::kValues + i) * g.channels + channel + j] =
            of_threads[j * kThreads + thread].value(i);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
