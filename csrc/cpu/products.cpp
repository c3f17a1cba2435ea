// CPU operators: products of matrices for 1x1 convolutions. Schemas and meaning: ../ops.cpp.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <new>

#include "driver.h"

namespace resnet_fused {
namespace {

using Optional = std::optional<Tensor>;
using Stride = std::vector<int64_t>;
using Shape = std::array<i64, 4>;

constexpr i64 kGrainProducts = 1 << 19;         // multiplications below which a second thread does not pay
constexpr i64 kTileBytes = 256 * 1024;          // a row tile, or a weight, stays in the second-level cache
constexpr i64 kMostRows = 96, kLeastRows = 48;  // of a row tile
constexpr i64 kFreshBytes = 32 << 20;           // larger blocks come anew from the kernel, with glibc's malloc
constexpr i64 kTasks = 16;                      // weight gradients of few tiles are split by rows into so many tasks
constexpr i64 kFewRows = 32;              // of a chunk, where sums in the accumulation type must be good
constexpr i64 kLeastChunks = 8;                 // of a split

i64 divide_up(i64 n, i64 by) { return (n + by - 1) / by; }
i64 round_up(i64 n, i64 to) { return divide_up(n, to) * to; }

// Uninitialised memory on a cache line's border.
struct Memory {
  explicit Memory(i64 bytes) : p(::operator new(std::max<i64>(bytes, 1), std::align_val_t{64})) {}
  ~Memory() { ::operator delete(p, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* p;
};

// --- checks ---

void check_layout(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(dense(t, true), op, ": ", name, ": expected a tensor dense in channels_last, got shape ",
                  shape_string(t.sizes()), " with strides ", shape_string(t.strides()));
}

// The first activation; it sets the dtype of all.
Activations first_of(const char* op, const char* name, const Tensor& x) {
  Activations t(op, name, x);
  check_layout(op, name, x);
  return t;
}

void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, ": expected ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// Another activation of that shape; a size of -1 may be any.
const void* activation(const Activations& like, const char* name, const Tensor& t, const Shape& shape) {
  check_type(like.op, name, t, like.scalar_type);
  bool same = t.dim() == 4;
  Shape expected = shape;
  for (int i = 0; same && i < 4; ++i) {
    if (shape[i] < 0) expected[i] = t.size(i);
    same = t.size(i) == expected[i];
  }
  STD_TORCH_CHECK(same, like.op, ": ", name, ": expected shape ", shape_string({expected.data(), 4}),
                  " (-1: any size), got ", shape_string(t.sizes()));
  check_layout(like.op, name, t);
  return t.const_data_ptr();
}

const uint8_t* mask_of(const char* op, const char* name, const Tensor& t, i64 bytes) {
  check_type(op, name, t, ScalarType::Byte);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == bytes && t.is_contiguous(), op, ": ", name,
                  ": expected a contiguous tensor of shape [", bytes, "], one bit per element, got ",
                  shape_string(t.sizes()));
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

const void* vector_of(const Activations& like, const char* name, const Tensor& t, i64 n) {
  check_type(like.op, name, t, like.acc_type);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, like.op, ": ", name, ": expected shape [", n, "], got ",
                  shape_string(t.sizes()));
  STD_TORCH_CHECK(n <= 1 || t.stride(0) == 1, like.op, ": ", name, ": expected stride 1, got ", t.stride(0));
  return t.const_data_ptr();
}

void check_stride(const char* op, const char* name, const Stride& stride) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": ", name,
                  ": expected two positive numbers, got ", shape_string({stride.data(), stride.size()}));
}

void check_alone(const char* op, const char* name, const Optional& t, const char* with, const Optional& other) {
  STD_TORCH_CHECK(!t.has_value() || other.has_value(), op, ": ", name, ": expected ", with, " beside it, got none");
}

i64 strided(i64 size, i64 stride) { return divide_up(size, stride); }

Rows rows_of(i64 h, i64 w, const Stride& stride) {
  const i64 p = strided(h, stride[0]), q = strided(w, stride[1]);
  return {stride[0] == 1 && stride[1] == 1, p * q, q, h * w, w, stride[0], stride[1]};
}

Operand operand(const Tensor& t, const Stride& stride) {
  Operand r{};
  r.x = t.const_data_ptr();
  r.k = t.size(1);
  r.rows = rows_of(t.size(2), t.size(3), stride);
  return r;
}

void set_mask(Operand& to, const char* op, const Optional& mask, const Tensor& of) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(to.rows.dense, op, ": mask: expected stride [1, 1] with a mask, got ",
                  shape_string({std::array<i64, 2>{to.rows.sh, to.rows.sw}.data(), 2}));
  to.mask_bytes = divide_up(of.numel(), 8);
  to.mask = mask_of(op, "mask", *mask, to.mask_bytes);
}

void set_centre(Operand& to, const Activations& like, const char* name, const Optional& centre) {
  if (!centre.has_value()) return;
  STD_TORCH_CHECK(like.element_size > 2, like.op, ": ", name, ": expected float32 or float64 activations, got ",
                  torch::headeronly::toString(like.scalar_type));
  to.centre = vector_of(like, name, *centre, to.k);
}

// --- pointwise ---

// A product: its operand and its weight [n, k].
void add_product(
    ProductArgs& args, const Activations& like, const Operand& in, const char* name, const Tensor& weight, i64 n) {
  check_type(like.op, name, weight, like.scalar_type);
  const std::array<i64, 2> expected = {n, in.k};
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == n && weight.size(1) == in.k, like.op, ": ", name,
                  ": expected shape ", shape_string({expected.data(), 2}), ", got ", shape_string(weight.sizes()));
  args.in[args.count] = in;
  args.weight[args.count] = weight.const_data_ptr();
  args.stride_n[args.count] = weight.stride(0);
  args.stride_k[args.count] = weight.stride(1);
  ++args.count;
}

// A vector padded to whole strips, or full of `otherwise`.
template <class A>
const void* padded(const void* from, i64 n, A otherwise, std::vector<std::unique_ptr<char[]>>& memory) {
  const i64 length = round_up(n, kStrip);
  memory.emplace_back(new char[length * sizeof(A)]);
  A* to = reinterpret_cast<A*>(memory.back().get());
  std::fill_n(to, length, otherwise);
  if (from != nullptr) std::copy_n(static_cast<const A*>(from), n, to);
  return to;
}

void run_products(const Activations& like, ProductArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  std::vector<std::unique_ptr<char[]>> vectors;
  const auto pad = [&](const void* from, double otherwise) {
    return like.dtype == kF64 ? padded<double>(from, args.n, otherwise, vectors)
                              : padded<float>(from, args.n, static_cast<float>(otherwise), vectors);
  };
  args.separate = args.count == 2 && (args.scale[0] != nullptr || args.scale[1] != nullptr);
  args.scale[0] = pad(args.scale[0], 1.0);
  args.scale[1] = pad(args.scale[1], 1.0);
  args.shift = pad(args.shift, 0.0);

  const Products& kernel = products(like.dtype);
  i64 k = 0, bytes[2] = {0, 0};
  for (int i = 0; i < args.count; ++i) {
    k += args.in[i].k;
    bytes[i] = round_up(kernel.panel_bytes(args.n, args.in[i].k), 64);
  }
  const Memory panels(bytes[0] + bytes[1]);
  args.panels[0] = panels.p;
  args.panels[1] = static_cast<char*>(panels.p) + bytes[0];
  const i64 per_strip = std::max<i64>(1, kStrip * k);
  torch::stable::parallel_for(0, divide_up(args.n, kStrip), std::max<i64>(1, kGrainProducts / 8 / per_strip),
                              [&](i64 b, i64 e) { kernel.pack_weight(args, b, e, nullptr); });

  const i64 fit = kTileBytes / std::max<i64>(1, k * like.element_size);
  args.tile_rows = round_up(std::clamp(fit, kLeastRows, kMostRows), kRowUnit);
  args.fetch = args.tile_rows * k * like.element_size <= kTileBytes;
  args.fetch_panels = bytes[0] + bytes[1] > kTileBytes;
  const i64 per_unit = std::max<i64>(1, kRowUnit * k * args.n);
  torch::stable::parallel_for(0, divide_up(args.m, kRowUnit), std::max<i64>(1, kGrainProducts / per_unit),
                              [&](i64 b, i64 e) {
                                const Memory scratch(kernel.pointwise_scratch(args));
                                kernel.pointwise(args, b, e, scratch.p);
                              });
}

std::tuple<Tensor, Tensor> pointwise(
    const Tensor& x, const Optional& mask, const Tensor& weight, Stride stride, const Optional& scale,
    const Optional& x2, const Optional& weight2, Stride stride2, const Optional& scale2, const Optional& shift,
    const Optional& residual, const Optional& residual_mask, bool relu, bool save_mask,
    const Optional& centre, const Optional& centre2) {
  const char* op = "pointwise";
  const Activations t = first_of(op, "x", x);
  check_stride(op, "stride", stride);
  check_stride(op, "stride2", stride2);
  check_alone(op, "x2", x2, "weight2", weight2);
  check_alone(op, "weight2", weight2, "x2", x2);
  check_alone(op, "scale2", scale2, "x2", x2);
  check_alone(op, "centre2", centre2, "x2", x2);
  check_alone(op, "residual_mask", residual_mask, "residual", residual);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight: expected [n_out, n_in], got ", weight.dim(), " dimensions");

  ProductArgs args{};
  args.n = weight.size(0);
  const Shape shape = {t.g.n, args.n, strided(t.g.h, stride[0]), strided(t.g.w, stride[1])};
  args.m = shape[0] * shape[2] * shape[3];
  Operand in = operand(x, stride);
  set_mask(in, op, mask, x);
  set_centre(in, t, "centre", centre);
  add_product(args, t, in, "weight", weight, args.n);
  if (x2.has_value()) {
    activation(t, "x2", *x2, {shape[0], -1, -1, -1});
    const Shape size2 = {shape[0], args.n, strided(x2->size(2), stride2[0]), strided(x2->size(3), stride2[1])};
    STD_TORCH_CHECK(size2 == shape, op, ": x2: expected products of shape ", shape_string({shape.data(), 4}),
                    " with stride2, got ", shape_string({size2.data(), 4}));
    Operand in2 = operand(*x2, stride2);
    set_centre(in2, t, "centre2", centre2);
    add_product(args, t, in2, "weight2", *weight2, args.n);
  }
  if (scale.has_value()) args.scale[0] = vector_of(t, "scale", *scale, args.n);
  if (scale2.has_value()) args.scale[1] = vector_of(t, "scale2", *scale2, args.n);
  if (shift.has_value()) args.shift = vector_of(t, "shift", *shift, args.n);
  args.out_mask_bytes = divide_up(args.m * args.n, 8);
  if (residual.has_value()) args.residual = activation(t, "residual", *residual, shape);
  if (residual_mask.has_value()) args.residual_mask = mask_of(op, "residual_mask", *residual_mask, args.out_mask_bytes);
  args.relu = relu;
  args.out_rows.dense = true;
  Tensor out = torch::stable::empty({shape.data(), 4}, t.scalar_type, std::nullopt, std::nullopt, std::nullopt,
                                    torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor bits = t.new_bytes(save_mask ? args.out_mask_bytes : 0);
  args.out = out.mutable_data_ptr();
  args.fresh = args.m * args.n * t.element_size > kFreshBytes;
  if (save_mask) args.mask_out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  run_products(t, args);
  return {out, bits};
}

void pointwise_add_(
    const Tensor& acc, const Tensor& x, const Optional& mask, const Tensor& weight, const Optional& x2,
    const Optional& weight2, Stride stride, const Optional& shift, const Optional& centre, const Optional& centre2) {
  const char* op = "pointwise_add_";
  const Activations t = first_of(op, "acc", acc);
  check_stride(op, "stride", stride);
  check_alone(op, "x2", x2, "weight2", weight2);
  check_alone(op, "weight2", weight2, "x2", x2);
  check_alone(op, "centre2", centre2, "x2", x2);
  ProductArgs args{};
  args.n = t.g.c;
  const i64 p = strided(t.g.h, stride[0]), q = strided(t.g.w, stride[1]);
  args.m = t.g.n * p * q;
  activation(t, "x", x, {t.g.n, -1, p, q});
  Operand in = operand(x, {1, 1});
  set_mask(in, op, mask, x);
  set_centre(in, t, "centre", centre);
  add_product(args, t, in, "weight", weight, args.n);
  if (x2.has_value()) {
    activation(t, "x2", *x2, {t.g.n, -1, t.g.h, t.g.w});
    Operand in2 = operand(*x2, stride);
    set_centre(in2, t, "centre2", centre2);
    add_product(args, t, in2, "weight2", *weight2, args.n);
  }
  if (shift.has_value()) args.shift = vector_of(t, "shift", *shift, args.n);
  args.out_rows = rows_of(t.g.h, t.g.w, stride);
  args.out = acc.mutable_data_ptr();
  args.residual = args.out;
  run_products(t, args);
}

// --- cross products ---

// n cut into equal parts of at most `most`, each but the last a multiple of `unit`.
std::vector<std::pair<i64, i64>> parts_of(i64 n, i64 most, i64 unit) {
  const i64 size = std::max(unit, round_up(divide_up(n, std::max<i64>(1, divide_up(n, most))), unit));
  std::vector<std::pair<i64, i64>> parts;
  for (i64 at = 0; at < n; at += size) parts.emplace_back(at, std::min(size, n - at));
  return parts;
}

// Cuts the work into tasks, which depend on the shapes only, and runs them. Partial results: [splits][a.k][b.k] in
// `memory`, or where there is one split in `whole`.
struct CrossRun {
  // At most `area` sums to a tile, `most_b` to its side; where b is narrow, a is read in long rows instead.
  CrossRun(CrossArgs& args, i64 area, i64 most_b, i64 most_rows = kChunkRows) {
    const i64 most_a = round_up(area / std::min(round_up(args.b.k, kStrip), most_b), 24);
    for (const auto& [a, a_count] : parts_of(args.a.k, most_a, 24)) {
      bool sums = true;
      for (const auto& [b, b_count] : parts_of(args.b.k, most_b, kStrip)) {
        if (args.upper && b + b_count <= a) continue;
        tiles.push_back({a, a_count, b, b_count, sums});
        sums = false;
        args.max_a = std::max(args.max_a, a_count);
        args.max_b = std::max(args.max_b, b_count);
      }
    }
    args.tiles = tiles.data();
    args.tile_count = static_cast<i64>(tiles.size());
    args.chunks = divide_up(args.m, most_rows);
    args.chunk_rows = round_up(divide_up(args.m, std::max<i64>(1, args.chunks)), 2);
    args.splits = std::clamp<i64>(divide_up(kTasks, std::max<i64>(1, args.tile_count)), 1,
                                  std::max<i64>(1, args.chunks / kLeastChunks));
    sums.reset(new double[std::max<i64>(1, args.splits * args.a.k)]);
    args.sums = sums.get();
  }

  // `size`: bytes of a merged sum.
  void run(CrossArgs& args, CrossKernel kernel, i64 scratch, void* whole, i64 size) {
    if (args.splits > 1) memory = std::make_unique<Memory>(args.splits * args.a.k * args.b.k * size);
    args.partial = args.splits > 1 ? memory->p : whole;
    const i64 per_task = std::max<i64>(1, args.max_a * args.max_b * (args.m / args.splits));
    torch::stable::parallel_for(0, args.splits * args.tile_count, std::max<i64>(1, kGrainProducts / per_task),
                                [&](i64 b, i64 e) {
                                  const Memory own(scratch);
                                  kernel(args, b, e, own.p);
                                });
  }

  std::vector<CrossTile> tiles;
  std::unique_ptr<double[]> sums;  // [splits][a.k]
  std::unique_ptr<Memory> memory;
};

// Σ over splits of column j's sums.
double total(const CrossArgs& args, i64 j) {
  double sum = 0;
  for (i64 s = 0; s < args.splits; ++s) sum += args.sums[s * args.a.k + j];
  return sum;
}

template <class R>
void merge_wgrad(const CrossArgs& args, R* to, const double* sums, const float* centre) {
  if (args.splits == 1 && centre == nullptr) return;
  const R* partial = static_cast<const R*>(args.partial);
  const i64 width = args.b.k, size = args.a.k * width;
  torch::stable::parallel_for(0, args.a.k, std::max<i64>(1, 16384 / (width * args.splits)), [&](i64 b, i64 e) {
    for (i64 i = b * width; i < e * width; ++i) {
      R sum = partial[i];
      for (i64 s = 1; s < args.splits; ++s) sum += partial[s * size + i];
      to[i] = sum;
    }
    if (centre != nullptr)
      for (i64 k = b; k < e; ++k)
        for (i64 c = 0; c < width; ++c) to[k * width + c] = static_cast<R>(to[k * width + c] - sums[k] * centre[c]);
  });
}

std::tuple<Tensor, Tensor> pointwise_wgrad(
    const Tensor& dy, const Optional& mask, const Tensor& x, const Optional& centre, Stride stride) {
  const char* op = "pointwise_wgrad";
  const Activations t = first_of(op, "x", x);
  check_stride(op, "stride", stride);
  const i64 p = strided(t.g.h, stride[0]), q = strided(t.g.w, stride[1]);
  activation(t, "dy", dy, {t.g.n, -1, p, q});
  CrossArgs args{};
  args.m = t.g.n * p * q;
  args.a = operand(dy, {1, 1});
  set_mask(args.a, op, mask, dy);
  args.b = operand(x, stride);
  const bool narrow = t.element_size == 2;
  const void* middle = centre.has_value() ? vector_of(t, "centre", *centre, args.b.k) : nullptr;
  if (!narrow) args.b.centre = middle;

  const std::array<i64, 2> shape = {args.a.k, args.b.k};
  Tensor dweight = torch::stable::new_empty(x, {shape.data(), 2}, narrow ? ScalarType::Float : ScalarType::Double);
  Tensor sum_dy = torch::stable::new_empty(x, {shape.data(), 1}, t.acc_type);
  void* const to = dweight.mutable_data_ptr();
  if (args.m == 0 || dweight.numel() == 0) {
    // Without columns of x there are still sums of dy, which no tile takes.
    STD_TORCH_CHECK(args.m == 0 || args.a.k == 0 || args.b.k > 0, op, ": x: expected channels, got none");
    torch::stable::zero_(dweight);
    torch::stable::zero_(sum_dy);
    return {dweight, sum_dy};
  }
  const Products& kernel = products(t.dtype);
  // What a float32 sum loses in a chunk decides the norm's gradient where channels are correlated: short chunks. bfloat16
  // has fewer digits to lose.
  const bool few = t.dtype == kF32 || t.dtype == kF16;
  CrossRun run(args, narrow ? 256 * 256 : 128 * 256, 256, few ? kFewRows : kChunkRows);
  run.run(args, kernel.wgrad, kernel.wgrad_scratch(args), to, narrow ? 4 : 8);
  std::vector<double> sums(args.a.k);
  for (i64 k = 0; k < args.a.k; ++k) {
    sums[k] = total(args, k);
    if (t.dtype == kF64) static_cast<double*>(sum_dy.mutable_data_ptr())[k] = sums[k];
    else static_cast<float*>(sum_dy.mutable_data_ptr())[k] = static_cast<float>(sums[k]);
  }
  if (narrow) merge_wgrad(args, static_cast<float*>(to), sums.data(), static_cast<const float*>(middle));
  else merge_wgrad(args, static_cast<double*>(to), sums.data(), nullptr);
  return {dweight, sum_dy};
}

// The mean of the first rows, about which sums lose no digits; 0 where it is not finite.
template <class T>
std::vector<double> first_mean(const CrossArgs& args) {
  const i64 c = args.a.k, rows = std::min(args.m, args.chunk_rows);
  const Rows& r = args.a.rows;
  std::vector<double> mean(c, 0.0);
  for (i64 m = 0; m < rows; ++m) {
    const i64 place = m % r.pq;
    const i64 pixel = r.dense ? m : m / r.pq * r.hw + place / r.q * r.sh * r.w + place % r.q * r.sw;
    const T* x = static_cast<const T*>(args.a.x) + pixel * c;
    for (i64 j = 0; j < c; ++j) mean[j] += static_cast<double>(x[j]);
  }
  for (double& value : mean) value = std::isfinite(value) ? value / static_cast<double>(rows) : 0.0;
  return mean;
}

std::tuple<Tensor, Tensor> gram(const Tensor& x, Stride stride) {
  const char* op = "gram";
  const Activations t = first_of(op, "x", x);
  check_stride(op, "stride", stride);
  CrossArgs args{};
  args.m = t.g.n * strided(t.g.h, stride[0]) * strided(t.g.w, stride[1]);
  args.a = args.b = operand(x, stride);
  args.upper = true;
  const i64 c = args.a.k;
  const std::array<i64, 2> shape = {c, c};
  Tensor mean = torch::stable::new_empty(x, {shape.data(), 1}, ScalarType::Double);
  Tensor cov = torch::stable::new_empty(x, {shape.data(), 2}, ScalarType::Double);
  if (args.m == 0 || c == 0) {
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(cov, std::numeric_limits<double>::quiet_NaN());
    return {mean, cov};
  }
  double* const middle = static_cast<double*>(mean.mutable_data_ptr());
  double* const to = static_cast<double*>(cov.mutable_data_ptr());
  CrossRun run(args, t.element_size == 2 ? 128 * 256 : 128 * 128, t.element_size == 2 ? 256 : 128);
  std::vector<double> centre;
  if (t.element_size > 2) {
    centre = t.dtype == kF64 ? first_mean<double>(args) : first_mean<float>(args);
    args.a.centre = args.b.centre = centre.data();
  }
  const Products& kernel = products(t.dtype);
  run.run(args, kernel.gram, kernel.gram_scratch(args), to, 8);

  const double count = static_cast<double>(args.m);
  std::vector<double> offset(c);
  for (i64 j = 0; j < c; ++j) {
    offset[j] = total(args, j) / count;
    middle[j] = centre.empty() ? offset[j] : centre[j] + offset[j];
  }
  const double* const partial = static_cast<const double*>(args.partial);
  const i64 grain = std::max<i64>(1, 16384 / (c * args.splits));
  torch::stable::parallel_for(0, c, grain, [&](i64 b, i64 e) {
    for (i64 i = b; i < e; ++i)
      for (i64 j = i; j < c; ++j) {
        double sum = partial[i * c + j];
        for (i64 s = 1; s < args.splits; ++s) sum += partial[(s * c + i) * c + j];
        const double value = sum / count - offset[i] * offset[j];
        to[i * c + j] = i == j && value < 0.0 ? 0.0 : value;
      }
  });
  torch::stable::parallel_for(0, c, grain, [&](i64 b, i64 e) {
    for (i64 i = b; i < e; ++i)
      for (i64 j = 0; j < i; ++j) to[i * c + j] = to[j * c + i];
  });
  return {mean, cov};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise));
  m.impl("pointwise_add_", TORCH_BOX(&pointwise_add_));
  m.impl("pointwise_wgrad", TORCH_BOX(&pointwise_wgrad));
  m.impl("gram", TORCH_BOX(&gram));
}

}  // namespace resnet_fused
