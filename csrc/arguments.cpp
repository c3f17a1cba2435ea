// Checks of arguments and the memory layout of activations.
#include "arguments.h"

namespace resnet_fused {
namespace {

using torch::headeronly::toString;

// Dense in the order given, outermost first; strides of dimensions of size 1 do not count.
bool dense_in(const Tensor& t, const int (&order)[4]) {
  i64 expected = 1;
  for (int k = 3; k >= 0; --k) {
    const i64 size = t.size(order[k]);
    if (size != 1 && t.stride(order[k]) != expected) return false;
    expected *= size;
  }
  return true;
}

bool has_shape(const Tensor& t, const i64 (&shape)[4]) {
  bool same = t.dim() == 4;
  for (int i = 0; same && i < 4; ++i) same = t.size(i) == shape[i];
  return same;
}

i64 pooled_size(i64 size) { return size == 0 ? 0 : (size - 1) / 2 + 1; }

}  // namespace

std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

bool dense(const Tensor& t, bool channels_last) {
  if (t.numel() == 0) return true;
  return channels_last ? dense_in(t, {0, 2, 3, 1}) : dense_in(t, {0, 1, 2, 3});
}

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

ScalarType acc_of(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_beside(const char* op, const char* name, const Tensor& t, const Tensor& first, ScalarType type) {
  STD_TORCH_CHECK(is_here(t) && t.get_device_index() == first.get_device_index(), op, ": ", name,
                  ": expected a tensor on ", kHere, ", the one of the first tensor");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, ": expected ", toString(type), ", got ",
                  toString(t.scalar_type()));
}

Activations::Activations(const char* op_, const char* name, const Tensor& x_) : op(op_), x(x_) {
  STD_TORCH_CHECK(is_here(x), op, ": ", name, ": expected a tensor on ", kHere);
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, ": expected [N, C, H, W], got ", x.dim(), " dimensions");
  scalar_type = x.scalar_type();
  STD_TORCH_CHECK(is_half(scalar_type) || scalar_type == ScalarType::Double || scalar_type == ScalarType::Float, op, ": ", name,
                  ": expected float64, float32, bfloat16 or float16, got ", toString(scalar_type));
  acc_type = acc_of(scalar_type);
  acc_size = acc_type == ScalarType::Double ? 8 : 4;
  element_size = is_half(scalar_type) ? 2 : acc_size;
  numel = x.numel();
  n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  channels_last = dense(x, true);
  STD_TORCH_CHECK(channels_last || dense(x, false), op, ": ", name,
                  ": expected a tensor dense in channels_last or contiguous, got shape ", shape_string(x.sizes()),
                  " with strides ", shape_string(x.strides()));
}

void Activations::check_type(const char* name, const Tensor& t, ScalarType type) const {
  check_beside(op, name, t, x, type);
}

const void* Activations::like(const char* name, const Tensor& t) const {
  check_type(name, t, scalar_type);
  STD_TORCH_CHECK(has_shape(t, {n, c, h, w}), op, ": ", name, ": expected shape ", shape_string(x.sizes()), ", got ",
                  shape_string(t.sizes()));
  STD_TORCH_CHECK(dense(t, channels_last), op, ": ", name, ": expected strides ", shape_string(x.strides()), ", got ",
                  shape_string(t.strides()));
  return t.const_data_ptr();
}

const void* Activations::vector(const char* name, const Tensor& t, i64 size) const {
  if (size < 0) size = c;
  check_type(name, t, acc_type);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, ": expected shape [", size, "], got ",
                  shape_string(t.sizes()));
  STD_TORCH_CHECK(size <= 1 || t.stride(0) == 1, op, ": ", name, ": expected stride 1, got ", t.stride(0));
  return t.const_data_ptr();
}

const uint8_t* Activations::mask(const char* name, const Tensor& t, i64 elements) const {
  const i64 bytes = ((elements < 0 ? numel : elements) + 7) / 8;
  check_type(name, t, ScalarType::Byte);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == bytes && t.is_contiguous(), op, ": ", name,
                  ": expected a contiguous tensor of shape [", bytes, "], one bit per element, got ",
                  shape_string(t.sizes()));
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

const void* Activations::pooled(const char* name, const Tensor& t, ScalarType expected) const {
  check_type(name, t, expected);
  const i64 size[] = {n, c, pooled_size(h), pooled_size(w)};
  STD_TORCH_CHECK(has_shape(t, size), op, ": ", name, ": expected shape ", shape_string({size, 4}), ", got ",
                  shape_string(t.sizes()));
  STD_TORCH_CHECK(dense(t, channels_last), op, ": ", name, ": expected a tensor dense in ",
                  channels_last ? "channels_last" : "contiguous", " like the input, got strides ",
                  shape_string(t.strides()));
  return t.const_data_ptr();
}

Tensor Activations::new_pooled(ScalarType type) const {
  const i64 size[] = {n, c, pooled_size(h), pooled_size(w)};
  // An ambiguous layout (C == 1, or one pixel) is called contiguous, as PyTorch does.
  const bool last = numel > 0 && channels_last && !x.is_contiguous();
  const auto format = last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({size, 4}, type, std::nullopt, x.device(), std::nullopt, format);
}

}  // namespace resnet_fused
