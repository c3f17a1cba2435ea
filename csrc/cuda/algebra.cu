// CUDA operators of the algebra around batch norms. Schemas and meaning: ../ops.cpp.
#include <tuple>
#include <type_traits>

#include "covariance.cuh"
#include "launch.h"

namespace resnet_fused::cuda {
namespace {

using torch::headeronly::toString;

// Of ā and Cov.
ScalarType moments_of(ScalarType type) { return is_half(type) ? ScalarType::Float : ScalarType::Double; }

template <class T>
using MomentsOf = std::conditional_t<sizeof(T) == 2, float, double>;

// The tensors of an operator, on one device.
struct Tensors {
  const char* op;
  const Tensor& first;

  // A dense tensor of a dtype and so many elements.
  const void* checked(const char* name, const Tensor& t, ScalarType type, i64 size) const {
    check_beside(op, name, t, first, type);
    STD_TORCH_CHECK(t.numel() == size && t.is_contiguous(), op, ": ", name, ": expected ", size,
                    " contiguous elements, got shape ", shape_string(t.sizes()), " with strides ",
                    shape_string(t.strides()));
    return t.const_data_ptr();
  }

  Tensor empty(ScalarType type, i64 size) const { return torch::stable::new_empty(first, {&size, 1}, type); }

  Tensor empty(ScalarType type, i64 rows, i64 columns) const {
    const i64 sizes[] = {rows, columns};
    return torch::stable::new_empty(first, {sizes, 2}, type);
  }
};

[[noreturn]] void no_kernel(const char* op, ScalarType one, ScalarType other) {
  STD_TORCH_CHECK(false, op, ": there is no kernel for ", toString(one), " with ", toString(other));
  __builtin_unreachable();
}

// body.operator()<T, P>(): parameters of a norm are as wide as its tensors, or float32.
template <class Body>
void typed_with_parameters(const char* op, ScalarType type, ScalarType parameters, const Body& body) {
  typed(type, [&]<class T>() {
    if (parameters == type) return body.template operator()<T, T>();
    if constexpr (sizeof(T) == 2) {
      if (parameters == ScalarType::Float) return body.template operator()<T, float>();
    }
    no_kernel(op, type, parameters);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_vectors(const Tensor& mean, const Tensor& var,
                                                                const Tensor& gamma, const Tensor& beta, double eps,
                                                                ScalarType acc) {
  const Tensors of{"norm_vectors", mean};
  const i64 k = mean.numel();
  const ScalarType given = mean.scalar_type();
  const void *in[] = {of.checked("mean", mean, given, k), of.checked("var", var, given, k),
                      of.checked("gamma", gamma, gamma.scalar_type(), k),
                      of.checked("beta", beta, gamma.scalar_type(), k)};
  const i64 copied = given == acc ? 0 : k;
  Tensor out[] = {of.empty(acc, copied), of.empty(acc, copied), of.empty(acc, k), of.empty(acc, k), of.empty(acc, k)};
  if (k == 0) return {out[0], out[1], out[2], out[3], out[4]};
  const Stream stream(of.op, mean);
  const auto launch = [&]<class S, class P, class A>() {
    const auto to = [&](int i) { return out[i].numel() ? static_cast<A*>(address(out[i])) : nullptr; };
    stream.launch(scale_shift_kernel<S, P, A>, channel_blocks(k), kThreads, in[0], in[1], in[2], in[3], eps, k,
                  NormVectors<A>{to(0), to(1), to(2), to(3), to(4)});
  };
  typed(gamma.scalar_type(), [&]<class P>() {
    const bool is_double = given == ScalarType::Double;
    if (given == ScalarType::Float && acc == given && !std::is_same_v<P, double>) return launch.template operator()<float, P, float>();
    if (is_double && acc == ScalarType::Float && std::is_same_v<P, float>) return launch.template operator()<double, float, float>();
    if (is_double && acc == given && std::is_same_v<P, double>) return launch.template operator()<double, double, double>();
    no_kernel(of.op, given, gamma.scalar_type());
  });
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_gradients(const Tensor& sum_dz, const Tensor& sum_dz_centred,
                                                          const Tensor& rstd, const Tensor& scale, i64 count,
                                                          bool training, ScalarType dtype) {
  const Tensors of{"norm_gradients", sum_dz};
  const i64 k = sum_dz.numel();
  const ScalarType acc = sum_dz.scalar_type();
  const void *in[] = {of.checked("sum_dz", sum_dz, acc, k), of.checked("sum_dz_centred", sum_dz_centred, acc, k),
                      of.checked("rstd", rstd, acc, k), of.checked("scale", scale, acc, k)};
  Tensor b = of.empty(acc, k), c = of.empty(acc, k), dgamma = of.empty(dtype, k), dbeta = of.empty(dtype, k);
  if (k == 0) return {b, c, dgamma, dbeta};
  const Stream stream(of.op, sum_dz);
  typed(dtype, [&]<class P>() {
    using A = Accumulate<P>;
    if (acc != acc_of(dtype)) no_kernel(of.op, acc, dtype);
    stream.launch(coefficients_kernel<A, P>, channel_blocks(k), kThreads, in[0], in[1], in[2], in[3], count, training, k,
                  CoefficientVectors<A, P>{static_cast<A*>(address(b)), static_cast<A*>(address(c)),
                                           static_cast<P*>(address(dgamma)), static_cast<P*>(address(dbeta))});
  });
  return {b, c, dgamma, dbeta};
}

void update_running_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                     const Optional& bias, const Optional& batches, double momentum, double correction) {
  const Tensors of{"update_running_", mean};
  const i64 k = mean.numel();
  const ScalarType acc = mean.scalar_type(), type = running_mean.scalar_type();
  const void *of_mean = of.checked("mean", mean, acc, k), *of_var = of.checked("var", var, acc, k);
  of.checked("running_mean", running_mean, type, k);
  of.checked("running_var", running_var, type, k);
  const void* of_bias = bias.has_value() ? of.checked("bias", *bias, type, k) : nullptr;
  const void* counted = batches.has_value() ? of.checked("batches", *batches, ScalarType::Long, 1) : nullptr;
  if (k == 0) return;
  const Stream stream(of.op, mean);
  typed(type, [&]<class R>() {
    if (acc != acc_of(type)) no_kernel(of.op, acc, type);
    stream.launch(update_running_kernel<Accumulate<R>, R>, channel_blocks(k), kThreads, of_mean, of_var, of_bias, counted,
                  momentum, correction, k, address(running_mean), address(running_var));
  });
}

// A filter's shape, checked.
struct Filter {
  const void* weight;
  int outputs, channels;

  Filter(const Tensors& of, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2, of.op, ": weight: expected [K, C], got ", weight.dim(), " dimensions");
    this->weight = of.checked("weight", weight, weight.scalar_type(), weight.numel());
    outputs = narrow(of.op, "K", weight.size(0)), channels = narrow(of.op, "C", weight.size(1));
    STD_TORCH_CHECK(weight.numel() > 0, of.op, ": weight: expected elements, got shape ", shape_string(weight.sizes()));
  }

  i64 size() const { return i64{outputs} * channels; }
  i64 moments() const { return i64{channels} * (channels + 3) / 2; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> through_covariance(const Tensor& weight, const Tensor& mean, const Tensor& cov,
                                                              double unit, double limit) {
  const Tensors of{"through_covariance", weight};
  const Filter filter(of, weight);
  const ScalarType type = weight.scalar_type(), moments = moments_of(type), given = mean.scalar_type();
  const void* of_mean = of.checked("mean", mean, given, filter.channels);
  const void* of_cov = of.checked("cov", cov, given, i64{filter.channels} * filter.channels);
  Tensor out_mean = of.empty(moments, filter.outputs), out_var = of.empty(moments, filter.outputs);
  Tensor flagged = of.empty(ScalarType::Bool, filter.outputs), packed = of.empty(moments, filter.moments());
  const Stream stream(of.op, weight);
  typed(type, [&]<class T>() {
    using D = MomentsOf<T>;
    const auto launch = [&]<class S>() {
      stream.launch(through_covariance_kernel<T, S, D>, row_blocks(filter.outputs), kThreads, filter.weight, of_mean,
                    of_cov, filter.outputs, filter.channels, unit, limit, address(out_mean), address(out_var),
                    address(flagged), address(packed));
    };
    if (given == ScalarType::Double) return launch.template operator()<double>();
    if (given == moments) return launch.template operator()<D>();
    no_kernel(of.op, type, given);
  });
  return {out_mean, out_var, flagged, packed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_gradients(
    const Tensor& t, const Tensor& weight, const Optional& moments, const Tensor& sum_dz, const Tensor& mean,
    const Tensor& rstd, const Tensor& scale, i64 count, ScalarType norm_dtype, std::optional<ScalarType> weight_dtype) {
  const Tensors of{"row_gradients", weight};
  const Filter filter(of, weight);
  const i64 k = filter.outputs;
  const ScalarType type = weight.scalar_type(), acc = acc_of(type);
  const void* of_t = of.checked("t", t, t.scalar_type(), filter.size());
  const void* packed = moments.has_value() ? of.checked("moments", *moments, moments_of(type), filter.moments()) : nullptr;
  const void *vectors[] = {of.checked("sum_dz", sum_dz, acc, k), of.checked("mean", mean, acc, k),
                           of.checked("rstd", rstd, acc, k), of.checked("scale", scale, acc, k)};
  Tensor b = of.empty(acc, k), c = of.empty(acc, k), mean_dz = of.empty(acc, k);
  Tensor dgamma = of.empty(norm_dtype, k), dbeta = of.empty(norm_dtype, k), scaled = of.empty(type, k, filter.channels);
  const ScalarType of_gradient = weight_dtype.value_or(type);
  Tensor dweight = weight_dtype.has_value() ? of.empty(of_gradient, k, filter.channels) : of.empty(type, 0);
  const Stream stream(of.op, weight);
  const auto launch = [&]<class T, class U, class P, class W>() {
    using A = Accumulate<T>;
    using D = MomentsOf<T>;
    const auto vector = [&](int i) { return static_cast<const A*>(vectors[i]); };
    const CovarianceRows<T, D, U, P, W> rows{
        static_cast<const U*>(of_t),
        static_cast<const T*>(filter.weight),
        static_cast<const D*>(packed),
        vector(0), vector(1), vector(2), vector(3),
        count,
        filter.outputs,
        filter.channels,
        {static_cast<A*>(address(b)), static_cast<A*>(address(c)), static_cast<P*>(address(dgamma)),
         static_cast<P*>(address(dbeta))},
        static_cast<A*>(address(mean_dz)),
        weight_dtype.has_value() ? static_cast<W*>(address(dweight)) : nullptr,
        static_cast<T*>(address(scaled))};
    stream.launch(covariance_rows_kernel<T, D, U, P, W>,
                  dim3(row_blocks(filter.outputs), column_blocks(filter.outputs, filter.channels)), kThreads, rows);
  };
  typed_with_parameters(of.op, type, norm_dtype, [&]<class T, class P>() {
    const auto with_weight = [&]<class W>() {
      if constexpr (sizeof(T) == 2) {
        if (t.scalar_type() == ScalarType::Float) return launch.template operator()<T, float, P, W>();
      }
      if (t.scalar_type() == ScalarType::Double) return launch.template operator()<T, double, P, W>();
      no_kernel(of.op, type, t.scalar_type());
    };
    if (of_gradient == type) return with_weight.template operator()<T>();
    if constexpr (sizeof(T) == 2 && std::is_same_v<P, float>) {
      if (of_gradient == ScalarType::Float) return with_weight.template operator()<float>();
    }
    no_kernel(of.op, type, of_gradient);
  });
  return {b, c, dgamma, dbeta, mean_dz, scaled, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coupling(const Tensor& weight, const Tensor& b, const Tensor& moments,
                                                    const Tensor& scaled, const Tensor& mean_dz) {
  const Tensors of{"coupling", weight};
  const Filter filter(of, weight);
  const i64 k = filter.outputs, c = filter.channels;
  const ScalarType type = weight.scalar_type(), acc = acc_of(type);
  const void* of_b = of.checked("b", b, acc, k);
  const void* packed = of.checked("moments", moments, moments_of(type), filter.moments());
  const void* of_scaled = of.checked("scaled", scaled, type, filter.size());
  const void* of_mean = of.checked("mean_dz", mean_dz, acc, k);
  const bool parts = is_half(type);
  Tensor high = of.empty(type, c, c), low = parts ? of.empty(type, c, c) : of.empty(type, 0);
  Tensor shift = of.empty(acc, parts ? c : 0), mean_a = of.empty(acc, c);
  void* const to_low = parts ? address(low) : nullptr;
  const Stream stream(of.op, weight);
  typed(type, [&]<class T>() {
    stream.launch(coupling_kernel<T, MomentsOf<T>>, dim3(coupling_blocks_x(c), coupling_blocks_y(c)), kThreads,
                  filter.weight, of_b, packed, filter.outputs, filter.channels, address(high), to_low, address(mean_a));
    if (!parts) return;
    stream.launch(coupling_shift_kernel<T>, coupling_shift_blocks(c), kThreads, of_scaled, of_mean, address(high), to_low,
                  address(mean_a), filter.outputs, filter.channels, address(shift));
  });
  return {high, low, shift, mean_a};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_KEY, m) {
  m.impl("norm_vectors", TORCH_BOX(&norm_vectors));
  m.impl("norm_gradients", TORCH_BOX(&norm_gradients));
  m.impl("update_running_", TORCH_BOX(&update_running_));
  m.impl("through_covariance", TORCH_BOX(&through_covariance));
  m.impl("row_gradients", TORCH_BOX(&row_gradients));
  m.impl("coupling", TORCH_BOX(&coupling));
}

}  // namespace resnet_fused::cuda
