// Convolutions, with the batch norms around them: an implicit matrix product on tensor cores.
//
// Activations dense in channels_last are matrices [pixels, channels], a filter is [K, R, R, C]. Output pixel
// m = (n, p, q) and channel k is Σ over taps (r, s) and c of x[n, p·stride + r − pad, q·stride + s − pad, c] times
// filter[k, r, s, c], with pad = (R − 1) / 2: a product [N·P·Q, R·R·C] × [R·R·C, K], whose left matrix is gathered
// while it is copied.
#pragma once

#include "../channel_sums.cuh"
#include "tensor_core.cuh"

namespace resnet_fused::cuda {

constexpr int kPieces = kConvDepth / kOctet;  // of a row of a step: 16 bytes each
constexpr int kWarpN = 32;                // columns of a warp

// kM × kN outputs of a block; a warp's are kWarpM × kWarpN.
template <int kRows, int kColumns, int kRowsOfWarp>
struct ConvTile {
  static constexpr int kM = kRows, kN = kColumns, kWarpM = kRowsOfWarp;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN, kBlock = kWarpsM * kWarpsN * kLanes;
  static constexpr int kStage = (kM + kN) * kPieces;  // 16 bytes each
  static_assert(kBlock >= kN && kConvStages * kStage * sizeof(Bytes16) <= 48 << 10);
};

using ConvTile128x128 = ConvTile<128, 128, 64>;
using ConvTile128x64 = ConvTile<128, 64, 64>;
using ConvTile64x64 = ConvTile<64, 64, 32>;

// Fewer than 2³¹ output pixels; C and K are multiples of 8.
struct ConvShape {
  int n, h, w, c, k, stride;

  __host__ __device__ int p() const { return (h - 1) / stride + 1; }
  __host__ __device__ int q() const { return (w - 1) / stride + 1; }
  __host__ __device__ int64_t rows() const { return int64_t{n} * p() * q(); }
};

template <class Tile>
int64_t tiles_of_rows(const ConvShape& shape) {
  return cut(shape.rows(), Tile::kM);
}

// What is still to be done to x: act(x·scale + shift), [C].
struct ConvPrologue {
  const float *scale, *shift;
  bool relu;
};

// What is done to the sums, as in bn_act_kernel. Absent tensors are null; scale and shift: [K].
template <class T>
struct ConvEpilogue {
  const float *scale, *shift;
  const T* residual;
  bool relu;
  uint8_t* mask;
  float* partials;  // [tiles of rows, 3, K], of raw outputs: without scale, residual, relu
};

// Where 16 bytes lie in a matrix of shared memory: eight rows' pieces of one number are in different banks, and so are
// two rows' neighbouring pieces.
__device__ __forceinline__ int place(int row, int piece) { return row * kPieces + (piece ^ (row / 2 % kPieces)); }

// Position of the reduction: taps outside, channels inside.
struct ConvStep {
  int tap = 0, c = 0;

  __device__ __forceinline__ void advance(int channels) {
    c += kConvDepth;
    if (c >= channels) {
      c = 0;
      ++tap;
    }
  }
};

// A thread's part of the copies: one piece of every kApart-th row of both matrices.
template <class T, int R, class Tile>
struct ConvLoader {
  static constexpr int kApart = Tile::kBlock / kPieces, kOfX = Tile::kM / kApart, kOfFilter = Tile::kN / kApart;
  static_assert(kApart % (2 * kPieces) == 0);
  const T *x, *filter;
  int c, w, at, column;
  int64_t origin[kOfX];   // of its piece below the first tap
  unsigned inside[kOfX];  // a bit for each tap: is its pixel in the image?
  int64_t filter_origin;
  int filters_left;

  __device__ __forceinline__ ConvLoader(const T* x, const T* filter, const ConvShape& shape, int64_t first_row,
                                        int first_column)
      : x(x), filter(filter), c(shape.c), w(shape.w) {
    constexpr int kPad = (R - 1) / 2;
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, p = shape.p(), q = shape.q();
    at = place(row, piece);
    column = piece * kOctet;
    filter_origin = int64_t{first_column + row} * (R * R * c) + column;
    filters_left = shape.k - first_column - row;
    const int64_t rows = shape.rows();
#pragma unroll
    for (int i = 0; i < kOfX; ++i) {
      const int64_t m = first_row + row + i * kApart;
      const int pixel = static_cast<int>(m < rows ? m : 0), line = pixel / q;
      const int top = line % p * shape.stride - kPad, left = pixel % q * shape.stride - kPad;
      origin[i] = ((int64_t{line / p} * shape.h + top) * w + left) * c + column;
      inside[i] = 0;
#pragma unroll
      for (int tap = 0; tap < R * R; ++tap) {
        const int y = top + tap / R, z = left + tap % R;
        inside[i] |= unsigned{m < rows && y >= 0 && y < shape.h && z >= 0 && z < w} << tap;
      }
    }
  }

  __device__ __forceinline__ bool exists(int i, const ConvStep& step) const {
    return step.c + column < c && (inside[i] >> step.tap & 1);
  }

  __device__ __forceinline__ void copy(Bytes16* stage, const ConvStep& step) const {
    const int64_t shifted = (int64_t{step.tap / R} * w + step.tap % R) * c + step.c;
#pragma unroll
    for (int i = 0; i < kOfX; ++i) {
      const bool valid = exists(i, step);
      copy_async16(stage + at + i * kApart * kPieces, valid ? x + (origin[i] + shifted) : x, valid);
    }
    stage += Tile::kM * kPieces;
#pragma unroll
    for (int i = 0; i < kOfFilter; ++i) {
      const int64_t from = filter_origin + int64_t{i * kApart} * (R * R * c) + (step.tap * c + step.c);
      const bool valid = step.c + column < c && i * kApart < filters_left;
      copy_async16(stage + at + i * kApart * kPieces, valid ? filter + from : filter, valid);
    }
  }

  // To the pieces of x that this thread has copied and waited for. What is outside of the image stays 0.
  __device__ __forceinline__ void activate(Bytes16* stage, const ConvStep& step, const Octet<float>& scale,
                                           const Octet<float>& shift, bool with_relu) const {
#pragma unroll
    for (int i = 0; i < kOfX; ++i) {
      if (exists(i, step)) {
        T* piece = reinterpret_cast<T*>(stage + at + i * kApart * kPieces);
        Octet<T> z = Octet<T>::load(piece, kOctet, true);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const float value = multiply_add(z.at[j], scale.at[j], shift.at[j]);
          z.at[j] = with_relu ? relu(value) : value;
        }
        z.store(piece, kOctet, true);
      }
    }
  }
};

template <class Tile>
using ConvSums = float[Tile::kWarpM / 16][kWarpN / 8][4];

// A step's part of the warp's sums.
template <class T, class Tile>
__device__ __forceinline__ void add_products(ConvSums<Tile>& sums, const Bytes16* stage, int row, int column,
                                             int lane) {
  const Bytes16* filters = stage + Tile::kM * kPieces;
#pragma unroll
  for (int k = 0; k < kConvDepth / 16; ++k) {
    uint32_t a[Tile::kWarpM / 16][4], b[kWarpN / 8][2];
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
      load_matrices_x4(a[i], stage + place(row + i * 16 + lane % 16, k * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < kWarpN / 8; j += 2) {
      uint32_t both[4];
      load_matrices_x4(both, filters + place(column + j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) add_product<T>(sums[i][j], a[i], b[j]);
    }
  }
}

// Over the lanes that hold one column of the sums.
__device__ __forceinline__ float sum_of_column(float value) {
#pragma unroll
  for (int with = 4; with < kLanes; with *= 2) value += __shfl_xor_sync(0xffffffffu, value, with);
  return value;
}

// Moments of the columns of a warp's sums, the first left rows of them: in two passes. Lanes 0 … 3 write [kWarpN].
template <class Tile>
__device__ __forceinline__ void moments_of_columns(const ConvSums<Tile>& sums, Moments<float>* out, int left,
                                                   int lane) {
  const float count = left < 0 ? 0 : left < Tile::kWarpM ? left : Tile::kWarpM;
#pragma unroll
  for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float mean = 0, square = 0;
#pragma unroll
      for (int i = 0; i < Tile::kWarpM / 8; ++i) {
        if (i * 8 + lane / 4 < left) mean += sums[i / 2][j][i % 2 * 2 + odd];
      }
      mean = sum_of_column(mean) / count;
#pragma unroll
      for (int i = 0; i < Tile::kWarpM / 8; ++i) {
        const float delta = sums[i / 2][j][i % 2 * 2 + odd] - mean;
        if (i * 8 + lane / 4 < left) square += delta * delta;
      }
      square = sum_of_column(square);
      if (lane < 4) out[j * 8 + lane * 2 + odd] = {count, mean, square};
    }
  }
}

// Of a vector that may be absent.
__device__ __forceinline__ Octet<float> octet_or(const float* vector, int channel, int count, float otherwise) {
  if (vector != nullptr) return Octet<float>::load(vector + channel, count, true);
  Octet<float> same;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) same.at[j] = otherwise;
  return same;
}

// out[m, k] = act(Σ operand·filter · scale + shift [+ residual]), [N·P·Q, K], rounded once; mask: one bit for each
// element, where it passes the gradient. The operand is x, or with kPending what the prologue makes of it, rounded as
// if it had been stored, and 0 where a tap leaves the image. partials: count, mean and sum of squared deviations of
// each tile of rows, of out as it is stored; they are merged by finalise_moments_kernel.
//
// Grid: tiles of rows and columns; tiles of the same rows follow each other, so that all but the first find these in L2. Block:
// Tile::kBlock. Reads x (its taps again, and every tile of columns: from L2), the filter once for each tile of rows,
// and the residual; writes out. Sums are in float32; taps, channels and merges have an order that the shape alone
// decides. Every tensor begins at a multiple of 16 bytes.
template <class T, int R, bool kPending, class Tile>
__global__ void __launch_bounds__(Tile::kBlock)
conv_kernel(const T* x, ConvPrologue prologue, const T* filter, T* out, ConvEpilogue<T> epilogue, ConvShape shape) {
  // 16 rows of a warp's sums, on their way from fragments to octets.
  constexpr int kSlabRow = kWarpN + 8, kSlab = 16 * kSlabRow;
  constexpr int kSlabs = Tile::kBlock / kLanes * kSlab * sizeof(float) / sizeof(Bytes16);
  static_assert(kSlabs * sizeof(Bytes16) + Tile::kWarpsM * Tile::kN * sizeof(Moments<float>) <=
                kConvStages * Tile::kStage * sizeof(Bytes16));
  RESNET_FUSED_SHARED(Bytes16, memory, kConvStages * Tile::kStage);

  const unsigned across = (shape.k + Tile::kN - 1) / Tile::kN, tile = blockIdx.x / across;
  const int64_t first_row = int64_t{tile} * Tile::kM, rows = shape.rows();
  const int first_column = blockIdx.x % across * Tile::kN;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM, warp_column = warp % Tile::kWarpsN * kWarpN;

  const ConvLoader<T, R, Tile> loader(x, filter, shape, first_row, first_column);
  const int steps = R * R * ((shape.c + kConvDepth - 1) / kConvDepth);
  ConvStep ahead, current;
#pragma unroll
  for (int i = 0; i < kConvStages - 1; ++i) {
    if (i < steps) {
      loader.copy(memory + i * Tile::kStage, ahead);
      ahead.advance(shape.c);
    }
    commit();
  }
  ConvSums<Tile> sums = {};
  int stage = 0, free_stage = kConvStages - 1;
  for (int step = 0; step < steps; ++step) {
    Bytes16* const arrived = memory + stage * Tile::kStage;
    if constexpr (kPending) {
      const int channel = current.c + loader.column, count = channel < shape.c ? kOctet : 0;
      const auto scale = Octet<float>::load(prologue.scale + channel, count, true);
      const auto shift = Octet<float>::load(prologue.shift + channel, count, true);
      wait<kConvStages - 2>();
      loader.activate(arrived, current, scale, shift, prologue.relu);
      current.advance(shape.c);
    } else {
      wait<kConvStages - 2>();
    }
    // Now everyone's pieces are there, and everyone is done with the stage before.
    __syncthreads();
    if (step + kConvStages - 1 < steps) {
      loader.copy(memory + free_stage * Tile::kStage, ahead);
      ahead.advance(shape.c);
    }
    commit();
    add_products<T, Tile>(sums, arrived, warp_row, warp_column, lane);
    free_stage = stage;
    stage = stage + 1 == kConvStages ? 0 : stage + 1;
  }
  __syncthreads();

  const int64_t warp_first = first_row + warp_row;
  const int left = static_cast<int>(rows - warp_first < Tile::kWarpM ? rows - warp_first : Tile::kWarpM);
  if (epilogue.partials != nullptr) {
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = rounded<T>(sums[i][j][e]);
      }
    }
    auto* const moments = reinterpret_cast<Moments<float>*>(memory + kSlabs);
    moments_of_columns<Tile>(sums, moments + warp / Tile::kWarpsN * Tile::kN + warp_column, left, lane);
    __syncthreads();
    const int column = threadIdx.x, channel = first_column + column;
    if (column < Tile::kN && channel < shape.k) {
      Moments<float> total = moments[column];
#pragma unroll
      for (int i = 1; i < Tile::kWarpsM; ++i) total.merge(moments[i * Tile::kN + column]);
#pragma unroll
      for (int i = 0; i < 3; ++i) epilogue.partials[(int64_t{tile} * 3 + i) * shape.k + channel] = total.value(i);
    }
  }

  float* const slab = reinterpret_cast<float*>(memory) + warp * kSlab;
  const int octet = lane % 4 * kOctet, channel = first_column + warp_column + octet;
  const int channels = channel < shape.k ? kOctet : 0;
  const bool is_affine = epilogue.scale != nullptr || epilogue.shift != nullptr;
  const auto scale = octet_or(epilogue.scale, channel, channels, 1.0f);
  const auto shift = octet_or(epilogue.shift, channel, channels, 0.0f);
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        slab[(lane / 4 + e / 2 * 8) * kSlabRow + j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      if (i * 16 + row < left && channels != 0) {
        const int64_t first = (warp_first + i * 16 + row) * shape.k + channel;
        const auto sum = Octet<float>::load(slab + row * kSlabRow + octet, kOctet, true);
        Octet<T> z, r;
        if (epilogue.residual != nullptr) r = Octet<T>::load(epilogue.residual + first, kOctet, true);
        uint8_t bits = 0;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          float value = sum.at[j];
          if (is_affine) value = multiply_add(value, scale.at[j], shift.at[j]);
          if (epilogue.residual != nullptr) value += r.at[j];
          z.at[j] = activated<T>(value, epilogue.relu, j, bits);
        }
        z.store(out + first, kOctet, true);
        if (epilogue.mask != nullptr) epilogue.mask[first / kOctet] = bits;
      }
    }
  }
}

}  // namespace resnet_fused::cuda
