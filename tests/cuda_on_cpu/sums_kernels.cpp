// The kernels of channel_sums.cuh as functions of C, for tests.
#include "batch_norm_calls.h"

#include "channel_sums.cuh"

namespace {

// Returns the splits.
template <class T, class Pass>
int channel_sums(const Shape& shape, const Run& run, const Pass& pass, Accumulate<T>* partials) {
  const Elements e = shape.elements();
  const int64_t images = e.count / e.channels / e.inner, octets = images * ((e.inner + kOctet - 1) / kOctet);
  LaunchPlan plan = plan_channel_sums(images, e.inner, e.channels, e.inner == 1, e.aligned, sizeof(T),
                                      sizeof(Accumulate<T>), 1, 3);
  if (run.splits > 0) {
    plan.blocks_y = run.splits;
    plan.each = ((e.inner == 1 ? images : octets) + run.splits - 1) / run.splits;
  }
  const dim3 grid(plan.blocks_x, plan.blocks_y);
  either(plan.whole && !run.general, [&]<bool kWhole>(std::bool_constant<kWhole>) {
    if (e.inner == 1) {
      emulation::launch(grid, kThreads, run.seed, sums_of_columns_kernel<T, Pass, kWhole>, pass, partials, images, plan.each,
                        plan.lanes, e);
    } else {
      emulation::launch(grid, kThreads, run.seed, sums_of_planes_kernel<T, Pass, kWhole>, pass, partials, images, plan.each,
                        e);
    }
  });
  return static_cast<int>(plan.blocks_y);
}

}  // namespace

extern "C" {

const char* bn_stats(int dtype, Shape shape, Run run, const void* x, void* partials, void* mean, void* var) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const int splits =
        channel_sums<T>(shape, run, StatisticsPass<T>{static_cast<const T*>(x)}, static_cast<A*>(partials));
    emulation::launch((shape.channels + kChannelsOfJoin - 1) / kChannelsOfJoin, kThreads, run.seed, finalise_moments_kernel<A>,
                      static_cast<const A*>(partials), splits, int64_t{shape.channels}, static_cast<A*>(mean),
                      static_cast<A*>(var));
  });
}

const char* bn_backward_reduce(int dtype, Shape shape, Run run, int gate, const void* grad, const void* x,
                               const uint8_t* mask, const void* mean, const void* scale, const void* shift,
                               void* activation, void* partials, void* sum, void* centred) {
  return typed(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    const Norm<T> norm{static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<const A*>(shift)};
    int splits = 0;
    gate_of(gate, [&]<Gate kGate>(std::integral_constant<Gate, kGate>) {
      const GradientPass<T, kGate> pass{static_cast<const T*>(grad), static_cast<const T*>(x), mask, norm,
                                        static_cast<T*>(activation), kGate == Gate::kActivation};
      splits = channel_sums<T>(shape, run, pass, static_cast<A*>(partials));
    });
    emulation::launch((shape.channels + kChannelsOfJoin - 1) / kChannelsOfJoin, kThreads, run.seed, finalise_sums_kernel<A>,
                      static_cast<const A*>(partials), splits, int64_t{shape.channels}, static_cast<A*>(sum),
                      static_cast<A*>(centred));
  });
}
}
