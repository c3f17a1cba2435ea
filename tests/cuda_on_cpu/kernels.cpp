// The kernels as functions of C, for tests: they run on a processor. A function returns null, or says what went wrong.
#include "calls.h"

#include "elementwise.cuh"

#include "channel_sums.cuh"
#include "launch_plan.h"

using namespace resnet_fused::cuda;

namespace {

// Of any dtype.
template <class Body>
const char* typed(int dtype, Body body) {
  return calls::typed<0, 1, 2, 3>(dtype, body);
}

template <class Body>
void gate_of(int gate, Body body) {
  switch (gate) {
    case 0: return body(std::integral_constant<Gate, Gate::kOpen>());
    case 1: return body(std::integral_constant<Gate, Gate::kMask>());
    default: return body(std::integral_constant<Gate, Gate::kActivation>());
  }
}

}  // namespace

extern "C" {

// How a call is run: blocks of the grid, splits of the rows (0: as planned), and the seed of the order.
struct Run {
  int blocks, splits;
  unsigned seed;
};

LaunchPlan elementwise_plan(int64_t count, int element_size, int tensors, int masks, int multiprocessors) {
  return plan_elementwise(count, element_size, tensors, masks, multiprocessors);
}

LaunchPlan channel_sums_plan(int64_t images, int64_t inner, int64_t channels, int channels_last, int element_size,
                             int accumulate_size, int tensors, int values) {
  return plan_channel_sums(images, inner, channels, channels_last != 0, element_size, accumulate_size, tensors, values);
}

struct Shape {
  int64_t count;
  int inner, channels, aligned;
  Elements elements() const { return {count, inner, channels, aligned != 0}; }
};

}

namespace {

template <class T>
unsigned blocks_of(const Shape& shape, const Run& run) {
  return run.blocks > 0 ? run.blocks : plan_elementwise(shape.count, sizeof(T), 2, 1, 2).blocks_x;
}

}  // namespace

extern "C" {

const char* bn_act(int dtype, Shape shape, Run run, const void* x, const void* scale, const void* shift,
                   const void* residual, int relu, void* out, uint8_t* mask) {
  return typed(dtype, [&]<class T>(T*) {
    const auto kernel = relu ? bn_act_kernel<T, true> : bn_act_kernel<T, false>;
    using A = Accumulate<T>;
    emulation::launch(blocks_of<T>(shape, run), kThreads, run.seed, kernel, static_cast<const T*>(x), static_cast<const A*>(scale),
                      static_cast<const A*>(shift), static_cast<const T*>(residual), static_cast<T*>(out), mask,
                      shape.elements());
  });
}

const char* add_relu(int dtype, Shape shape, Run run, const void* a, const void* b, void* out, uint8_t* mask) {
  return typed(dtype, [&]<class T>(T*) {
    emulation::launch(blocks_of<T>(shape, run), kThreads, run.seed, add_relu_kernel<T>, static_cast<const T*>(a),
                      static_cast<const T*>(b), static_cast<T*>(out), mask, shape.elements());
  });
}

const char* mask_grad(int dtype, Shape shape, Run run, const void* grad, const uint8_t* mask, int add, void* out) {
  return typed(dtype, [&]<class T>(T*) {
    const auto kernel = add ? mask_grad_kernel<T, true> : mask_grad_kernel<T, false>;
    emulation::launch(blocks_of<T>(shape, run), kThreads, run.seed, kernel, static_cast<const T*>(grad), mask, static_cast<T*>(out),
                      shape.elements());
  });
}

const char* bn_backward(int dtype, Shape shape, Run run, int gate, const void* grad, const void* x, const uint8_t* mask,
                        const void* mean, const void* scale, const void* shift, const void* a, const void* b,
                        const void* c, void* dx) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const Norm<T> norm{static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<const A*>(shift)};
    gate_of(gate, [&]<Gate kGate>(std::integral_constant<Gate, kGate>) {
      emulation::launch(blocks_of<T>(shape, run), kThreads, run.seed, bn_backward_kernel<T, kGate>, static_cast<const T*>(grad),
                        static_cast<const T*>(x), mask, norm, static_cast<const A*>(a), static_cast<const A*>(b),
                        static_cast<const A*>(c), static_cast<T*>(dx), shape.elements());
    });
  });
}
}

namespace {

// Returns the splits.
template <class T, class Pass>
int channel_sums(const Shape& shape, const Run& run, const Pass& pass, Accumulate<T>* partials) {
  const Elements e = shape.elements();
  const int64_t images = e.count / e.channels / e.inner, octets = images * ((e.inner + kOctet - 1) / kOctet);
  LaunchPlan plan = plan_channel_sums(images, e.inner, e.channels, e.inner == 1, sizeof(T), sizeof(Accumulate<T>), 1, 3);
  if (run.splits > 0) {
    plan.blocks_y = run.splits;
    plan.each = ((e.inner == 1 ? images : octets) + run.splits - 1) / run.splits;
  }
  const dim3 grid(plan.blocks_x, plan.blocks_y);
  if (e.inner == 1) {
    emulation::launch(grid, kThreads, run.seed, sums_of_columns_kernel<T, Pass>, pass, partials, images, plan.each, e);
  } else {
    emulation::launch(grid, kThreads, run.seed, sums_of_planes_kernel<T, Pass>, pass, partials, images, plan.each, e);
  }
  return static_cast<int>(plan.blocks_y);
}

}  // namespace

extern "C" {

const char* bn_stats(int dtype, Shape shape, Run run, const void* x, void* partials, void* mean, void* var,
                     void* running_mean, void* running_var, const int64_t* batches, double momentum) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const int splits =
        channel_sums<T>(shape, run, StatisticsPass<T>{static_cast<const T*>(x)}, static_cast<A*>(partials));
    const Running<A> running{static_cast<A*>(running_mean), static_cast<A*>(running_var), batches, momentum};
    emulation::launch((shape.channels + kThreads - 1) / kThreads, kThreads, run.seed, finalise_moments_kernel<A>,
                      static_cast<const A*>(partials), splits, int64_t{shape.channels}, static_cast<A*>(mean),
                      static_cast<A*>(var), running);
  });
}

const char* bn_backward_reduce(int dtype, Shape shape, Run run, int gate, int relu, const void* grad, const void* x,
                               const uint8_t* mask, const void* mean, const void* scale, const void* shift,
                               void* activation, void* partials, void* sum, void* centred) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const Norm<T> norm{static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<const A*>(shift)};
    int splits = 0;
    gate_of(gate, [&]<Gate kGate>(std::integral_constant<Gate, kGate>) {
      const auto run_pass = [&]<bool kRelu>(std::bool_constant<kRelu>) {
        const GradientPass<T, kGate, kRelu> pass{static_cast<const T*>(grad), static_cast<const T*>(x), mask, norm,
                                                 static_cast<T*>(activation)};
        splits = channel_sums<T>(shape, run, pass, static_cast<A*>(partials));
      };
      relu ? run_pass(std::true_type()) : run_pass(std::false_type());
    });
    emulation::launch((shape.channels + kThreads - 1) / kThreads, kThreads, run.seed, finalise_sums_kernel<A>,
                      static_cast<const A*>(partials), splits, int64_t{shape.channels}, static_cast<A*>(sum),
                      static_cast<A*>(centred));
  });
}
}
