// The pooling kernels as functions of C, for tests: they run on a processor. A function returns null, or says what went
// wrong.
#include "calls.h"

#include "pool.cuh"

using namespace resnet_fused::cuda;

namespace {

struct Shape {
  int64_t n;
  int channels, h, w, channels_last, aligned;
};

// Blocks and threads of forward and backward; splits of the sums, and units of channels side by side in a block; the
// seed of the order.
struct Run {
  int blocks, threads, splits, lanes;
  unsigned seed;
};

template <class T, Taking kTaking>
struct Call {
  using A = Accumulate<T>;
  Images images;
  Run run;

  void forward(const void* x, const void* scale, const void* shift, void* out, uint8_t* index) const {
    emulation::launch(run.blocks, run.threads, run.seed, bn_relu_maxpool_kernel<T, kTaking>, static_cast<const T*>(x),
                      static_cast<const A*>(scale), static_cast<const A*>(shift), static_cast<T*>(out), index, images);
  }

  void backward(const void* grad, const uint8_t* index, const void* x, const void* mean, const void* a, const void* b,
                const void* c, void* dx) const {
    emulation::launch(run.blocks, run.threads, run.seed, bn_relu_maxpool_backward_kernel<T, kTaking>,
                      static_cast<const T*>(grad), index, static_cast<const T*>(x), static_cast<const A*>(mean),
                      static_cast<const A*>(a), static_cast<const A*>(b), static_cast<const A*>(c), static_cast<T*>(dx),
                      images);
  }

  void backward_reduce(const void* grad, const uint8_t* index, const void* x, const void* mean, void* partials,
                       void* sum, void* centred) const {
    const int64_t of_split = (images.windows() + run.splits - 1) / run.splits, channels = images.channels;
    const dim3 grid((images.units<kTaking>() + run.lanes - 1) / run.lanes, run.splits);
    emulation::launch(grid, kThreads, run.seed, bn_relu_maxpool_backward_reduce_kernel<T, kTaking>,
                      static_cast<const T*>(grad), index, static_cast<const T*>(x), static_cast<const A*>(mean),
                      static_cast<A*>(partials), of_split, run.lanes, images);
    emulation::launch((channels + kChannelsOfJoin - 1) / kChannelsOfJoin, kThreads, run.seed, finalise_sums_kernel<A>,
                      static_cast<const A*>(partials), run.splits, channels, static_cast<A*>(sum),
                      static_cast<A*>(centred));
  }
};

template <class T, class Body>
void taken(const Shape& shape, const Run& run, Body body) {
  const Images images{shape.n, shape.channels, shape.h, shape.w};
  if (!shape.channels_last) {
    body(Call<T, Taking::kPlanes>{images, run});
  } else if (shape.aligned && shape.channels % kOctet == 0) {
    body(Call<T, Taking::kOctets>{images, run});
  } else {
    body(Call<T, Taking::kRagged>{images, run});
  }
}

template <class Body>
const char* called(int dtype, const Shape& shape, const Run& run, Body body) {
  return calls::typed<0, 1, 2, 3>(dtype, [&]<class T>(T*) { taken<T>(shape, run, body); });
}

}  // namespace

extern "C" {

const char* bn_relu_maxpool(int dtype, Shape shape, Run run, const void* x, const void* scale, const void* shift,
                            void* out, uint8_t* index) {
  return called(dtype, shape, run, [&](const auto& call) { call.forward(x, scale, shift, out, index); });
}

const char* bn_relu_maxpool_backward(int dtype, Shape shape, Run run, const void* grad, const uint8_t* index,
                                     const void* x, const void* mean, const void* a, const void* b, const void* c,
                                     void* dx) {
  return called(dtype, shape, run, [&](const auto& call) { call.backward(grad, index, x, mean, a, b, c, dx); });
}

const char* bn_relu_maxpool_backward_reduce(int dtype, Shape shape, Run run, const void* grad, const uint8_t* index,
                                            const void* x, const void* mean, void* partials, void* sum,
                                            void* centred) {
  return called(dtype, shape, run,
                [&](const auto& call) { call.backward_reduce(grad, index, x, mean, partials, sum, centred); });
}
}
