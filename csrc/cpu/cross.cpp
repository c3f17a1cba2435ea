// CPU operators: sums over rows of a product's two sides: weight gradients and covariances. Schemas and meaning: ../ops.cpp.
#include <cmath>
#include <limits>

#include "operands.h"

namespace resnet_fused {
namespace {

constexpr i64 kTasks = 16;       // weight gradients of few tiles are split by rows into so many tasks
constexpr i64 kLeastChunks = 8;  // of a split
constexpr i64 kFewRows = 32;     // of a chunk, where sums in the accumulation type must be good

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
  const TiledActivations t = first_of(op, "x", x);
  check_stride(op, "stride", stride);
  const i64 p = strided(t.g.h, stride[0]), q = strided(t.g.w, stride[1]);
  activation(t, "dy", dy, {t.g.n, -1, p, q});
  CrossArgs args{};
  args.m = t.g.n * p * q;
  args.a = operand(dy, {1, 1});
  set_mask(args.a, t, mask, dy);
  args.b = operand(x, stride);
  const bool narrow = t.element_size == 2;
  const void* middle = centre.has_value() ? t.vector("centre", *centre, args.b.k) : nullptr;
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
  const TiledActivations t = first_of(op, "x", x);
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
  m.impl("pointwise_wgrad", TORCH_BOX(&pointwise_wgrad));
  m.impl("gram", TORCH_BOX(&gram));
}

}  // namespace resnet_fused
