// Operands of the passes over activations, as the operators get and check them.
#pragma once

#include <initializer_list>

#include "elementwise.cuh"
#include "launch.h"

namespace resnet_fused::cuda {

inline bool are_aligned(std::initializer_list<const void*> addresses) {
  bool aligned = true;
  for (const void* p : addresses) aligned = aligned && is_aligned(p);
  return aligned;
}

inline Elements elements_of(const Activations& t, std::initializer_list<const void*> tensors) {
  return {t.numel, narrow(t.op, "H * W", t.channels_last ? 1 : t.h * t.w), narrow(t.op, "C", t.c), are_aligned(tensors)};
}

// What batch norm's backward reads of activations, in both of its passes.
struct BackwardArguments {
  const Activations& t;
  const void *grad, *x, *mean, *scale, *shift;
  const uint8_t* mask;
  Gate gate;

  BackwardArguments(const Activations& t, const Tensor& grad, const Optional& mask, const Tensor& mean,
                    const Tensor& scale, const Tensor& shift, bool relu)
      : t(t),
        grad(t.like("grad", grad)),
        x(t.x.const_data_ptr()),
        mean(t.vector("mean", mean)),
        scale(t.vector("scale", scale)),
        shift(t.vector("shift", shift)),
        mask(mask.has_value() ? t.mask("mask", *mask) : nullptr),
        gate(mask.has_value() ? Gate::kMask : relu ? Gate::kActivation : Gate::kOpen) {}

  template <class T>
  Norm<T> norm() const {
    using A = Accumulate<T>;
    return {static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<const A*>(shift)};
  }
};

// body.operator()<T, gate>() for the dtype and the gate at hand.
template <class Body>
void gated(const BackwardArguments& arguments, const Body& body) {
  typed(arguments.t.scalar_type, [&]<class T>() {
    switch (arguments.gate) {
      case Gate::kOpen: return body.template operator()<T, Gate::kOpen>();
      case Gate::kMask: return body.template operator()<T, Gate::kMask>();
      case Gate::kActivation: return body.template operator()<T, Gate::kActivation>();
    }
  });
}

}  // namespace resnet_fused::cuda
