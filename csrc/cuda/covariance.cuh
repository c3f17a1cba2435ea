// The algebra of the covariance plan between its passes over rows (docs/covariance.md): batch norm of Y = A Wᵀ, W [K, C],
// told from the mean ā and the covariance Cov [C, C] of A's rows. Formulas: resnet_fused/statistics.py.
//
// T: of the filter, A: Accumulate<T>, D: of ā and Cov, float for half precision and else double. K is outputs, C channels;
// any numbers. Products of matrices are in D, sums along one row or column in double; the shape alone decides their order.
#pragma once

#include "norm.cuh"
#include "small_product.cuh"

namespace resnet_fused::cuda {

// Packed moments: ā [C], then the upper triangle of Cov, row by row. Where element (row, column), row <= column, is.
__host__ __device__ __forceinline__ int64_t packed_at(int64_t row, int64_t column, int64_t channels) {
  return channels + row * (2 * channels - row + 1) / 2 + column - row;
}

// Rows of W from first on, as the left side of W·Cov.
template <class T, class D>
struct RowsOfFilter {
  using Element = T;
  const T* weight;
  int64_t first, outputs;
  int channels;

  __device__ __forceinline__ bool along_depth(int) const { return true; }
  __device__ __forceinline__ T load(int c, int r) const {
    return c < channels && first + r < outputs ? weight[(first + r) * channels + c] : T(0);
  }
  static __device__ __forceinline__ D widen(T w) { return static_cast<D>(w); }
};

// Columns of W from first on: [K, 32] of it.
template <class T, class D>
struct ColumnsOfFilter {
  using Element = T;
  const T* weight;
  int first, outputs, channels;

  __device__ __forceinline__ bool along_depth(int) const { return false; }
  __device__ __forceinline__ T load(int k, int j) const {
    return k < outputs && first + j < channels ? weight[int64_t{k} * channels + first + j] : T(0);
  }
  static __device__ __forceinline__ D widen(T w) { return static_cast<D>(w); }
};

// The same of diag(b) W.
template <class T, class D>
struct ColumnsOfScaledFilter {
  struct Element {
    T w;
    Accumulate<T> b;
  };
  ColumnsOfFilter<T, D> filter;
  const Accumulate<T>* b;

  __device__ __forceinline__ bool along_depth(int) const { return false; }
  __device__ __forceinline__ Element load(int k, int j) const {
    return {filter.load(k, j), k < filter.outputs ? b[k] : Accumulate<T>(0)};
  }
  static __device__ __forceinline__ D widen(Element e) { return static_cast<D>(e.b) * static_cast<D>(e.w); }
};

// Columns of Cov from first on, as gram leaves it: [C, C] of S, of which D is made.
template <class S, class D>
struct ColumnsOfCovariance {
  using Element = S;
  const S* cov;
  int first, channels;

  __device__ __forceinline__ bool along_depth(int) const { return false; }
  __device__ __forceinline__ S load(int c, int j) const {
    return c < channels && first + j < channels ? cov[int64_t{c} * channels + first + j] : S(0);
  }
  static __device__ __forceinline__ D widen(S value) { return static_cast<D>(value); }
};

// The same from packed moments.
template <class D>
struct ColumnsOfPacked {
  using Element = D;
  const D* packed;
  int first, channels;

  // Below the diagonal a column of Cov is what was kept, as a row.
  __device__ __forceinline__ bool along_depth(int c) const { return c > first; }
  __device__ __forceinline__ D load(int c, int j) const {
    const int d = first + j;
    return c < channels && d < channels ? packed[packed_at(c < d ? c : d, c < d ? d : c, channels)] : D(0);
  }
  static __device__ __forceinline__ D widen(D value) { return value; }
};

// Of a warp's lanes, in every lane.
template <class V>
__device__ __forceinline__ V sum_of_warp(V value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

// Blocks of through_covariance_kernel, and of covariance_rows_kernel along x.
inline unsigned row_blocks(int64_t outputs) { return static_cast<unsigned>(cut(outputs, kTileRows)); }

// mean µ_k = w_k·ā and var σ²_k = w_kᵀ Cov w_k, at least 0 (or NaN); flagged where unit·κ_k > limit, with
// κ_k = (Σ_c |w_kc| √(Cov_cc + ā_c²))² / σ²_k (ill_conditioned). packed: ā and half of Cov, rounded to D.
//
// S: of ā [C] and Cov [C, C], which are rounded to D first. Grid: row_blocks. Each block reads 16 rows of W once for each 32
// channels, from L1, and all of Cov, from L2.
template <class T, class S, class D>
__global__ void __launch_bounds__(kThreads, kBlocksOfProduct)
through_covariance_kernel(const T* weight, const S* mean_a, const S* cov, int outputs, int channels, double unit,
                          double limit, D* mean, D* var, uint8_t* flagged, D* packed) {
  RESNET_FUSED_SHARED(Bytes16, shared, SmallProduct<D>::kShared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t first = int64_t{blockIdx.x} * kTileRows;
  D squares[kRowsOfThread] = {};
  for (int column = 0; column < channels; column += kTileColumns) {
    D products[kRowsOfThread];
    SmallProduct<D>::run(shared, channels, RowsOfFilter<T, D>{weight, first, outputs, channels},
                         ColumnsOfCovariance<S, D>{cov, column, channels}, products);
#pragma unroll
    for (int n = 0; n < kRowsOfThread; ++n) {
      const int64_t k = first + n * kRowsApart + warp;
      if (k < outputs && column + lane < channels) {
        squares[n] = multiply_add(products[n], static_cast<D>(weight[k * channels + column + lane]), squares[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kRowsOfThread; ++n) {
    const int64_t k = first + n * kRowsApart + warp;
    if (k >= outputs) break;
    double sum = 0, size = 0;
    for (int c = lane; c < channels; c += kLanes) {
      const double w = static_cast<double>(weight[k * channels + c]), of_mean = static_cast<D>(mean_a[c]);
      sum = multiply_add(w, of_mean, sum);
      const double variance = static_cast<D>(cov[int64_t{c} * channels + c]);
      size += std::abs(w) * std::sqrt(multiply_add(of_mean, of_mean, variance));
    }
    sum = sum_of_warp(sum);
    size = sum_of_warp(size);
    const D square = sum_of_warp(squares[n]);
    const D at_least_0 = square < D(0) ? D(0) : square;
    if (lane == 0) {
      mean[k] = static_cast<D>(sum);
      var[k] = at_least_0;
      flagged[k] = unit * size * size > limit * at_least_0;
    }
  }
  for (int row = blockIdx.x; row < channels; row += gridDim.x) {
    if (threadIdx.x == 0) packed[row] = static_cast<D>(mean_a[row]);
    for (int column = row + threadIdx.x; column < channels; column += kThreads) {
      packed[packed_at(row, column, channels)] = static_cast<D>(cov[int64_t{row} * channels + column]);
    }
  }
}

// U: of t; P: of the norm's parameters; W: of the filter's gradient.
template <class T, class D, class U, class P, class W>
struct CovarianceRows {
  using A = Accumulate<T>;
  const U* t;        // [K, C]: dzᵀ(A − ā), with frozen statistics dzᵀA
  const T* weight;   // [K, C]
  const D* packed;   // moments; null: frozen statistics
  const A *sum_dz, *mean, *rstd, *scale;  // [K]; mean: only where statistics are frozen
  int64_t count;                          // rows of A
  int outputs, channels;
  CoefficientVectors<A, P> to;
  A* mean_dz;  // [K]
  W* dweight;  // [K, C]; or null
  T* scaled;   // [K, C]
};

// Blocks of covariance_rows_kernel along y: where few rows leave multiprocessors idle, tiles of columns are shared out. The
// results have the same bits for any number.
inline unsigned column_blocks(int64_t outputs, int64_t channels) {
  constexpr int kEnough = 128;
  const int64_t tiles = cut(channels, kTileColumns), wanted = kEnough / row_blocks(outputs);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < tiles ? wanted : tiles);
}

// What belongs to a row k of the backward, s_k = Σ dz (Y_k − µ_k) = ⟨w_k, t_k⟩ (frozen: less mean_k·Σ dz):
// the coefficients of batch norm's gradient, mean_dz = Σ dz / M, dW = diag(a) t + M·diag(b)·(W Cov), scaled = diag(a) W.
//
// s_k is rounded to A, dW and scaled once, from double and A. Grid: row_blocks, column_blocks. A block reads its 16 rows of t
// and W (twice), and of Cov 32 columns for each of its tiles, from L2.
template <class T, class D, class U, class P, class W>
__global__ void __launch_bounds__(kThreads, kBlocksOfProduct)
covariance_rows_kernel(CovarianceRows<T, D, U, P, W> at) {
  using A = Accumulate<T>;
  RESNET_FUSED_SHARED(Bytes16, shared, SmallProduct<D>::kShared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, channels = at.channels;
  const int64_t first = int64_t{blockIdx.x} * kTileRows, first_of_warp = first + warp;
  const bool has_product = at.packed != nullptr && at.dweight != nullptr;
  A times_rows[kRowsOfThread] = {};  // M·b
#pragma unroll
  for (int n = 0; n < kRowsOfThread; ++n) {
    const int64_t k = first_of_warp + n * kRowsApart;
    if (k >= at.outputs) break;
    double centred = 0;
    for (int c = lane; c < channels; c += kLanes) {
      const int64_t i = k * channels + c;
      centred = multiply_add(static_cast<double>(at.weight[i]), static_cast<double>(at.t[i]), centred);
    }
    centred = sum_of_warp(centred);
    const A sum_dz = at.sum_dz[k];
    if (at.packed == nullptr) centred = multiply_add(-static_cast<double>(at.mean[k]), static_cast<double>(sum_dz), centred);
    const Coefficients<A> of(sum_dz, static_cast<A>(centred), at.rstd[k], at.scale[k], at.count, at.packed != nullptr);
    times_rows[n] = of.b * static_cast<A>(at.count);
    if (lane == 0 && blockIdx.y == 0) {
      at.to.store(k, of, sum_dz);
      at.mean_dz[k] = sum_dz / static_cast<A>(at.count);
    }
  }
  for (int column = blockIdx.y * kTileColumns; column < channels; column += gridDim.y * kTileColumns) {
    D products[kRowsOfThread] = {};
    if (has_product) {
      SmallProduct<D>::run(shared, channels, RowsOfFilter<T, D>{at.weight, first, at.outputs, channels},
                           ColumnsOfPacked<D>{at.packed, column, channels}, products);
    }
#pragma unroll
    for (int n = 0; n < kRowsOfThread; ++n) {
      const int64_t k = first_of_warp + n * kRowsApart, i = k * channels + column + lane;
      if (k >= at.outputs || column + lane >= channels) break;
      const A a = at.scale[k];
      if (at.dweight != nullptr) {
        const double of_norm = static_cast<double>(times_rows[n]) * static_cast<double>(products[n]);
        at.dweight[i] = static_cast<W>(multiply_add(static_cast<double>(a), static_cast<double>(at.t[i]), of_norm));
      }
      at.scaled[i] = static_cast<T>(a * static_cast<A>(at.weight[i]));
    }
  }
}

// Blocks of coupling_kernel along x and y.
inline unsigned coupling_blocks_x(int64_t channels) { return static_cast<unsigned>(cut(channels, kTileColumns)); }
inline unsigned coupling_blocks_y(int64_t channels) { return static_cast<unsigned>(cut(channels, kTileRows)); }

// G = Wᵀ diag(b) W [C, C] in D, rounded to A, and of that high in T and, unless null, low = what it was rounded by, in T:
// symmetric to the bit. mean_to: ā [C] of packed moments, in A.
//
// Grid: coupling_blocks_x, coupling_blocks_y; blocks below the diagonal have nothing to do, those on it write their mirror
// image. A block reads 16 and 32 columns of W, from L2.
template <class T, class D>
__global__ void __launch_bounds__(kThreads, kBlocksOfProduct)
coupling_kernel(const T* weight, const Accumulate<T>* b, const D* packed, int outputs, int channels, T* high, T* low,
                Accumulate<T>* mean_to) {
  using A = Accumulate<T>;
  RESNET_FUSED_SHARED(Bytes16, shared, SmallProduct<D>::kShared);
  const int first_row = blockIdx.y * kTileRows, first_column = blockIdx.x * kTileColumns;
  if (first_column + kTileColumns <= first_row) return;
  const int column = first_column + threadIdx.x % kTileColumns;
  if (blockIdx.y == 0 && threadIdx.x < kTileColumns && column < channels) {
    mean_to[column] = static_cast<A>(packed[column]);
  }
  D products[kRowsOfThread];
  SmallProduct<D>::run(shared, outputs, ColumnsOfScaledFilter<T, D>{{weight, first_row, outputs, channels}, b},
                       ColumnsOfFilter<T, D>{weight, first_column, outputs, channels}, products);
#pragma unroll
  for (int n = 0; n < kRowsOfThread; ++n) {
    const int row = first_row + n * kRowsApart + threadIdx.x / kTileColumns;
    if (row > column || column >= channels) continue;
    const A value = static_cast<A>(products[n]);
    const T part = static_cast<T>(value);
    const int64_t i = int64_t{row} * channels + column, mirrored = int64_t{column} * channels + row;
    high[i] = high[mirrored] = part;
    if (low != nullptr) low[i] = low[mirrored] = static_cast<T>(value - static_cast<A>(part));
  }
}

constexpr int kShiftColumns = 8;  // of a block

// Of coupling_shift_kernel.
inline unsigned coupling_shift_blocks(int64_t channels) { return static_cast<unsigned>(cut(channels, kShiftColumns)); }

// constant = −mean_dzᵀ·scaled − āᵀ·(high + low) [C]: dA = dz·(aW) + A·G + constant has rows that sum to zero, as the weights
// were rounded. low: or null.
//
// A launch of its own: no block of coupling_kernel has whole columns of G, and with atomics in their place the order of
// the sum would be left to chance. Grid: coupling_shift_blocks. Reads each matrix once; sums in double.
template <class T>
__global__ void __launch_bounds__(kThreads)
coupling_shift_kernel(const T* scaled, const Accumulate<T>* mean_dz, const T* high, const T* low,
                      const Accumulate<T>* mean_a, int outputs, int channels, Accumulate<T>* constant) {
  using A = Accumulate<T>;
  constexpr int kRows = kThreads / kShiftColumns;
  RESNET_FUSED_SHARED(double, sums, kThreads);
  const int thread = threadIdx.x, column = blockIdx.x * kShiftColumns + thread % kShiftColumns;
  double sum = 0;
  if (column < channels) {
#pragma unroll 8
    for (int k = thread / kShiftColumns; k < outputs; k += kRows) {
      sum = multiply_add(static_cast<double>(mean_dz[k]), static_cast<double>(scaled[int64_t{k} * channels + column]), sum);
    }
#pragma unroll 4
    for (int c = thread / kShiftColumns; c < channels; c += kRows) {
      const int64_t i = int64_t{c} * channels + column;
      const A both = low == nullptr ? static_cast<A>(high[i]) : static_cast<A>(high[i]) + static_cast<A>(low[i]);
      sum = multiply_add(static_cast<double>(mean_a[c]), static_cast<double>(both), sum);
    }
  }
  sums[thread] = sum;
  for (int half = kThreads / 2; half >= kShiftColumns; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread < kShiftColumns && column < channels) constant[column] = static_cast<A>(-sums[thread]);
}

}  // namespace resnet_fused::cuda
