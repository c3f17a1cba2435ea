// CUDA operators that sum over the rows of each channel: batch statistics, and the sums of batch norm's backward. Schemas
// and meaning: ../ops.cpp.
#include <cmath>
#include <tuple>

#include "channel_sums.cuh"
#include "operands.h"

namespace resnet_fused::cuda {
namespace {

// Partial sums [splits, values, C] on their way to the channels.
struct Partials {
  Tensor memory;
  int splits;
};

template <class T, class Pass>
Partials sum_rows(const Activations& t, const Stream& stream, const Pass& pass, int tensors, const Elements& e) {
  constexpr int kValues = Pass::Sums::kValues;
  const i64 inner = t.h * t.w;
  const LaunchPlan plan = plan_channel_sums(t.n, inner, t.c, t.channels_last, static_cast<int>(t.element_size),
                                            static_cast<int>(t.acc_size), tensors, kValues);
  const i64 size = plan.blocks_y * kValues * t.c;
  const Partials partials{torch::stable::new_empty(t.x, {&size, 1}, t.acc_type), static_cast<int>(plan.blocks_y)};
  const auto kernel = t.channels_last ? sums_of_columns_kernel<T, Pass> : sums_of_planes_kernel<T, Pass>;
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
  stream.launch(kernel, grid, plan.threads, pass, address(partials.memory), t.channels_last ? t.rows() : t.n, plan.each, e);
  return partials;
}

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  const Activations t("bn_stats", "x", x);
  Tensor mean = t.new_channels(), var = t.new_channels();
  if (t.numel == 0) {
    torch::stable::fill_(mean, NAN);
    torch::stable::fill_(var, NAN);
    return {mean, var};
  }
  const Stream stream(t);
  typed(t.scalar_type, [&]<class T>() {
    const StatisticsPass<T> pass{static_cast<const T*>(x.const_data_ptr())};
    const Partials partials = sum_rows<T>(t, stream, pass, 1, elements_of(t, {pass.x}));
    stream.launch(finalise_moments_kernel<Accumulate<T>>, blocks_of_channels(t.c), kThreads, address(partials.memory),
                  partials.splits, t.c, address(mean), address(var), Running<Accumulate<T>>{});
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_reduce(const Tensor& grad, const Tensor& x, const Optional& mask,
                                                          const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                                          bool relu, bool want_activation) {
  const Activations t("bn_act_backward_reduce", "x", x);
  const BackwardArguments from(t, grad, mask, mean, scale, shift, relu);
  const i64 none = 0;
  Tensor activation = want_activation ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {&none, 1});
  Tensor sum = t.new_channels(), centred = t.new_channels();
  if (t.numel == 0) {
    torch::stable::zero_(sum);
    torch::stable::zero_(centred);
    return {sum, centred, activation};
  }
  const Stream stream(t);
  void* const out = want_activation ? address(activation) : nullptr;
  const Elements e = elements_of(t, {from.grad, from.x, out});
  gated(from, [&]<class T, Gate kGate>() {
    const auto run = [&]<bool kRelu>() {
      const GradientPass<T, kGate, kRelu> pass{static_cast<const T*>(from.grad), static_cast<const T*>(from.x),
                                               from.mask, from.norm<T>(), static_cast<T*>(out)};
      return sum_rows<T>(t, stream, pass, want_activation ? 3 : 2, e);
    };
    const Partials partials = relu ? run.template operator()<true>() : run.template operator()<false>();
    stream.launch(finalise_sums_kernel<Accumulate<T>>, blocks_of_channels(t.c), kThreads, address(partials.memory),
                  partials.splits, t.c, address(sum), address(centred));
  });
  return {sum, centred, activation};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce));
}

}  // namespace resnet_fused::cuda
