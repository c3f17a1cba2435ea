// How activations on a processor are cut into tiles.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace resnet_fused {
namespace {

constexpr i64 kTileBytes = 128 * 1024;  // stays in a core's second-level cache for bn_stats' second pass
constexpr i64 kTileElements = 32 * 1024;
constexpr i64 kChannelElements = 8 * 1024;  // contiguous: one lane of the sums then adds 512 numbers, in groups of 4
constexpr i64 kNarrow = 64;                 // channels_last: a tile then has at most 512 rows

i64 gcd(i64 a, i64 b) { return b == 0 ? a : gcd(b, a % b); }

void cut(Geometry& g, i64 element_size) {
  const i64 fit = std::min(kTileBytes / element_size, kTileElements);
  if (g.channels_last) {
    // Several pixels to a row: narrow rows are lengthened, and up to 128 channels a row is a multiple of a block.
    g.repeat = g.c < 128 ? kBlock / gcd(g.c, kBlock) : 1;
    while (g.repeat * g.c < kNarrow) g.repeat *= 2;
    g.width = g.repeat * g.c;
    const i64 wanted = std::max<i64>(fit / g.c, 32);
    g.tile_rows = (wanted + 4 * g.repeat - 1) / (4 * g.repeat) * 4 * g.repeat;
  } else {
    g.repeat = 1;
    g.width = g.c;
    g.tile_rows = std::min(fit, kChannelElements);
  }
  g.parts = (g.rows + g.tile_rows - 1) / g.tile_rows;
  g.tiles = g.channels_last ? g.parts : g.parts * g.c;
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return kF64;
    case ScalarType::Float: return kF32;
    case ScalarType::BFloat16: return kBF16;
    default: return kF16;
  }
}

}  // namespace

TiledActivations::TiledActivations(const char* op, const char* name, const Tensor& x)
    : Activations(op, name, x), dtype(dtype_of(scalar_type)), g{} {
  g.n = n, g.c = c, g.h = h, g.w = w, g.hw = h * w, g.rows = rows();
  g.channels_last = channels_last;
  if (numel > 0) cut(g, element_size);
}

const void* TiledActivations::channels(const char* name, const Tensor& t) {
  const char* from = static_cast<const char*>(vector(name, t));
  if (numel == 0 || !g.channels_last) return from;
  const i64 length = (g.width + kBlock) * acc_size, period = g.c * acc_size;
  periodic_.emplace_back(new char[length]);
  char* to = periodic_.back().get();
  for (i64 at = 0; at < length; at += period) std::memcpy(to + at, from, std::min(period, length - at));
  return to;
}

}  // namespace resnet_fused
