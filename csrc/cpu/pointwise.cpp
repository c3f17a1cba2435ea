// CPU operators: 1x1 convolutions with everything that is fused into them. Schemas and meaning: ../ops.cpp.
#include "operands.h"

namespace resnet_fused {
namespace {

constexpr i64 kTileBytes = 256 * 1024;          // a row tile, or a weight, stays in the second-level cache
constexpr i64 kMostRows = 96, kLeastRows = 48;  // of a row tile
constexpr i64 kFreshBytes = 32 << 20;           // larger blocks come anew from the kernel, with glibc's malloc

// A product: its operand and its weight [n, k].
void add_product(
    ProductArgs& args, const TiledActivations& like, const Operand& in, const char* name, const Tensor& weight, i64 n) {
  like.check_type(name, weight, like.scalar_type);
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

void run_products(const TiledActivations& like, ProductArgs& args) {
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
  i64 k = 0, bytes = 0, before[kTerms];
  for (int i = 0; i < args.count; ++i) {
    k += args.in[i].k;
    before[i] = bytes;
    bytes += round_up(kernel.panel_bytes(args.n, args.in[i].k), 64);
  }
  const Memory panels(bytes);
  for (int i = 0; i < args.count; ++i) args.panels[i] = static_cast<char*>(panels.p) + before[i];
  const i64 per_strip = std::max<i64>(1, kStrip * k);
  torch::stable::parallel_for(0, divide_up(args.n, kStrip), std::max<i64>(1, kGrainProducts / 8 / per_strip),
                              [&](i64 b, i64 e) { kernel.pack_weight(args, b, e, nullptr); });

  const i64 fit = kTileBytes / std::max<i64>(1, k * like.element_size);
  args.tile_rows = round_up(std::clamp(fit, kLeastRows, kMostRows), kRowUnit);
  args.fetch = args.tile_rows * k * like.element_size <= kTileBytes;
  args.fetch_panels = bytes > kTileBytes;
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
    const Optional& centre, const Optional& centre2, const Optional& weight2_low) {
  const char* op = "pointwise";
  const TiledActivations t = first_of(op, "x", x);
  check_stride(op, "stride", stride);
  check_stride(op, "stride2", stride2);
  check_alone(op, "x2", x2, "weight2", weight2);
  check_alone(op, "weight2", weight2, "x2", x2);
  check_alone(op, "scale2", scale2, "x2", x2);
  check_alone(op, "centre2", centre2, "x2", x2);
  check_alone(op, "weight2_low", weight2_low, "weight2", weight2);
  STD_TORCH_CHECK(!weight2_low.has_value() || !(scale.has_value() || scale2.has_value()), op,
                  ": weight2_low: expected no scale beside it");
  check_alone(op, "residual_mask", residual_mask, "residual", residual);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight: expected [n_out, n_in], got ", weight.dim(), " dimensions");

  ProductArgs args{};
  args.n = weight.size(0);
  const Shape shape = {t.g.n, args.n, strided(t.g.h, stride[0]), strided(t.g.w, stride[1])};
  args.m = shape[0] * shape[2] * shape[3];
  Operand in = operand(x, stride);
  set_mask(in, t, mask, x);
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
    if (weight2_low.has_value()) add_product(args, t, in2, "weight2_low", *weight2_low, args.n);
  }
  if (scale.has_value()) args.scale[0] = t.vector("scale", *scale, args.n);
  if (scale2.has_value()) args.scale[1] = t.vector("scale2", *scale2, args.n);
  if (shift.has_value()) args.shift = t.vector("shift", *shift, args.n);
  args.out_mask_bytes = divide_up(args.m * args.n, 8);
  if (residual.has_value()) args.residual = activation(t, "residual", *residual, shape);
  if (residual_mask.has_value()) args.residual_mask = t.mask("residual_mask", *residual_mask, args.m * args.n);
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
    const Optional& weight2, Stride stride, const Optional& shift, const Optional& centre, const Optional& centre2,
    const Optional& weight2_low) {
  const char* op = "pointwise_add_";
  const TiledActivations t = first_of(op, "acc", acc);
  check_stride(op, "stride", stride);
  check_alone(op, "x2", x2, "weight2", weight2);
  check_alone(op, "weight2", weight2, "x2", x2);
  check_alone(op, "centre2", centre2, "x2", x2);
  check_alone(op, "weight2_low", weight2_low, "weight2", weight2);
  ProductArgs args{};
  args.n = t.g.c;
  const i64 p = strided(t.g.h, stride[0]), q = strided(t.g.w, stride[1]);
  args.m = t.g.n * p * q;
  activation(t, "x", x, {t.g.n, -1, p, q});
  Operand in = operand(x, {1, 1});
  set_mask(in, t, mask, x);
  set_centre(in, t, "centre", centre);
  add_product(args, t, in, "weight", weight, args.n);
  if (x2.has_value()) {
    activation(t, "x2", *x2, {t.g.n, -1, t.g.h, t.g.w});
    Operand in2 = operand(*x2, stride);
    set_centre(in2, t, "centre2", centre2);
    add_product(args, t, in2, "weight2", *weight2, args.n);
    if (weight2_low.has_value()) add_product(args, t, in2, "weight2_low", *weight2_low, args.n);
  }
  if (shift.has_value()) args.shift = t.vector("shift", *shift, args.n);
  args.out_rows = rows_of(t.g.h, t.g.w, stride);
  args.out = acc.mutable_data_ptr();
  args.residual = args.out;
  run_products(t, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise));
  m.impl("pointwise_add_", TORCH_BOX(&pointwise_add_));
}

}  // namespace resnet_fused
