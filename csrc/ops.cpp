// Schemas of the operators. Processor kernels: cpu/; CUDA kernels: cuda/, which has no products of matrices. Fake kernels: resnet_fused/native.py.
//
// Activations are 4-D, dense in channels_last or contiguous, float64, float32, bfloat16 or float16; those of one call
// share dtype, shape and layout. Per-channel vectors are float64 for float64 activations, else float32.
// mask: uint8 [ceil(numel / 8)]; bit i % 8 of byte i / 8 says for element i, in memory order, that !(out <= 0).
// The ReLU is where(z <= 0, 0, z). z = x * scale + shift (+ residual), rounded once, at the store.
#include <torch/csrc/stable/library.h>

// Tests run kernels of other devices under a name of their own.
#if !defined(RESNET_FUSED_NAMESPACE)
#define RESNET_FUSED_NAMESPACE resnet_fused
#endif
#define RESNET_FUSED_DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)

RESNET_FUSED_DEFINE(RESNET_FUSED_NAMESPACE, m) {
  // Mean and biased variance over N, H, W.
  m.def("bn_stats(Tensor x) -> (Tensor mean, Tensor var)");
  // act(z) and its mask (empty unless asked for).
  m.def(
      "bn_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu, bool save_mask)"
      " -> (Tensor out, Tensor mask)");
  m.def("bn_act_(Tensor(a!) x, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> ()");
  // dz = grad where mask; without a mask and with relu the mask is formed again from x; without relu dz = grad.
  // Returns Σ dz, Σ dz (x - mean), and act(z) when asked for (else empty).
  m.def(
      "bn_act_backward_reduce(Tensor grad, Tensor x, Tensor? mask, Tensor mean, Tensor scale, Tensor shift, bool relu,"
      " bool want_activation) -> (Tensor sum_dz, Tensor sum_dz_centred, Tensor activation)");
  // a dz + b (x - mean) + c
  m.def(
      "bn_act_backward(Tensor grad, Tensor x, Tensor? mask, Tensor mean, Tensor scale, Tensor shift, bool relu,"
      " Tensor a, Tensor b, Tensor c) -> Tensor");
  m.def(
      "bn_act_backward_(Tensor(a!) grad, Tensor x, Tensor? mask, Tensor mean, Tensor scale, Tensor shift, bool relu,"
      " Tensor a, Tensor b, Tensor c) -> ()");
  // relu(a + b) and its mask
  m.def("add_relu(Tensor a, Tensor b, bool save_mask) -> (Tensor out, Tensor mask)");
  // grad where mask, else 0; and the same added to acc
  m.def("mask_grad(Tensor grad, Tensor mask) -> Tensor");
  m.def("mask_grad_add_(Tensor(a!) acc, Tensor grad, Tensor mask) -> ()");
  // 3x3, stride 2, padding 1 max pooling of relu(z). index: uint8, the winner's place 3 r + s in its window (the first
  // maximum, the last NaN, compared as rounded), 255 where !(winner > 0) and not NaN.
  m.def("bn_relu_maxpool(Tensor x, Tensor scale, Tensor shift) -> (Tensor out, Tensor index)");
  m.def(
      "bn_relu_maxpool_backward_reduce(Tensor grad, Tensor index, Tensor x, Tensor mean)"
      " -> (Tensor sum_dz, Tensor sum_dz_centred)");
  m.def(
      "bn_relu_maxpool_backward(Tensor grad, Tensor index, Tensor x, Tensor mean, Tensor a, Tensor b, Tensor c)"
      " -> Tensor");
  // The products take channels_last activations as matrices [N*H*W, C], and weights [n_out, n_in] with any strides.
  // Row m = (n, p, q) of a product reads pixel (n, p * sh, q * sw). Sums are formed in the accumulation type.
  //
  // act(scale ((x where mask) - centre) weightᵀ + scale2 (x2 - centre2) weight2ᵀ + shift + (residual where residual_mask)),
  // rounded once, and its mask (empty unless asked for). mask: with stride 1 only. centre [n_in]: not for 16-bit
  // activations, which could not hold the difference. weight2_low, without scales: what weight2 was rounded by.
  m.def(
      "pointwise(Tensor x, Tensor? mask, Tensor weight, int[2] stride, Tensor? scale, Tensor? x2, Tensor? weight2,"
      " int[2] stride2, Tensor? scale2, Tensor? shift, Tensor? residual, Tensor? residual_mask, bool relu,"
      " bool save_mask, Tensor? centre=None, Tensor? centre2=None, Tensor? weight2_low=None)"
      " -> (Tensor out, Tensor mask)");
  // acc[:, :, ::sh, ::sw] += ((x where mask) - centre) weightᵀ + (x2[:, :, ::sh, ::sw] - centre2) weight2ᵀ + shift,
  // rounded once.
  m.def(
      "pointwise_add_(Tensor(a!) acc, Tensor x, Tensor? mask, Tensor weight, Tensor? x2, Tensor? weight2,"
      " int[2] stride, Tensor? shift, Tensor? centre=None, Tensor? centre2=None, Tensor? weight2_low=None) -> ()");
  // Σ_m (dy where mask)[m, k] (x[m, c] - centre[c]) in float64 (float32 for 16-bit activations), and Σ_m of the former.
  m.def(
      "pointwise_wgrad(Tensor dy, Tensor? mask, Tensor x, Tensor? centre, int[2] stride)"
      " -> (Tensor dweight, Tensor sum_dy)");
  // Mean and biased covariance of the rows, in float64.
  m.def("gram(Tensor x, int[2] stride) -> (Tensor mean, Tensor cov)");
  // Convolutions of half precision with a filter [K, C, R, R], R = 1 or 3, padding R / 2 and one stride, C and K multiples
  // of 8, activations and filter dense in channels_last. x stands for act(x * x_scale + x_shift), rounded, where these are
  // given; borders are 0 behind it. Sums are formed in float32. CUDA only.
  //
  // act(conv * scale + shift + residual), rounded once, and its mask (empty unless asked for).
  m.def(
      "conv_bn_act(Tensor x, Tensor? x_scale, Tensor? x_shift, bool x_relu, Tensor weight, int stride, Tensor? scale,"
      " Tensor? shift, Tensor? residual, bool relu, bool save_mask) -> (Tensor out, Tensor mask)");
  // conv, and mean and biased variance of its channels as it is stored.
  m.def(
      "conv_stats(Tensor x, Tensor? x_scale, Tensor? x_shift, bool x_relu, Tensor weight, int stride)"
      " -> (Tensor out, Tensor mean, Tensor var)");
  // Batch norms with running statistics folded into the convolutions in front of them, all in one launch:
  // weight * s in channels_last and (bias - mean) * s + beta, s = gamma / sqrt(var + eps), in float64, rounded once to the
  // dtype. Parameters share a dtype, which is that or float32; an empty bias, gamma or beta is none. CUDA only.
  m.def(
      "fold_batch_norms(Tensor[] weights, Tensor[] biases, Tensor[] gammas, Tensor[] betas, Tensor[] means, Tensor[] vars,"
      " float[] eps, ScalarType dtype) -> (Tensor[] weights, Tensor[] biases)");
  // The algebra around batch norms, in few launches (resnet_fused/backends/algebra.py has the same in formulas). Vectors are
  // [K] or [C], filters [K, C] in the dtype of the activations. "acc" is the accumulation dtype, "moments" float32 for half
  // precision and else float64. CUDA only.
  //
  // mean, var (acc or moments), gamma, beta (any) -> rstd, scale, shift in acc; and mean and var in it, or empty where they are.
  m.def(
      "norm_vectors(Tensor mean, Tensor var, Tensor gamma, Tensor beta, float eps, ScalarType acc)"
      " -> (Tensor mean, Tensor var, Tensor rstd, Tensor scale, Tensor shift)");
  // b, c in acc, and the gradients of gamma and beta in dtype.
  m.def(
      "norm_gradients(Tensor sum_dz, Tensor sum_dz_centred, Tensor rstd, Tensor scale, int count, bool training,"
      " ScalarType dtype) -> (Tensor b, Tensor c, Tensor dgamma, Tensor dbeta)");
  // running <- (1 - f) running + f batch for the mean, with a convolution's bias in it, and for correction times the variance;
  // f is momentum, or 1 / batches, a cumulative average.
  m.def(
      "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor? bias,"
      " Tensor? batches, float momentum, float correction) -> ()");
  // mean [C] and cov [C, C] in float64 or moments -> mean and var of the outputs, bool where they cannot be trusted, and the
  // moments packed [C (C + 3) / 2].
  m.def(
      "through_covariance(Tensor weight, Tensor mean, Tensor cov, float unit, float limit)"
      " -> (Tensor mean, Tensor var, Tensor flagged, Tensor moments)");
  // t [K, C]: dzᵀ (A - mean), without moments (frozen statistics) dzᵀ A. dweight: empty without weight_dtype.
  m.def(
      "row_gradients(Tensor t, Tensor weight, Tensor? moments, Tensor sum_dz, Tensor mean, Tensor rstd, Tensor scale,"
      " int count, ScalarType norm_dtype, ScalarType? weight_dtype)"
      " -> (Tensor b, Tensor c, Tensor dgamma, Tensor dbeta, Tensor mean_dz, Tensor scaled, Tensor dweight)");
  // Wᵀ diag(b) W as it is multiplied; in half precision also what it was rounded by, and the constant -mean_dzᵀ scaled -
  // mean_aᵀ (high + low) [C], else these are empty; and mean_a [C] in acc.
  m.def(
      "coupling(Tensor weight, Tensor b, Tensor moments, Tensor scaled, Tensor mean_dz)"
      " -> (Tensor high, Tensor low, Tensor shift, Tensor mean_a)");
}
