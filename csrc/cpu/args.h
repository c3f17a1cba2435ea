// What the drivers (compiled once) hand to the kernels (compiled once per instruction set). Plain data and pointers only:
// nothing inline may be shared between translation units with different instruction sets, or the linker could keep the
// wrong copy.
#pragma once

#include <cstdint>

namespace resnet_fused {

typedef int64_t i64;

// Elements are handled in blocks of this many; mask words and padding follow it.
constexpr i64 kBlock = 16;

// How the channels lie in memory, and how reductions are cut into tiles. Depends on shape and dtype only, never on the
// number of threads, so that sums have the same bits on any machine setting.
struct Geometry {
  i64 n, c, h, w, hw;
  bool channels_last;
  // channels_last: `repeat` pixels form one row of `width` = repeat * c elements, so that narrow tensors fill the vectors.
  i64 repeat, width;
  i64 rows;       // elements per channel, n * hw
  i64 tile_rows;  // elements per channel in a tile
  i64 parts;      // tiles per channel
  i64 tiles;      // tiles in all: parts (channels_last) or c * parts (contiguous)
};

// Per-channel vectors (acc_t*). channels_last: periodic, p[j] = v[j % c] for j < width + kBlock. contiguous: v itself.
struct Channels {
  const void *mean, *scale, *shift, *a, *b, *c;
};

enum class Gate : int { kOpen = 0, kMask = 1, kRecompute = 2 };  // where dz comes from: grad, a mask, or x again

struct Args {
  Geometry g;
  Channels p;
  const void *x, *grad, *other;  // other: residual, second summand or sum so far
  const uint8_t* mask;           // read
  i64 mask_bytes;
  uint8_t* mask_out;  // written, or null
  const uint8_t* index;
  uint8_t* index_out;
  void* out;  // or null
  bool relu;
  Gate gate;
  // Partial results, acc_t [parts][c] each.
  void *tile_shift, *sum1, *sum2;
};

typedef void (*RangeKernel)(const Args&, i64 begin, i64 end, void* scratch);

// One instruction set's kernels for one dtype. Ranges are elements for the element-wise kernels, tiles for bn_stats and
// bn_act_backward_reduce, and for the pooling kernels output rows, or input rows, or planes, as each says.
struct Table {
  RangeKernel bn_act, bn_act_backward, add_relu, mask_grad;
  RangeKernel bn_stats, bn_act_backward_reduce;
  RangeKernel pool, pool_backward_reduce, pool_backward;
};

enum Dtype : int { kF64 = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kDtypes = 4 };

namespace baseline {
extern const Table kTables[kDtypes];
}
namespace avx2 {
extern const Table kTables[kDtypes];
}
namespace avx512 {
extern const Table kTables[kDtypes];
}

}  // namespace resnet_fused
