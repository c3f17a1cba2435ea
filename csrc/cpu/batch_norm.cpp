// CPU operators: batch norm with its activation, and the residual additions. Schemas and meaning: ../ops.cpp.
#include "driver.h"

namespace resnet_fused {
namespace {

Args args_for(const TiledActivations& t) {
  Args args{};
  args.g = t.g;
  args.x = t.x.const_data_ptr();
  args.mask_bytes = t.mask_bytes();
  return args;
}

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  const TiledActivations t("bn_stats", "x", x);
  Args args = args_for(t);
  const Partials partials(t, 3, args);
  run_units(t, kernels(t.dtype).bn_stats, args, t.g.tiles, t.g.tile_rows * (t.g.channels_last ? t.g.c : 1),
            3 * (t.g.width + kBlock));
  return partials.moments(t);
}

void bn_act_into(
    TiledActivations& t, const Tensor& scale, const Tensor& shift, const Optional& residual, bool relu, const Tensor& out,
    uint8_t* mask) {
  Args args = args_for(t);
  args.p.scale = t.channels("scale", scale);
  args.p.shift = t.channels("shift", shift);
  if (residual.has_value()) args.other = t.like("residual", *residual);
  args.relu = relu;
  args.out = out.mutable_data_ptr();
  args.mask_out = mask;
  run_elements(t, kernels(t.dtype).bn_act, args);
}

std::tuple<Tensor, Tensor> bn_act(
    const Tensor& x, const Tensor& scale, const Tensor& shift, const Optional& residual, bool relu, bool save_mask) {
  TiledActivations t("bn_act", "x", x);
  Tensor out = torch::stable::empty_like(x), mask = t.new_mask(save_mask);
  bn_act_into(t, scale, shift, residual, relu, out, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr);
  return {out, mask};
}

void bn_act_(const Tensor& x, const Tensor& scale, const Tensor& shift, const Optional& residual, bool relu) {
  TiledActivations t("bn_act_", "x", x);
  bn_act_into(t, scale, shift, residual, relu, x, nullptr);
}

// The arguments that both steps of the backward share.
Args backward_args(
    TiledActivations& t, const Tensor& grad, const Optional& mask, const Tensor& mean, const Tensor& scale,
    const Tensor& shift, bool relu) {
  Args args = args_for(t);
  args.grad = t.like("grad", grad);
  args.p.mean = t.channels("mean", mean);
  args.p.scale = t.channels("scale", scale);
  args.p.shift = t.channels("shift", shift);
  args.relu = relu;
  if (mask.has_value()) args.mask = t.mask("mask", *mask);
  args.gate = mask.has_value() ? Gate::kMask : relu ? Gate::kRecompute : Gate::kOpen;
  return args;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_reduce(
    const Tensor& grad, const Tensor& x, const Optional& mask, const Tensor& mean, const Tensor& scale,
    const Tensor& shift, bool relu, bool want_activation) {
  TiledActivations t("bn_act_backward_reduce", "x", x);
  Args args = backward_args(t, grad, mask, mean, scale, shift, relu);
  const i64 none = 0;
  Tensor activation = want_activation ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {&none, 1});
  if (want_activation) args.out = activation.mutable_data_ptr();
  const Partials partials(t, 2, args);
  run_units(t, kernels(t.dtype).bn_act_backward_reduce, args, t.g.tiles,
            t.g.tile_rows * (t.g.channels_last ? t.g.c : 1), 2 * (t.g.width + kBlock));
  auto [sum_dz, sum_dz_centred] = partials.sums(t);
  return {sum_dz, sum_dz_centred, activation};
}

void backward_into(
    TiledActivations& t, const Tensor& grad, const Optional& mask, const Tensor& mean, const Tensor& scale,
    const Tensor& shift, bool relu, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& out) {
  Args args = backward_args(t, grad, mask, mean, scale, shift, relu);
  args.p.a = t.channels("a", a);
  args.p.b = t.channels("b", b);
  args.p.c = t.channels("c", c);
  args.out = out.mutable_data_ptr();
  run_elements(t, kernels(t.dtype).bn_act_backward, args);
}

Tensor bn_act_backward(
    const Tensor& grad, const Tensor& x, const Optional& mask, const Tensor& mean, const Tensor& scale,
    const Tensor& shift, bool relu, const Tensor& a, const Tensor& b, const Tensor& c) {
  TiledActivations t("bn_act_backward", "x", x);
  Tensor out = torch::stable::empty_like(x);
  backward_into(t, grad, mask, mean, scale, shift, relu, a, b, c, out);
  return out;
}

void bn_act_backward_(
    const Tensor& grad, const Tensor& x, const Optional& mask, const Tensor& mean, const Tensor& scale,
    const Tensor& shift, bool relu, const Tensor& a, const Tensor& b, const Tensor& c) {
  TiledActivations t("bn_act_backward_", "x", x);
  backward_into(t, grad, mask, mean, scale, shift, relu, a, b, c, grad);
}

std::tuple<Tensor, Tensor> add_relu(const Tensor& a, const Tensor& b, bool save_mask) {
  const TiledActivations t("add_relu", "a", a);
  Tensor out = torch::stable::empty_like(a), mask = t.new_mask(save_mask);
  Args args = args_for(t);
  args.other = t.like("b", b);
  args.out = out.mutable_data_ptr();
  args.mask_out = save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  run_elements(t, kernels(t.dtype).add_relu, args);
  return {out, mask};
}

Tensor mask_grad(const Tensor& grad, const Tensor& mask) {
  const TiledActivations t("mask_grad", "grad", grad);
  Tensor out = torch::stable::empty_like(grad);
  Args args = args_for(t);
  args.grad = grad.const_data_ptr();
  args.mask = t.mask("mask", mask);
  args.out = out.mutable_data_ptr();
  run_elements(t, kernels(t.dtype).mask_grad, args);
  return out;
}

void mask_grad_add_(const Tensor& acc, const Tensor& grad, const Tensor& mask) {
  const TiledActivations t("mask_grad_add_", "acc", acc);
  Args args = args_for(t);
  args.grad = t.like("grad", grad);
  args.mask = t.mask("mask", mask);
  args.other = acc.const_data_ptr();
  args.out = acc.mutable_data_ptr();
  run_elements(t, kernels(t.dtype).mask_grad, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_", TORCH_BOX(&bn_act_));
  m.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
  m.impl("bn_act_backward_", TORCH_BOX(&bn_act_backward_));
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("mask_grad_add_", TORCH_BOX(&mask_grad_add_));
}

}  // namespace resnet_fused
