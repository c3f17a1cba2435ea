// CPU operators: the stem's max pooling behind batch norm and ReLU. Schemas and meaning: ../ops.cpp.
#include "driver.h"

namespace resnet_fused {
namespace {

i64 pooled_size(i64 n) { return (n - 1) / 2 + 1; }

i64 line(const Geometry& g) { return g.channels_last ? g.w * g.c : g.w; }

// Lines of dz: the row itself, and for contiguous tensors its even and odd columns.
i64 backward_scratch(const Geometry& g) { return line(g) + kBlock + 2 * (pooled_size(g.w) + 2 * kBlock); }

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  TiledActivations t("bn_relu_maxpool", "x", x);
  const Geometry& g = t.g;
  Tensor out = t.new_pooled(t.scalar_type), index = t.new_pooled(ScalarType::Byte);
  Args args{};
  args.g = g;
  args.x = x.const_data_ptr();
  args.p.scale = t.channels("scale", scale);
  args.p.shift = t.channels("shift", shift);
  args.out = out.mutable_data_ptr();
  args.index_out = static_cast<uint8_t*>(index.mutable_data_ptr());
  const i64 units = g.channels_last ? g.n * pooled_size(g.h) : g.n * g.c;
  const i64 scratch = g.channels_last ? 0 : g.w + kBlock + 6 * (pooled_size(g.w) + 2 * kBlock);
  run_units(t, kernels(t.dtype).pool, args, units, g.channels_last ? 2 * line(g) : g.hw, scratch);
  return {out, index};
}

Args backward_args(TiledActivations& t, const Tensor& grad, const Tensor& index, const Tensor& mean) {
  Args args{};
  args.g = t.g;
  args.x = t.x.const_data_ptr();
  args.grad = t.pooled("grad", grad, t.scalar_type);
  args.index = static_cast<const uint8_t*>(t.pooled("index", index, ScalarType::Byte));
  args.p.mean = t.channels("mean", mean);
  return args;
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce(
    const Tensor& grad, const Tensor& index, const Tensor& x, const Tensor& mean) {
  TiledActivations t("bn_relu_maxpool_backward_reduce", "x", x);
  Args args = backward_args(t, grad, index, mean);
  Geometry& g = args.g;
  i64 elements = g.hw;
  if (t.numel > 0) {
    if (g.channels_last) {
      g.tile_rows = std::max<i64>(1, 32768 / line(g));
      g.parts = g.tiles = (g.n * g.h + g.tile_rows - 1) / g.tile_rows;
      elements = g.tile_rows * line(g);
    } else {
      g.parts = g.n;
      g.tiles = g.n * g.c;
    }
  }
  const Partials partials(t, 2, args);
  run_units(t, kernels(t.dtype).pool_backward_reduce, args, g.tiles, elements,
            2 * (g.width + kBlock) + backward_scratch(g));
  return partials.sums(t);
}

Tensor bn_relu_maxpool_backward(
    const Tensor& grad, const Tensor& index, const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b,
    const Tensor& c) {
  TiledActivations t("bn_relu_maxpool_backward", "x", x);
  Args args = backward_args(t, grad, index, mean);
  args.p.a = t.channels("a", a);
  args.p.b = t.channels("b", b);
  args.p.c = t.channels("c", c);
  Tensor out = torch::stable::empty_like(x);
  args.out = out.mutable_data_ptr();
  const Geometry& g = t.g;
  run_units(t, kernels(t.dtype).pool_backward, args, g.channels_last ? g.n * g.h : g.n * g.c,
            g.channels_last ? line(g) : g.hw, backward_scratch(g));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_relu_maxpool", TORCH_BOX(&bn_relu_maxpool));
  m.impl("bn_relu_maxpool_backward_reduce", TORCH_BOX(&bn_relu_maxpool_backward_reduce));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
}

}  // namespace resnet_fused
