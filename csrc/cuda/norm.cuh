// Vectors of a batch norm, between the sums over its rows and the passes over its tensor: a thread for each channel.
#pragma once

#include "device.cuh"

namespace resnet_fused::cuda {

// Of a grid of this file's kernels.
inline unsigned channel_blocks(int64_t channels) { return static_cast<unsigned>(cut(channels, kThreads)); }

// What follows from a norm's statistics, [channels] each. mean and var: the statistics themselves, rounded; null where they are
// of that dtype.
template <class A>
struct NormVectors {
  A *mean, *var, *rstd, *scale, *shift;
};

// rstd = 1/√(var + eps), scale = gamma·rstd, shift = beta − scale·mean, in S, rounded once to A.
// S: of the statistics, P: of the parameters. Grid: channel_blocks.
template <class S, class P, class A>
__global__ void __launch_bounds__(kThreads)
scale_shift_kernel(const S* mean, const S* var, const P* gamma, const P* beta, double eps, int64_t channels,
                   NormVectors<A> to) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= channels) return;
  // Root and quotient are rounded correctly everywhere, which an approximate reciprocal root is not.
  const S rstd = S(1) / std::sqrt(var[k] + static_cast<S>(eps)), scale = static_cast<S>(gamma[k]) * rstd;
  if (to.mean != nullptr) to.mean[k] = static_cast<A>(mean[k]);
  if (to.var != nullptr) to.var[k] = static_cast<A>(var[k]);
  to.rstd[k] = static_cast<A>(rstd);
  to.scale[k] = static_cast<A>(scale);
  to.shift[k] = static_cast<A>(multiply_add(-scale, mean[k], static_cast<S>(beta[k])));
}

// dx = a·dz + b·(x − mean) + c with a = scale, and dgamma; dbeta = Σ dz.
template <class A>
struct Coefficients {
  A b, c, dgamma;

  // b = c = 0 where statistics are frozen, which is not training.
  __device__ __forceinline__ Coefficients(A sum_dz, A sum_dz_centred, A rstd, A scale, int64_t count, bool training)
      : b(0), c(0), dgamma(rstd * sum_dz_centred) {
    if (!training) return;
    const A step = scale / -static_cast<A>(count);
    b = step * rstd * dgamma;
    c = step * sum_dz;
  }
};

// Where they go, [channels] each. a is scale itself. P: of the parameters.
template <class A, class P>
struct CoefficientVectors {
  A *b, *c;
  P *dgamma, *dbeta;

  __device__ __forceinline__ void store(int64_t k, const Coefficients<A>& of, A sum_dz) const {
    b[k] = of.b;
    c[k] = of.c;
    dgamma[k] = static_cast<P>(of.dgamma);
    dbeta[k] = static_cast<P>(sum_dz);
  }
};

// Of batch norm's gradient, from Σ dz and Σ dz·(x − mean) over count rows (backward_coefficients).
// Grid: channel_blocks.
template <class A, class P>
__global__ void __launch_bounds__(kThreads)
coefficients_kernel(const A* sum_dz, const A* sum_dz_centred, const A* rstd, const A* scale, int64_t count, bool training,
                    int64_t channels, CoefficientVectors<A, P> to) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= channels) return;
  to.store(k, Coefficients<A>(sum_dz[k], sum_dz_centred[k], rstd[k], scale[k], count, training), sum_dz[k]);
}

// running ← (1 − f)·running + f·batch of a norm's mean and of its variance, which is made unbiased by a correction M / (M − 1).
// f is momentum, or with batches, the number of those seen, this one too, 1 / batches: a cumulative average. bias: of the
// convolution in front, in the mean; or null. R: of the running statistics. In float64, rounded once. Grid: channel_blocks.
template <class A, class R>
__global__ void __launch_bounds__(kThreads)
update_running_kernel(const A* mean, const A* var, const R* bias, const int64_t* batches, double momentum, double correction,
                      int64_t channels, R* running_mean, R* running_var) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= channels) return;
  const double factor = batches == nullptr ? momentum : 1.0 / static_cast<double>(*batches);
  const auto updated = [=](R running, double batch) {
    return static_cast<R>((1 - factor) * static_cast<double>(running) + factor * batch);
  };
  const double of_bias = bias == nullptr ? 0.0 : static_cast<double>(bias[k]);
  running_mean[k] = updated(running_mean[k], mean[k] + of_bias);
  running_var[k] = updated(running_var[k], var[k] * correction);
}

}  // namespace resnet_fused::cuda
