// How a shape becomes a grid: host code, for the launchers of the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

#include "sizes.h"

namespace resnet_fused::cuda {

struct LaunchPlan {
  int64_t blocks_x, blocks_y;
  int threads;
  int64_t each;  // rows, or octets of planes, of a split; octets of a thread
  int64_t shared_bytes;
  int64_t bytes;  // that have to be read and written
  bool whole;     // the kernels' kWhole or kSteady is true
  int lanes;      // octets of a tile of channels, in sums of columns
};

namespace plan {

constexpr int64_t kGridOfSums = 1024;    // some waves on the largest GPU; fixed, so that sums have the same bits on all
constexpr int64_t kRowsAtLeast = 8;        // of a thread
constexpr int64_t kOctetsAtLeast = 1024;   // of a split of planes: four of each thread
constexpr int64_t kBlocksOfConv = 264;     // two for each multiprocessor of an H200
constexpr int64_t kWindowsAtLeast = 4;     // of each thread in a split
constexpr int64_t kRowsAtMost = 1 << 20;  // or octets: a block counts its elements in float32

// Splits of so many rows (or octets), none of them empty: {splits, rows of each}.
inline std::pair<int64_t, int64_t> split(int64_t rows, int64_t beside, int64_t at_least) {
  const int64_t wanted = std::max<int64_t>(1, kGridOfSums / beside);
  const int64_t each = std::min(kRowsAtMost, std::max(at_least, cut(rows, wanted)));
  return {std::max<int64_t>(1, cut(rows, each)), each};
}

}  // namespace plan

// Of a kernel that passes over count elements once, reading and writing so many tensors of them, and bits of masks. aligned:
// tensors and vectors begin at multiples of 16 bytes. resident: blocks that run at once, multiprocessors times the kernel's
// blocks of each; more of them would only read the vectors again.
inline LaunchPlan plan_elementwise(int64_t count, int64_t inner, int64_t channels, bool aligned, int element_size, int tensors,
                                   int masks, int64_t resident) {
  const int64_t octets = cut(count, kOctet), blocks = std::max<int64_t>(1, cut(octets, kThreads));
  const int64_t bytes = count * element_size * tensors + octets * masks;
  int64_t launched = std::min(blocks, resident);
  bool whole = aligned && inner == 1 && channels % kOctet == 0;
  if (whole && blocks > resident) {
    const int64_t units = channels / kOctet, period = units / std::gcd<int64_t>(units, kThreads);
    whole = period <= resident;
    if (whole) launched -= launched % period;
  }
  return {launched, 1, kThreads, cut(octets, launched * kThreads), 0, bytes, whole, 0};
}

// Of sums over the rows of each channel, so many values each: a matrix [rows, channels], or with inner > 1 planes.
inline LaunchPlan plan_channel_sums(
    int64_t images, int64_t inner, int64_t channels, bool channels_last, bool aligned, int element_size,
    int accumulate_size, int tensors, int values) {
  const int64_t units = cut(channels, kOctet), tiles = channels_last ? cut(units, kLanes) : channels;
  const int64_t lanes = cut(units, tiles), rows_at_least = plan::kRowsAtLeast * (kThreads / lanes);
  const auto [splits, each] = channels_last
                                  ? plan::split(images * inner, tiles, rows_at_least)
                                  : plan::split(images * cut(inner, kOctet), tiles, plan::kOctetsAtLeast);
  const int64_t partials = splits * channels * values * accumulate_size;
  return {tiles, splits, kThreads, each, int64_t{kThreads} * (channels_last ? kOctet : 1) * values * accumulate_size,
          images * inner * channels * element_size * tensors + 2 * partials,
          aligned && (channels_last ? channels : inner) % kOctet == 0, static_cast<int>(lanes)};
}

// Of outputs that a block of a convolution makes, and its threads.
struct ConvTileSize {
  int m, n, threads;
};

constexpr ConvTileSize kConvTiles[] = {{128, 128, 256}, {128, 64, 128}, {64, 64, 128}};

struct ConvPlan {
  int tile;  // of kConvTiles
  int64_t blocks, shared_bytes, bytes;
};

// Of a convolution of so many elements with a filter of so many taps of c channels, whose output is [rows, k]: the largest tile
// that still gives each multiprocessor of a large GPU work. The shape alone decides, so that statistics, which are summed by
// tiles, have the same bits on all.
inline ConvPlan plan_conv(int64_t elements, int64_t rows, int64_t k, int64_t c, int taps) {
  ConvPlan plan{};
  for (const ConvTileSize& tile : kConvTiles) {
    plan.blocks = cut(rows, tile.m) * cut(k, tile.n);
    plan.shared_bytes = int64_t{kConvStages} * (tile.m + tile.n) * kConvDepth * 2;
    if (plan.blocks >= plan::kBlocksOfConv && (k > 64 || tile.n <= 64)) break;
    if (plan.tile < 2) ++plan.tile;
  }
  plan.bytes = 2 * (elements + k * taps * c + rows * k);
  return plan;
}

// Blocks of a kernel that joins splits of so many channels.
inline unsigned blocks_of_join(int64_t channels) { return static_cast<unsigned>(cut(channels, kChannelsOfJoin)); }

// Blocks of a kernel that walks over so many windows' units of channels.
inline int64_t plan_windows(int64_t units, int64_t resident) {
  return std::max<int64_t>(1, std::min(cut(units, kThreads), resident));
}

struct WindowSumsPlan {
  int64_t tiles;   // of lanes units of channels
  int splits, lanes;
  int64_t each;    // windows of a split
};

// Of sums over windows that have so many units of channels; of planes, whose neighbours in memory are windows.
inline WindowSumsPlan plan_window_sums(int64_t windows, int64_t units, bool planes) {
  int lanes = 1;
  while (!planes && lanes < kLanes && lanes < units) lanes *= 2;
  const int64_t tiles = cut(units, lanes);
  const auto [splits, each] = plan::split(windows, tiles, plan::kWindowsAtLeast * (kThreads / lanes));
  return {tiles, static_cast<int>(splits), lanes, each};
}

}  // namespace resnet_fused::cuda
