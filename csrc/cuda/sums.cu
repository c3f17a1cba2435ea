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
Partials sum_rows(const Activations& t, const Stream& stream, const Pass& pass, int tensors, const Elements& e,
                  bool vectors_aligned) {
  constexpr int kValues = Pass::Sums::kValues;
  const LaunchPlan plan = plan_channel_sums(t.n, t.h * t.w, t.c, t.channels_last, e.aligned && vectors_aligned,
                                            static_cast<int>(t.element_size), static_cast<int>(t.acc_size), tensors,
                                            kValues);
  const i64 size = plan.blocks_y * kValues * t.c;
  const Partials partials{torch::stable::new_empty(t.x, {&size, 1}, t.acc_type), static_cast<int>(plan.blocks_y)};
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
  const auto launch = [&]<bool kWhole>() {
    void* const to = address(partials.memory);
    if (t.channels_last) {
      stream.launch(sums_of_columns_kernel<T, Pass, kWhole>, grid, plan.threads, pass, to, t.rows(), plan.each,
                    plan.lanes, e);
    } else {
      stream.launch(sums_of_planes_kernel<T, Pass, kWhole>, grid, plan.threads, pass, to, t.n, plan.each, e);
    }
  };
  plan.whole ? launch.template operator()<true>() : launch.template operator()<false>();
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
    const Partials partials = sum_rows<T>(t, stream, pass, 1, elements_of(t, {pass.x}), true);
    stream.launch(finalise_moments_kernel<Accumulate<T>>, blocks_of_join(t.c), kThreads, address(partials.memory),
                  partials.splits, t.c, address(mean), address(var));
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
    const GradientPass<T, kGate> pass{static_cast<const T*>(from.grad), static_cast<const T*>(from.x), from.mask,
                                      from.norm<T>(), static_cast<T*>(out), relu};
    const bool vectors_aligned = are_aligned({from.mean, from.scale, from.shift});
    const Partials partials = sum_rows<T>(t, stream, pass, want_activation ? 3 : 2, e, vectors_aligned);
    stream.launch(finalise_sums_kernel<Accumulate<T>>, blocks_of_join(t.c), kThreads, address(partials.memory),
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
