// The kernels of elementwise.cuh as functions of C, for tests: they run on a processor. A function returns null, or says what
// went wrong.
#include "batch_norm_calls.h"

namespace {

template <class T>
LaunchPlan planned(const Shape& shape, const Run& run) {
  LaunchPlan plan = plan_elementwise(shape.count, shape.inner, shape.channels, shape.aligned != 0, sizeof(T), 2, 1, run.blocks);
  if (run.general) plan.whole = false;
  plan.blocks_x += run.idle;
  return plan;
}

}  // namespace

extern "C" {

const char* bn_act(int dtype, Shape shape, Run run, const void* x, const void* scale, const void* shift,
                   const void* residual, int relu, void* out, uint8_t* mask) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const LaunchPlan plan = planned<T>(shape, run);
    either(plan.whole, [&]<bool kSteady>(std::bool_constant<kSteady>) {
      emulation::launch(plan.blocks_x, kThreads, run.seed, bn_act_kernel<T, kSteady>, static_cast<const T*>(x),
                        static_cast<const A*>(scale), static_cast<const A*>(shift), static_cast<const T*>(residual),
                        relu != 0, static_cast<T*>(out), mask, shape.elements());
    });
  });
}

const char* add_relu(int dtype, Shape shape, Run run, const void* a, const void* b, void* out, uint8_t* mask) {
  return typed(dtype, [&]<class T>(T*) {
    emulation::launch(planned<T>(shape, run).blocks_x, kThreads, run.seed, add_relu_kernel<T>, static_cast<const T*>(a),
                      static_cast<const T*>(b), static_cast<T*>(out), mask, shape.elements());
  });
}

const char* mask_grad(int dtype, Shape shape, Run run, const void* grad, const uint8_t* mask, int add, void* out) {
  return typed(dtype, [&]<class T>(T*) {
    const auto kernel = add ? mask_grad_kernel<T, true> : mask_grad_kernel<T, false>;
    emulation::launch(planned<T>(shape, run).blocks_x, kThreads, run.seed, kernel, static_cast<const T*>(grad), mask,
                      static_cast<T*>(out), shape.elements());
  });
}

const char* bn_backward(int dtype, Shape shape, Run run, int gate, const void* grad, const void* x, const uint8_t* mask,
                        const void* mean, const void* scale, const void* shift, const void* a, const void* b,
                        const void* c, void* dx) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const Norm<T> norm{static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<const A*>(shift)};
    const LaunchPlan plan = planned<T>(shape, run);
    gate_of(gate, [&]<Gate kGate>(std::integral_constant<Gate, kGate>) {
      either(plan.whole, [&]<bool kSteady>(std::bool_constant<kSteady>) {
        emulation::launch(plan.blocks_x, kThreads, run.seed, bn_backward_kernel<T, kGate, kSteady>,
                          static_cast<const T*>(grad), static_cast<const T*>(x), mask, norm, static_cast<const A*>(a),
                          static_cast<const A*>(b), static_cast<const A*>(c), static_cast<T*>(dx), shape.elements());
      });
    });
  });
}
}
