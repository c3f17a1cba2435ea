// CUDA operator that folds all batch norms of a network. Schema and meaning: ../ops.cpp.
#include <tuple>
#include <vector>

#include "fold.cuh"
#include "launch.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "fold_batch_norms";

using Tensors = std::vector<Tensor>;

// A parameter of one layer: of the dtype of all, dense, of so many elements or, where it may be absent, none.
template <class S>
const S* parameter(const char* name, const Tensor& t, const Tensor& like, i64 size, bool optional) {
  if (optional && t.numel() == 0) return nullptr;
  check_beside(kOp, name, t, like, like.scalar_type());
  STD_TORCH_CHECK(t.numel() == size && (t.is_contiguous() || (t.dim() == 4 && dense(t, true))), kOp, ": ", name,
                  ": expected ", size, " dense elements, got shape ", shape_string(t.sizes()), " with strides ",
                  shape_string(t.strides()));
  return static_cast<const S*>(t.const_data_ptr());
}

struct Parameters {
  const Tensors &weights, &biases, &gammas, &betas, &means, &vars;
  const std::vector<double>& eps;
};

template <class S, class T>
void fold_into(const Parameters& from, const Tensors& folded, const Tensors& shifts) {
  std::vector<FoldedLayer<S, T>> layers;
  i64 rows = 0;
  const Tensor& first = from.weights.front();
  for (size_t i = 0; i < from.weights.size(); ++i) {
    const Tensor& w = from.weights[i];
    const i64 k = w.size(0);
    const auto vector = [&](const char* name, const Tensors& of, bool optional) {
      return parameter<S>(name, of[i], first, k, optional);
    };
    layers.push_back({parameter<S>("weights", w, first, w.numel(), false), vector("biases", from.biases, true),
                      vector("gammas", from.gammas, true), vector("betas", from.betas, true),
                      vector("means", from.means, false), vector("vars", from.vars, false), from.eps[i],
                      static_cast<T*>(address(folded[i])), static_cast<T*>(address(shifts[i])), narrow(kOp, "K", k),
                      narrow(kOp, "C", w.size(1)), narrow(kOp, "R * S", w.size(2) * w.size(3)), !w.is_contiguous(), rows});
    rows += k;
  }
  if (rows == 0) return;
  const i64 bytes = static_cast<i64>(layers.size() * sizeof(layers[0])), one = 1;
  const auto on_host = torch::stable::from_blob(layers.data(), {&bytes, 1}, {&one, 1},
                                                torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte);
  const Stream stream(kOp, first);
  const Tensor table = torch::stable::to(on_host, first.device());
  stream.launch(fold_kernel<S, T>, static_cast<unsigned>(cut(rows, kRowsOfBlock)), kThreads, address(table),
                static_cast<int>(layers.size()), rows);
}

std::tuple<Tensors, Tensors> fold_batch_norms(const Tensors& weights, const Tensors& biases, const Tensors& gammas,
                                              const Tensors& betas, const Tensors& means, const Tensors& vars,
                                              const std::vector<double>& eps, ScalarType dtype) {
  for (size_t size : {biases.size(), gammas.size(), betas.size(), means.size(), vars.size(), eps.size()}) {
    STD_TORCH_CHECK(size == weights.size(), kOp, ": expected lists of one length, got ", weights.size(), " weights and ",
                    size, " of another parameter");
  }
  Tensors folded, shifts;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.dim() == 4, kOp, ": weights: expected [K, C, R, S], got ", w.dim(), " dimensions");
    const i64 k = w.size(0);
    folded.push_back(torch::stable::empty(w.sizes(), dtype, std::nullopt, w.device(), std::nullopt,
                                          torch::headeronly::MemoryFormat::ChannelsLast));
    shifts.push_back(torch::stable::new_empty(w, {&k, 1}, dtype));
  }
  if (weights.empty()) return {folded, shifts};
  const Parameters from{weights, biases, gammas, betas, means, vars, eps};
  const ScalarType given = weights.front().scalar_type();
  const bool narrows = given == ScalarType::Float && is_half(dtype);
  const bool known = is_half(dtype) || dtype == ScalarType::Double || dtype == ScalarType::Float;
  STD_TORCH_CHECK(known && (given == dtype || narrows), kOp, ": dtype: expected that of the weights, or half precision for ",
                  "Float; got ", torch::headeronly::toString(dtype), " for ", torch::headeronly::toString(given));
  typed(dtype, [&]<class T>() {
    if (given == dtype) return fold_into<T, T>(from, folded, shifts);
    if constexpr (sizeof(T) == 2) fold_into<float, T>(from, folded, shifts);
  });
  return {folded, shifts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("fold_batch_norms", TORCH_BOX(&fold_batch_norms));
}

}  // namespace resnet_fused::cuda
