// CUDA operators that pass over activations once: batch norm with its activation, residual additions. Schemas and meaning:
// ../ops.cpp.
#include <tuple>
#include <type_traits>

#include "operands.h"

namespace resnet_fused::cuda {
namespace {

// Runs a kernel that passes over the elements once, reading and writing so many tensors of them and bits of masks, with
// vectors, unless there are none, at the addresses given. kernel(true or false) is the one for channels that a thread keeps,
// or for any.
template <class Kernel, class... Arguments>
void pass_over(const Activations& t, int tensors, int masks, const Elements& e, std::initializer_list<const void*> vectors,
               const Kernel& kernel, const Arguments&... arguments) {
  if (t.numel == 0) return;
  const Stream stream(t);
  const auto launch = [&](auto* chosen, const LaunchPlan& plan) {
    stream.launch(chosen, static_cast<unsigned>(plan.blocks_x), plan.threads, arguments..., e);
  };
  const auto plan = [&](auto* chosen, bool aligned) {
    return plan_elementwise(t.numel, e.inner, e.channels, aligned, static_cast<int>(t.element_size), tensors, masks,
                            stream.resident_blocks(chosen, kThreads));
  };
  const auto steady = kernel(std::true_type()), general = kernel(std::false_type());
  const bool aligned = e.aligned && are_aligned(vectors);
  const LaunchPlan of_steady = plan(steady, aligned);
  if (of_steady.whole) return launch(steady, of_steady);
  launch(general, plan(general, false));
}

const void* optional_like(const Activations& t, const char* name, const Optional& other) {
  return other.has_value() ? t.like(name, *other) : nullptr;
}

void bn_act_into(const Activations& t, const Tensor& scale, const Tensor& shift, const Optional& residual, bool relu,
                 const Tensor& out, uint8_t* mask) {
  const void *x = t.x.const_data_ptr(), *of_scale = t.vector("scale", scale), *of_shift = t.vector("shift", shift);
  const void* other = optional_like(t, "residual", residual);
  const Elements e = elements_of(t, {x, other, address(out)});
  typed(t.scalar_type, [&]<class T>() {
    pass_over(t, other ? 3 : 2, mask != nullptr, e, {of_scale, of_shift},
              [](auto steady) { return &bn_act_kernel<T, steady>; }, x, of_scale, of_shift, other, relu, address(out),
              mask);
  });
}

std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift, const Optional& residual,
                                  bool relu, bool save_mask) {
  const Activations t("bn_act", "x", x);
  Tensor out = torch::stable::empty_like(x), mask = t.new_mask(save_mask);
  bn_act_into(t, scale, shift, residual, relu, out, mask_address(mask));
  return {out, mask};
}

void bn_act_(const Tensor& x, const Tensor& scale, const Tensor& shift, const Optional& residual, bool relu) {
  bn_act_into({"bn_act_", "x", x}, scale, shift, residual, relu, x, nullptr);
}

std::tuple<Tensor, Tensor> add_relu(const Tensor& a, const Tensor& b, bool save_mask) {
  const Activations t("add_relu", "a", a);
  Tensor out = torch::stable::empty_like(a), mask = t.new_mask(save_mask);
  const void *one = a.const_data_ptr(), *other = t.like("b", b);
  const Elements e = elements_of(t, {one, other, address(out)});
  typed(t.scalar_type, [&]<class T>() {
    pass_over(t, 3, save_mask, e, {}, [](auto) { return &add_relu_kernel<T>; }, one, other, address(out),
              mask_address(mask));
  });
  return {out, mask};
}

void mask_grad_into(const Activations& t, const Tensor& grad, const Tensor& mask, bool add, const Tensor& out) {
  const void *from = t.like("grad", grad), *bits = t.mask("mask", mask);
  const Elements e = elements_of(t, {from, address(out)});
  typed(t.scalar_type, [&]<class T>() {
    const auto kernel = [=](auto) { return add ? &mask_grad_kernel<T, true> : &mask_grad_kernel<T, false>; };
    pass_over(t, add ? 3 : 2, 1, e, {}, kernel, from, bits, address(out));
  });
}

Tensor mask_grad(const Tensor& grad, const Tensor& mask) {
  Tensor out = torch::stable::empty_like(grad);
  mask_grad_into({"mask_grad", "grad", grad}, grad, mask, false, out);
  return out;
}

void mask_grad_add_(const Tensor& acc, const Tensor& grad, const Tensor& mask) {
  mask_grad_into({"mask_grad_add_", "acc", acc}, grad, mask, true, acc);
}

void backward_into(const BackwardArguments& from, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& dx) {
  const Activations& t = from.t;
  const void *of_a = t.vector("a", a), *of_b = t.vector("b", b), *of_c = t.vector("c", c);
  const Elements e = elements_of(t, {from.grad, from.x, address(dx)});
  gated(from, [&]<class T, Gate kGate>() {
    pass_over(t, 3, from.mask != nullptr, e, {from.mean, from.scale, from.shift, of_a, of_b, of_c},
              [](auto steady) { return &bn_backward_kernel<T, kGate, steady>; }, from.grad, from.x, from.mask,
              from.norm<T>(), of_a, of_b, of_c, address(dx));
  });
}

Tensor bn_act_backward(const Tensor& grad, const Tensor& x, const Optional& mask, const Tensor& mean,
                       const Tensor& scale, const Tensor& shift, bool relu, const Tensor& a, const Tensor& b,
                       const Tensor& c) {
  const Activations t("bn_act_backward", "x", x);
  Tensor dx = torch::stable::empty_like(x);
  backward_into({t, grad, mask, mean, scale, shift, relu}, a, b, c, dx);
  return dx;
}

void bn_act_backward_(const Tensor& grad, const Tensor& x, const Optional& mask, const Tensor& mean,
                      const Tensor& scale, const Tensor& shift, bool relu, const Tensor& a, const Tensor& b,
                      const Tensor& c) {
  const Activations t("bn_act_backward_", "x", x);
  backward_into({t, grad, mask, mean, scale, shift, relu}, a, b, c, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_", TORCH_BOX(&bn_act_));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
  m.impl("bn_act_backward_", TORCH_BOX(&bn_act_backward_));
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("mask_grad_add_", TORCH_BOX(&mask_grad_add_));
}

}  // namespace resnet_fused::cuda
