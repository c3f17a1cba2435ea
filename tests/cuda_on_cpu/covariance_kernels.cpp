// The kernels of norm.cuh and covariance.cuh as functions of C, for tests.
#include "calls.h"

#include "covariance.cuh"

using namespace resnet_fused::cuda;

namespace {

template <class T>
using OfMoments = std::conditional_t<sizeof(T) == 2, float, double>;

template <class T>
struct Type {
  using type = T;
};

// Calls body with T and the type of parameters: T itself, or for half precision float32.
template <class Body>
const char* typed(int dtype, int parameters, Body body) {
  return calls::typed<0, 1, 2, 3>(dtype, [&]<class T>(T*) {
    if constexpr (sizeof(T) == 2) {
      if (parameters == 1) return body(Type<T>(), Type<float>());
    }
    if (parameters != dtype) throw std::invalid_argument("dtypes");
    body(Type<T>(), Type<T>());
  });
}

// Calls body with double if wide, else with Narrow, which double may be.
template <class Narrow, class Body>
void widened(bool wide, Body body) {
  if (wide || std::is_same_v<Narrow, double>) return body(Type<double>());
  if constexpr (!std::is_same_v<Narrow, double>) body(Type<Narrow>());
}

template <class T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}

template <class T>
T* to(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

extern "C" {

const char* scale_shift(int dtype, int parameters, int wide, const void* mean, const void* var, const void* gamma,
                        const void* beta, double eps, int channels, void* mean_to, void* var_to, void* rstd, void* scale,
                        void* shift, unsigned seed) {
  return typed(dtype, parameters, [&]<class T, class P>(Type<T>, Type<P>) {
    using A = Accumulate<T>;
    widened<A>(wide, [&]<class S>(Type<S>) {
      const NormVectors<A> vectors{to<A>(mean_to), to<A>(var_to), to<A>(rstd), to<A>(scale), to<A>(shift)};
      emulation::launch(channel_blocks(channels), kThreads, seed, scale_shift_kernel<S, P, A>, in<S>(mean), in<S>(var),
                        in<P>(gamma), in<P>(beta), eps, int64_t{channels}, vectors);
    });
  });
}

const char* coefficients(int dtype, int parameters, const void* sum_dz, const void* sum_dz_centred, const void* rstd,
                         const void* scale, int count, int training, int channels, void* b, void* c, void* dgamma,
                         void* dbeta, unsigned seed) {
  return typed(dtype, parameters, [&]<class T, class P>(Type<T>, Type<P>) {
    using A = Accumulate<T>;
    const CoefficientVectors<A, P> vectors{to<A>(b), to<A>(c), to<P>(dgamma), to<P>(dbeta)};
    emulation::launch(channel_blocks(channels), kThreads, seed, coefficients_kernel<A, P>, in<A>(sum_dz),
                      in<A>(sum_dz_centred), in<A>(rstd), in<A>(scale), int64_t{count}, training != 0,
                      int64_t{channels}, vectors);
  });
}

const char* through_covariance(int dtype, int wide, const void* weight, const void* mean_a, const void* cov, int outputs,
                               int channels, double unit, double limit, void* mean, void* var, uint8_t* flagged,
                               void* packed, unsigned seed) {
  return calls::typed<0, 1, 2, 3>(dtype, [&]<class T>(T*) {
    using D = OfMoments<T>;
    widened<D>(wide, [&]<class S>(Type<S>) {
      emulation::launch(row_blocks(outputs), kThreads, seed, through_covariance_kernel<T, S, D>, in<T>(weight),
                        in<S>(mean_a), in<S>(cov), outputs, channels, unit, limit, to<D>(mean), to<D>(var), flagged,
                        to<D>(packed));
    });
  });
}

// wide: t is in double. filter: the dtype of dweight, that of the parameters or dtype.
const char* covariance_rows(int dtype, int parameters, int filter, int wide, int columns, const void* t,
                            const void* weight, const void* packed, const void* sum_dz, const void* mean,
                            const void* rstd, const void* scale, int count, int outputs, int channels, void* b, void* c,
                            void* dgamma, void* dbeta, void* mean_dz, void* dweight, void* scaled, unsigned seed) {
  return typed(dtype, parameters, [&]<class T, class P>(Type<T>, Type<P>) {
    using A = Accumulate<T>;
    using D = OfMoments<T>;
    const dim3 grid(row_blocks(outputs), columns > 0 ? columns : column_blocks(outputs, channels));
    const auto run = [&]<class W>(Type<W>) {
      widened<D>(wide, [&]<class U>(Type<U>) {
        const CovarianceRows<T, D, U, P, W> rows{
            in<U>(t), in<T>(weight), in<D>(packed), in<A>(sum_dz), in<A>(mean), in<A>(rstd), in<A>(scale), count,
            outputs, channels, {to<A>(b), to<A>(c), to<P>(dgamma), to<P>(dbeta)}, to<A>(mean_dz), to<W>(dweight),
            to<T>(scaled)};
        emulation::launch(grid, kThreads, seed, covariance_rows_kernel<T, D, U, P, W>, rows);
      });
    };
    if (filter == parameters) return run(Type<P>());
    run(Type<T>());
  });
}

const char* coupling(int dtype, const void* weight, const void* b, const void* packed, int outputs, int channels,
                     void* high, void* low, void* mean_to, unsigned seed) {
  return calls::typed<0, 1, 2, 3>(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    using D = OfMoments<T>;
    emulation::launch(dim3(coupling_blocks_x(channels), coupling_blocks_y(channels)), kThreads, seed,
                      coupling_kernel<T, D>, in<T>(weight), in<A>(b), in<D>(packed), outputs, channels, to<T>(high),
                      to<T>(low), to<A>(mean_to));
  });
}

const char* coupling_shift(int dtype, const void* scaled, const void* mean_dz, const void* high, const void* low,
                           const void* mean_a, int outputs, int channels, void* constant, unsigned seed) {
  return calls::typed<0, 1, 2, 3>(dtype, [&]<class T>(T*) {
    using A = Accumulate<T>;
    emulation::launch(coupling_shift_blocks(channels), kThreads, seed, coupling_shift_kernel<T>, in<T>(scaled),
                      in<A>(mean_dz), in<T>(high), in<T>(low), in<A>(mean_a), outputs, channels, to<A>(constant));
  });
}
}
