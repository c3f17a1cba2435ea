// CUDA operators of fused convolutions. Schemas and meaning: ../ops.cpp.
#include <tuple>

#include "conv/implicit_gemm.cuh"
#include "launch.h"

namespace resnet_fused::cuda {
namespace {

constexpr int kSplitsAtOnce = 128;  // that the last launch of statistics joins: four of each thread

// A convolution's tensors, checked.
struct Convolution {
  Activations t;
  const void* filter;
  ConvPrologue prologue;
  ConvShape shape;
  int size;  // of the filter
  Tensor out;

  Convolution(const char* op, const Tensor& x, const Optional& x_scale, const Optional& x_shift, bool x_relu,
              const Tensor& weight, i64 stride)
      : t(op, "x", x), filter(weight.const_data_ptr()), prologue{nullptr, nullptr, x_relu} {
    STD_TORCH_CHECK(is_half(t.scalar_type), op, ": x: expected bfloat16 or float16, got ",
                    torch::headeronly::toString(t.scalar_type));
    t.check_type("weight", weight, t.scalar_type);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == t.c && weight.size(2) == weight.size(3) &&
                        (weight.size(2) == 1 || weight.size(2) == 3),
                    op, ": weight: expected shape [K, ", t.c, ", R, R] with R 1 or 3, got ", shape_string(weight.sizes()));
    STD_TORCH_CHECK(t.channels_last && dense(weight, true), op, ": x, weight: expected tensors dense in channels_last");
    STD_TORCH_CHECK(t.c > 0 && t.c % kOctet == 0 && weight.size(0) % kOctet == 0, op,
                    ": x, weight: expected multiples of 8 channels, got C = ", t.c, " and K = ", weight.size(0));
    STD_TORCH_CHECK(stride >= 1 && stride <= INT32_MAX, op, ": stride: expected a positive number, got ", stride);
    STD_TORCH_CHECK(x_scale.has_value() == x_shift.has_value(), op, ": x_scale, x_shift: expected both or neither");
    if (x_scale.has_value()) {
      prologue.scale = static_cast<const float*>(t.vector("x_scale", *x_scale));
      prologue.shift = static_cast<const float*>(t.vector("x_shift", *x_shift));
    }
    size = static_cast<int>(weight.size(2));
    shape = {narrow(op, "N", t.n), narrow(op, "H", t.h),           narrow(op, "W", t.w),
             narrow(op, "C", t.c), narrow(op, "K", weight.size(0)), static_cast<int>(stride)};
    const i64 sizes[] = {t.n, shape.k, t.h == 0 ? 0 : shape.p(), t.w == 0 ? 0 : shape.q()};
    narrow(op, "N * P * Q", t.numel == 0 ? 0 : shape.rows() + ConvTile128x128::kM);
    out = torch::stable::empty({sizes, 4}, t.scalar_type, std::nullopt, x.device(), std::nullopt,
                               torch::headeronly::MemoryFormat::ChannelsLast);
    for (const void* p : {x.const_data_ptr(), filter, static_cast<const void*>(prologue.scale),
                          static_cast<const void*>(prologue.shift)}) {
      check_aligned(p);
    }
  }

  void check_aligned(const void* p) const {
    STD_TORCH_CHECK(is_aligned(p), t.op, ": expected tensors that begin at multiples of 16 bytes");
  }

  // body.operator()<T, R, pending, Tile>() of this convolution.
  template <class Body>
  void typed(const Body& body) const {
    if (t.scalar_type == ScalarType::BFloat16) return sized<BFloat16>(body);
    return sized<Half>(body);
  }

  ConvPlan plan() const { return plan_conv(t.numel, shape.rows(), shape.k, shape.c, size * size); }

 private:
  template <class T, class Body>
  void sized(const Body& body) const {
    if (size == 1) return pending<T, 1>(body);
    return pending<T, 3>(body);
  }

  template <class T, int R, class Body>
  void pending(const Body& body) const {
    if (prologue.scale != nullptr) return tiled<T, R, true>(body);
    return tiled<T, R, false>(body);
  }

  template <class T, int R, bool kPending, class Body>
  void tiled(const Body& body) const {
    switch (plan().tile) {
      case 0: return on<T, R, kPending, ConvTile128x128>(body);
      case 1: return on<T, R, kPending, ConvTile128x64>(body);
      default: return on<T, R, kPending, ConvTile64x64>(body);
    }
  }

  template <class T, int R, bool kPending, class Tile, class Body>
  void on(const Body& body) const {
    constexpr ConvTileSize kSize = kConvTiles[Tile::kM == 64 ? 2 : Tile::kN == 64 ? 1 : 0];
    static_assert(kSize.m == Tile::kM && kSize.n == Tile::kN && kSize.threads == Tile::kBlock);
    return body.template operator()<T, R, kPending, Tile>();
  }
};

template <class T, int R, bool kPending, class Tile>
void launch(const Stream& stream, const Convolution& conv, const ConvEpilogue<T>& epilogue) {
  stream.launch(conv_kernel<T, R, kPending, Tile>, static_cast<unsigned>(conv.plan().blocks), Tile::kBlock,
                conv.t.x.const_data_ptr(), conv.prologue, conv.filter, address(conv.out), epilogue, conv.shape);
}

std::tuple<Tensor, Tensor> conv_bn_act(const Tensor& x, const Optional& x_scale, const Optional& x_shift, bool x_relu,
                                       const Tensor& weight, i64 stride, const Optional& scale, const Optional& shift,
                                       const Optional& residual, bool relu, bool save_mask) {
  const Convolution conv("conv_bn_act", x, x_scale, x_shift, x_relu, weight, stride);
  const Activations out("conv_bn_act", "out", conv.out);
  const void* of_scale = scale.has_value() ? out.vector("scale", *scale) : nullptr;
  const void* of_shift = shift.has_value() ? out.vector("shift", *shift) : nullptr;
  const void* other = residual.has_value() ? out.like("residual", *residual) : nullptr;
  for (const void* p : {of_scale, of_shift, other}) conv.check_aligned(p);
  Tensor mask = out.new_mask(save_mask);
  if (out.numel == 0) return {conv.out, mask};
  const Stream stream(conv.t);
  conv.typed([&]<class T, int R, bool kPending, class Tile>() {
    const ConvEpilogue<T> epilogue{static_cast<const float*>(of_scale), static_cast<const float*>(of_shift),
                                   static_cast<const T*>(other), relu,
                                   mask_address(mask), nullptr};
    launch<T, R, kPending, Tile>(stream, conv, epilogue);
  });
  return {conv.out, mask};
}

std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const Optional& x_scale, const Optional& x_shift,
                                              bool x_relu, const Tensor& weight, i64 stride) {
  const Convolution conv("conv_stats", x, x_scale, x_shift, x_relu, weight, stride);
  const Activations out("conv_stats", "out", conv.out);
  STD_TORCH_CHECK(out.numel > 0, "conv_stats: x: expected a batch that is not empty");
  Tensor mean = out.new_channels(), var = out.new_channels();
  const Stream stream(conv.t);
  const auto new_partials = [&](i64 splits) {
    const i64 size = splits * 3 * out.c;
    return torch::stable::new_empty(x, {&size, 1}, out.acc_type);
  };
  conv.typed([&]<class T, int R, bool kPending, class Tile>() {
    int splits = static_cast<int>(tiles_of_rows<Tile>(conv.shape));
    Tensor partials = new_partials(splits);
    launch<T, R, kPending, Tile>(stream, conv,
                                 {nullptr, nullptr, nullptr, false, nullptr, static_cast<float*>(address(partials))});
    if (splits > kSplitsAtOnce) {
      const int groups = static_cast<int>(cut(splits, kSplitsAtOnce));
      const Tensor joined = new_partials(groups);
      stream.launch(join_moments_kernel<float>, dim3(blocks_of_join(out.c), groups), kThreads, address(partials),
                    splits, kSplitsAtOnce, out.c, address(joined));
      partials = joined, splits = groups;
    }
    stream.launch(finalise_moments_kernel<float>, blocks_of_join(out.c), kThreads, address(partials), splits, out.c,
                  address(mean), address(var));
  });
  return {conv.out, mean, var};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act));
  m.impl("conv_stats", TORCH_BOX(&conv_stats));
}

}  // namespace resnet_fused::cuda
