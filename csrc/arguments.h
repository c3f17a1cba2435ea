// Arguments of the operators, as every library of kernels gets and checks them. Errors name the operator, the argument, what
// was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

namespace resnet_fused {

typedef int64_t i64;

using Optional = std::optional<torch::stable::Tensor>;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a tensor is where this library's kernels run, and what a user calls that place.
#if defined(RESNET_FUSED_ON_CUDA)
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
constexpr const char* kHere = "a CUDA device";
#else
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
constexpr const char* kHere = "the CPU";
#endif

std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes);
// Whether a 4-D tensor is dense in channels_last, or in contiguous; strides of dimensions of size 1 do not count.
bool dense(const Tensor& t, bool channels_last);

bool is_half(ScalarType type);
// In which sums over activations of a dtype are formed.
ScalarType acc_of(ScalarType type);

// That a tensor is on the device of the first one, and of a dtype.
void check_beside(const char* op, const char* name, const Tensor& t, const Tensor& first, ScalarType type);

// An operator's activations: the first one sets device, dtype, shape and layout for the other arguments.
struct Activations {
  Activations(const char* op, const char* name, const Tensor& x);

  // Another tensor of that dtype on the same device.
  void check_type(const char* name, const Tensor& t, ScalarType type) const;
  // Another activation of the same dtype, shape and layout.
  const void* like(const char* name, const Tensor& t) const;
  // A vector [n] in the accumulation dtype; n < 0: [C].
  const void* vector(const char* name, const Tensor& t, i64 n = -1) const;
  // One bit for each of so many elements; elements < 0: of x.
  const uint8_t* mask(const char* name, const Tensor& t, i64 elements = -1) const;
  // A pooled activation or its indices [N, C, (H-1)/2+1, (W-1)/2+1] in this layout.
  const void* pooled(const char* name, const Tensor& t, ScalarType dtype) const;

  Tensor new_pooled(ScalarType dtype) const;
  Tensor new_channels() const { return torch::stable::new_empty(x, {&c, 1}, acc_type); }
  Tensor new_bytes(i64 size) const { return torch::stable::new_empty(x, {&size, 1}, ScalarType::Byte); }
  Tensor new_mask(bool wanted) const { return new_bytes(wanted ? mask_bytes() : 0); }
  i64 mask_bytes() const { return (numel + 7) / 8; }
  i64 rows() const { return n * h * w; }

  const char* op;
  Tensor x;
  ScalarType scalar_type, acc_type;
  i64 numel, element_size, acc_size;
  i64 n, c, h, w;
  bool channels_last;
};

}  // namespace resnet_fused
