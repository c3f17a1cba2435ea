// Operands of products of matrices, as the operators get and check them.
#pragma once
#include <algorithm>
#include <array>
#include <new>

#include "driver.h"

namespace resnet_fused {

using Stride = std::vector<int64_t>;
using Shape = std::array<i64, 4>;

constexpr i64 kGrainProducts = 1 << 19;  // multiplications below which a second thread does not pay

inline i64 divide_up(i64 n, i64 by) { return (n + by - 1) / by; }
inline i64 round_up(i64 n, i64 to) { return divide_up(n, to) * to; }

// Uninitialised memory on a cache line's border.
struct Memory {
  explicit Memory(i64 bytes) : p(::operator new(std::max<i64>(bytes, 1), std::align_val_t{64})) {}
  ~Memory() { ::operator delete(p, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* p;
};

inline void check_layout(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(dense(t, true), op, ": ", name, ": expected a tensor dense in channels_last, got shape ",
                  shape_string(t.sizes()), " with strides ", shape_string(t.strides()));
}

// The first activation; it sets the dtype of all.
inline TiledActivations first_of(const char* op, const char* name, const Tensor& x) {
  TiledActivations t(op, name, x);
  check_layout(op, name, x);
  return t;
}

// Another activation of that shape; a size of -1 may be any.
inline const void* activation(const TiledActivations& like, const char* name, const Tensor& t, const Shape& shape) {
  like.check_type(name, t, like.scalar_type);
  bool same = t.dim() == 4;
  Shape expected = shape;
  for (int i = 0; same && i < 4; ++i) {
    if (shape[i] < 0) expected[i] = t.size(i);
    same = t.size(i) == expected[i];
  }
  STD_TORCH_CHECK(same, like.op, ": ", name, ": expected shape ", shape_string({expected.data(), 4}),
                  " (-1: any size), got ", shape_string(t.sizes()));
  check_layout(like.op, name, t);
  return t.const_data_ptr();
}

inline void check_stride(const char* op, const char* name, const Stride& stride) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": ", name,
                  ": expected two positive numbers, got ", shape_string({stride.data(), stride.size()}));
}

inline void check_alone(const char* op, const char* name, const Optional& t, const char* with, const Optional& other) {
  STD_TORCH_CHECK(!t.has_value() || other.has_value(), op, ": ", name, ": expected ", with, " beside it, got none");
}

inline i64 strided(i64 size, i64 stride) { return divide_up(size, stride); }

inline Rows rows_of(i64 h, i64 w, const Stride& stride) {
  const i64 p = strided(h, stride[0]), q = strided(w, stride[1]);
  return {stride[0] == 1 && stride[1] == 1, p * q, q, h * w, w, stride[0], stride[1]};
}

inline Operand operand(const Tensor& t, const Stride& stride) {
  Operand r{};
  r.x = t.const_data_ptr();
  r.k = t.size(1);
  r.rows = rows_of(t.size(2), t.size(3), stride);
  return r;
}

inline void set_mask(Operand& to, const TiledActivations& like, const Optional& mask, const Tensor& of) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(to.rows.dense, like.op, ": mask: expected stride [1, 1] with a mask, got ",
                  shape_string({std::array<i64, 2>{to.rows.sh, to.rows.sw}.data(), 2}));
  to.mask_bytes = divide_up(of.numel(), 8);
  to.mask = like.mask("mask", *mask, of.numel());
}

inline void set_centre(Operand& to, const TiledActivations& like, const char* name, const Optional& centre) {
  if (!centre.has_value()) return;
  STD_TORCH_CHECK(like.element_size > 2, like.op, ": ", name, ": expected float32 or float64 activations, got ",
                  torch::headeronly::toString(like.scalar_type));
  to.centre = like.vector(name, *centre, to.k);
}

}  // namespace resnet_fused
