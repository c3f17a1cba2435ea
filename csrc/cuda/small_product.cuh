// Products of two small matrices, out [R, C] = Σ_i left[i, r]·right[i, c], a tile at a time, in float32 or float64: what the
// covariance plan does between its passes over rows. No tensor cores: float32 would lose digits, of which W·Cov and
// Wᵀ diag(b) W, where channels are correlated, have none to spare.
#pragma once

#include "device.cuh"

namespace resnet_fused::cuda {

constexpr int kTileRows = 16, kTileColumns = 32;  // a block's tile; thread t has column t % 32 of rows t / 32 and t / 32 + 8
constexpr int kRowsApart = kThreads / kTileColumns, kRowsOfThread = kTileRows / kRowsApart;
constexpr int kTileDepth = 64;  // of it in shared memory at a time
constexpr int kBlocksOfProduct = 1;  // of a multiprocessor: grids have few, and need not save registers for more

// kTileDepth by kWidth elements of an operand on their way to shared memory, by way of registers, where the next ones wait
// while those in front are multiplied: there are hardly more blocks than multiprocessors, and nothing else to hide L2 behind.
//
// An operand has: Element; load(i, j), which is 0 outside of the matrix; widen(Element), in D; and along_depth(i), whether i
// and not j should run along neighbouring lanes, for panels from i on.
template <class D, int kWidth, class Operand>
struct Panel {
  static constexpr int kRow = kWidth + 16 / sizeof(D);  // in shared memory: 16-byte loads, and few bank conflicts across
  static constexpr int kEach = kTileDepth * kWidth / kThreads;

  typename Operand::Element values[kEach];
  bool along_depth;

  __device__ __forceinline__ int depth(int n) const {
    const int i = n * kThreads + threadIdx.x;
    return along_depth ? i % kTileDepth : i / kWidth;
  }

  __device__ __forceinline__ int across(int n) const {
    const int i = n * kThreads + threadIdx.x;
    return along_depth ? i / kTileDepth : i % kWidth;
  }

  __device__ __forceinline__ void load(const Operand& operand, int first) {
    along_depth = operand.along_depth(first);
#pragma unroll
    for (int n = 0; n < kEach; ++n) values[n] = operand.load(first + depth(n), across(n));
  }

  __device__ __forceinline__ void store(D* to) const {
#pragma unroll
    for (int n = 0; n < kEach; ++n) to[depth(n) * kRow + across(n)] = Operand::widen(values[n]);
  }
};

// A warp holds the whole tile, 4 by 4 of it each lane, and takes every eighth i; then the warps' sums are joined. So 16 rows,
// few enough to have a block for most multiprocessors, still are 16 products for 8 loads.
template <class D>
struct SmallProduct {
  static constexpr int kSide = 4, kLanesAcross = kTileColumns / kSide;
  static constexpr int kWarpsOfProduct = kThreads / kLanes;
  static constexpr int kElements = kThreads * kSide * kSide;
  static constexpr int kShared = kElements * sizeof(D) / sizeof(Bytes16);  // 16 KiB for float32, 32 for float64

  // Of the thread's rows; every thread of the block calls it.
  template <class Left, class Right>
  static __device__ __forceinline__ void run(Bytes16* memory, int depth, const Left& left, const Right& right,
                                             D (&out)[kRowsOfThread]) {
    Panel<D, kTileRows, Left> left_panel;
    Panel<D, kTileColumns, Right> right_panel;
    constexpr int kLeftRow = Panel<D, kTileRows, Left>::kRow, kRightRow = Panel<D, kTileColumns, Right>::kRow;
    static_assert(kTileDepth * (kLeftRow + kRightRow) <= kElements && kTileRows * kTileColumns == kLanes * kSide * kSide);
    D* const shared = reinterpret_cast<D*>(memory);
    D* const of_left = shared;
    D* const of_right = shared + kTileDepth * kLeftRow;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int row = lane / kLanesAcross * kSide, column = lane % kLanesAcross * kSide;
    D sums[kSide][kSide] = {};
    left_panel.load(left, 0);
    right_panel.load(right, 0);
    for (int first = 0; first < depth; first += kTileDepth) {
      __syncthreads();  // what was in shared memory has been read
      left_panel.store(of_left);
      right_panel.store(of_right);
      __syncthreads();
      if (first + kTileDepth < depth) {
        left_panel.load(left, first + kTileDepth);
        right_panel.load(right, first + kTileDepth);
      }
#pragma unroll
      for (int n = 0; n < kTileDepth / kWarpsOfProduct; ++n) {
        const int i = n * kWarpsOfProduct + warp;
        D a[kSide], b[kSide];
        load(a, of_left + i * kLeftRow + row);
        load(b, of_right + i * kRightRow + column);
#pragma unroll
        for (int r = 0; r < kSide; ++r) {
#pragma unroll
          for (int c = 0; c < kSide; ++c) sums[r][c] = multiply_add(a[r], b[c], sums[r][c]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
#pragma unroll
      for (int c = 0; c < kSide; ++c) shared[(warp * kTileRows + row + r) * kTileColumns + column + c] = sums[r][c];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRowsOfThread; ++n) {
      out[n] = D(0);
#pragma unroll
      for (int w = 0; w < kWarpsOfProduct; ++w) out[n] += shared[w * kTileRows * kTileColumns + n * kThreads + threadIdx.x];
    }
  }

 private:
  static __device__ __forceinline__ void load(D (&to)[kSide], const D* from) {
    constexpr int kPart = sizeof(Bytes16) / sizeof(D);
#pragma unroll
    for (int i = 0; i < kSide; i += kPart) {
      const Bytes16 bytes = *pieces_at(from + i);
      memcpy(to + i, &bytes, sizeof(bytes));
    }
  }
};

}  // namespace resnet_fused::cuda
