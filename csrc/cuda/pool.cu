// CUDA operators of the stem's max pooling behind batch norm and ReLU. Schemas and meaning: ../ops.cpp.
#include <initializer_list>
#include <tuple>

#include "launch.h"
#include "pool.cuh"

namespace resnet_fused::cuda {
namespace {

Images images_of(const Activations& t) {
  return {t.n, narrow(t.op, "C", t.c), narrow(t.op, "H", t.h), narrow(t.op, "W", t.w)};
}

// body.operator()<T, taking>() for tensors and vectors at these addresses.
template <class Body>
void taken(const Activations& t, std::initializer_list<const void*> addresses, const Body& body) {
  bool octets = t.c % kOctet == 0;
  for (const void* p : addresses) octets = octets && is_aligned(p);
  typed(t.scalar_type, [&]<class T>() {
    if (!t.channels_last) return body.template operator()<T, Taking::kPlanes>();
    if (octets) return body.template operator()<T, Taking::kOctets>();
    return body.template operator()<T, Taking::kRagged>();
  });
}

// Grid of a kernel that walks over all windows.
template <Taking kTaking, class Kernel>
unsigned blocks_of_windows(const Stream& stream, const Images& images, Kernel* kernel) {
  const i64 resident = stream.resident_blocks(kernel, kThreads);
  return static_cast<unsigned>(plan_windows(images.windows() * images.units<kTaking>(), resident));
}

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const Activations t("bn_relu_maxpool", "x", x);
  Tensor out = t.new_pooled(t.scalar_type), index = t.new_pooled(ScalarType::Byte);
  const void *from = x.const_data_ptr(), *of_scale = t.vector("scale", scale), *of_shift = t.vector("shift", shift);
  if (t.numel == 0) return {out, index};
  const Stream stream(t);
  const Images images = images_of(t);
  taken(t, {from, of_scale, of_shift, address(out), address(index)}, [&]<class T, Taking kTaking>() {
    const auto kernel = &bn_relu_maxpool_kernel<T, kTaking>;
    stream.launch(kernel, blocks_of_windows<kTaking>(stream, images, kernel), kThreads, from, of_scale, of_shift,
                  address(out), address(index), images);
  });
  return {out, index};
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce(const Tensor& grad, const Tensor& index, const Tensor& x,
                                                           const Tensor& mean) {
  const Activations t("bn_relu_maxpool_backward_reduce", "x", x);
  Tensor sum = t.new_channels(), centred = t.new_channels();
  const void *of_grad = t.pooled("grad", grad, t.scalar_type), *winners = t.pooled("index", index, ScalarType::Byte);
  const void *of_mean = t.vector("mean", mean), *from = x.const_data_ptr();
  if (t.numel == 0) {
    torch::stable::zero_(sum);
    torch::stable::zero_(centred);
    return {sum, centred};
  }
  const Stream stream(t);
  const Images images = images_of(t);
  taken(t, {of_grad, winners, of_mean, from}, [&]<class T, Taking kTaking>() {
    using A = Accumulate<T>;
    const WindowSumsPlan plan =
        plan_window_sums(images.windows(), images.units<kTaking>(), kTaking == Taking::kPlanes);
    const i64 size = plan.splits * GradientSums<A>::kValues * t.c;
    const Tensor partials = torch::stable::new_empty(x, {&size, 1}, t.acc_type);
    const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
    stream.launch(bn_relu_maxpool_backward_reduce_kernel<T, kTaking>, grid, kThreads, of_grad, winners, from, of_mean,
                  address(partials), plan.each, plan.lanes, images);
    stream.launch(finalise_sums_kernel<A>, blocks_of_join(t.c), kThreads, address(partials), plan.splits, t.c,
                  address(sum), address(centred));
  });
  return {sum, centred};
}

Tensor bn_relu_maxpool_backward(const Tensor& grad, const Tensor& index, const Tensor& x, const Tensor& mean,
                                const Tensor& a, const Tensor& b, const Tensor& c) {
  const Activations t("bn_relu_maxpool_backward", "x", x);
  Tensor dx = torch::stable::empty_like(x);
  const void *of_grad = t.pooled("grad", grad, t.scalar_type), *winners = t.pooled("index", index, ScalarType::Byte);
  const void *of_mean = t.vector("mean", mean), *from = x.const_data_ptr();
  const void *of_a = t.vector("a", a), *of_b = t.vector("b", b), *of_c = t.vector("c", c);
  if (t.numel == 0) return dx;
  const Stream stream(t);
  const Images images = images_of(t);
  taken(t, {of_grad, winners, from, of_mean, of_a, of_b, of_c, address(dx)}, [&]<class T, Taking kTaking>() {
    const auto kernel = &bn_relu_maxpool_backward_kernel<T, kTaking>;
    stream.launch(kernel, blocks_of_windows<kTaking>(stream, images, kernel), kThreads, of_grad, winners, from, of_mean, of_a, of_b, of_c, address(dx), images);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("bn_relu_maxpool", TORCH_BOX(&bn_relu_maxpool));
  m.impl("bn_relu_maxpool_backward_reduce", TORCH_BOX(&bn_relu_maxpool_backward_reduce));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
}

}  // namespace resnet_fused::cuda
