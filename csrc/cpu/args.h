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

// --- matrix products (products.inc, pointwise.inc, cross.inc). A channels_last tensor is a matrix [pixels, channels]. ---

constexpr i64 kStrip = 32;       // output columns summed at a time; weights are padded to a multiple of it
constexpr i64 kRowUnit = 24;     // rows: a multiple of every kernel's group, and of 8, so that no mask byte is shared
constexpr int kTerms = 3;        // products that one pass adds
constexpr i64 kChunkRows = 128;  // at most so many rows are summed in the accumulation type before sums are merged

// Which pixel row m of a product is: m itself, or with a stride (n, p * sh, q * sw) of [N, H, W].
struct Rows {
  bool dense;
  i64 pq, q, hw, w, sh, sw;
};

// A matrix [rows, k] read from a tensor of k channels, where its mask (of the whole tensor, dense) is set.
struct Operand {
  const void* x;
  i64 k;
  Rows rows;
  const uint8_t* mask;
  i64 mask_bytes;
  const void* centre;  // [k] in the type of the products, subtracted behind the mask; or null
};

// act(Σ_i scale_i (x_i weight_iᵀ) + shift + residual): [m, n]
struct ProductArgs {
  i64 m, n, tile_rows;
  bool fresh;         // out is a dense block whose pages come with the first write to them
  bool fetch;         // the next row tile's x early: both fit in the cache
  bool fetch_panels;  // parts of the weight early: it does not fit
  int count;      // of products
  bool separate;  // two products, each with its sum and scale; else one sum
  Operand in[kTerms];
  const void* weight[kTerms];
  i64 stride_n[kTerms], stride_k[kTerms];  // of the weight, in elements
  void* panels[kTerms];                    // the weight as the kernels read it
  // acc_t, padded to whole strips.
  const void *scale[2], *shift;
  const void* residual;  // or null; rows like out
  const uint8_t* residual_mask;
  i64 out_mask_bytes;
  Rows out_rows;
  void* out;
  uint8_t* mask_out;  // written, or null
  bool relu;
};

// A part of Σ_m a[m, :]ᵀ b[m, :].
struct CrossTile {
  i64 a, a_count, b, b_count;
  bool sums;  // this tile also takes the sums of a's columns
};

struct CrossArgs {
  Operand a, b;
  i64 m, chunk_rows, chunks, splits;
  const CrossTile* tiles;
  i64 tile_count, max_a, max_b;
  bool upper;     // what lies under the diagonal is not needed
  void* partial;  // [splits][a.k][b.k]
  double* sums;   // [splits][a.k]
};

typedef void (*ProductKernel)(const ProductArgs&, i64 begin, i64 end, void* scratch);
typedef void (*CrossKernel)(const CrossArgs&, i64 begin, i64 end, void* scratch);

// One instruction set's products for one dtype. Ranges: strips for pack_weight, units of kRowUnit rows for pointwise,
// splits * tiles for the cross products, which are merged in float32 (wgrad of 16-bit dtypes) or float64.
struct Products {
  ProductKernel pack_weight, pointwise;
  CrossKernel wgrad, gram;
  i64 (*panel_bytes)(i64 n, i64 k);
  i64 (*pointwise_scratch)(const ProductArgs&);
  i64 (*wgrad_scratch)(const CrossArgs&);
  i64 (*gram_scratch)(const CrossArgs&);
};

enum Dtype : int { kF64 = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kDtypes = 4 };

namespace baseline {
extern const Table kTables[kDtypes];
extern const Products kProducts[kDtypes];
}
namespace avx2 {
extern const Table kTables[kDtypes];
extern const Products kProducts[kDtypes];
}
namespace avx512 {
extern const Table kTables[kDtypes];
extern const Products kProducts[kDtypes];
}
namespace avx512_bf16 {
extern const Products kProductsBF16;
}

}  // namespace resnet_fused
