// Checks of arguments and the memory layout of activations.
#include "driver.h"

#include <cstring>

namespace resnet_fused {
namespace {

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

constexpr i64 kTileBytes = 128 * 1024;  // stays in a core's second-level cache for bn_stats' second pass
constexpr i64 kTileElements = 32 * 1024;
constexpr i64 kChannelElements = 8 * 1024;  // contiguous: one lane of the sums then adds 512 numbers, in groups of 4
constexpr i64 kNarrow = 64;                 // channels_last: a tile then has at most 512 rows

i64 gcd(i64 a, i64 b) { return b == 0 ? a : gcd(b, a % b); }

void cut(Geometry& g, i64 element_size) {
  const i64 fit = std::min(kTileBytes / element_size, kTileElements);
  if (g.channels_last) {
    // Several pixels to a row: narrow rows are lengthened, and up to 128 channels a row is a multiple of a block.
    g.repeat = g.c < 128 ? kBlock / gcd(g.c, kBlock) : 1;
    while (g.repeat * g.c < kNarrow) g.repeat *= 2;
    g.width = g.repeat * g.c;
    const i64 wanted = std::max<i64>(fit / g.c, 32);
    g.tile_rows = (wanted + 4 * g.repeat - 1) / (4 * g.repeat) * 4 * g.repeat;
  } else {
    g.repeat = 1;
    g.width = g.c;
    g.tile_rows = std::min(fit, kChannelElements);
  }
  g.parts = (g.rows + g.tile_rows - 1) / g.tile_rows;
  g.tiles = g.channels_last ? g.parts : g.parts * g.c;
}

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

Activations::Activations(const char* op_, const char* name, const Tensor& x_) : op(op_), x(x_) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, ": expected [N, C, H, W], got ", x.dim(), " dimensions");
  scalar_type = x.scalar_type();
  switch (scalar_type) {
    case ScalarType::Double: dtype = kF64; break;
    case ScalarType::Float: dtype = kF32; break;
    case ScalarType::BFloat16: dtype = kBF16; break;
    case ScalarType::Half: dtype = kF16; break;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, ": expected float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(scalar_type));
  }
  acc_type = dtype == kF64 ? ScalarType::Double : ScalarType::Float;
  acc_size = dtype == kF64 ? 8 : 4;
  element_size = dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2;
  numel = x.numel();
  g.n = x.size(0), g.c = x.size(1), g.h = x.size(2), g.w = x.size(3), g.hw = g.h * g.w, g.rows = g.n * g.hw;
  g.channels_last = dense(x, true);
  STD_TORCH_CHECK(g.channels_last || dense(x, false), op, ": ", name,
                  ": expected a tensor dense in channels_last or contiguous, got shape ", shape_string(x.sizes()),
                  " with strides ", shape_string(x.strides()));
  if (numel > 0) cut(g, element_size);
}

const void* Activations::like(const char* name, const Tensor& t) const {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == scalar_type, op, ": ", name, ": expected ",
                  torch::headeronly::toString(scalar_type), ", got ", torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == 4;
  for (int i = 0; same && i < 4; ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, ": expected shape ", shape_string(x.sizes()), ", got ", shape_string(t.sizes()));
  STD_TORCH_CHECK(dense(t, g.channels_last), op, ": ", name, ": expected strides ", shape_string(x.strides()), ", got ",
                  shape_string(t.strides()));
  return t.const_data_ptr();
}

const void* Activations::channels(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == acc_type, op, ": ", name, ": expected ", torch::headeronly::toString(acc_type),
                  " for activations of ", torch::headeronly::toString(scalar_type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == g.c, op, ": ", name, ": expected shape [", g.c, "], got ",
                  shape_string(t.sizes()));
  STD_TORCH_CHECK(g.c <= 1 || t.stride(0) == 1, op, ": ", name, ": expected stride 1, got ", t.stride(0));
  const char* from = static_cast<const char*>(t.const_data_ptr());
  if (numel == 0 || !g.channels_last) return from;
  const i64 length = (g.width + kBlock) * acc_size, period = g.c * acc_size;
  periodic_.emplace_back(new char[length]);
  char* to = periodic_.back().get();
  for (i64 at = 0; at < length; at += period) std::memcpy(to + at, from, std::min(period, length - at));
  return to;
}

const uint8_t* Activations::mask(const char* name, const Tensor& t) const {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Byte, op, ": ", name, ": expected uint8 on the CPU, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == mask_bytes() && t.is_contiguous(), op, ": ", name,
                  ": expected a contiguous tensor of shape [", mask_bytes(), "], one bit per element, got ",
                  shape_string(t.sizes()));
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

const void* Activations::pooled(const char* name, const Tensor& t, ScalarType expected) const {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == expected, op, ": ", name, ": expected ",
                  torch::headeronly::toString(expected), " on the CPU, got ",
                  torch::headeronly::toString(t.scalar_type()));
  const i64 size[] = {g.n, g.c, g.h == 0 ? 0 : (g.h - 1) / 2 + 1, g.w == 0 ? 0 : (g.w - 1) / 2 + 1};
  bool same = t.dim() == 4;
  for (int i = 0; same && i < 4; ++i) same = t.size(i) == size[i];
  STD_TORCH_CHECK(same, op, ": ", name, ": expected shape ", shape_string({size, 4}), ", got ", shape_string(t.sizes()));
  STD_TORCH_CHECK(dense(t, g.channels_last), op, ": ", name, ": expected a tensor dense in ",
                  g.channels_last ? "channels_last" : "contiguous", " like the input, got strides ",
                  shape_string(t.strides()));
  return t.const_data_ptr();
}

Tensor Activations::new_pooled(ScalarType type) const {
  const i64 size[] = {g.n, g.c, g.h == 0 ? 0 : (g.h - 1) / 2 + 1, g.w == 0 ? 0 : (g.w - 1) / 2 + 1};
  // An ambiguous layout (C == 1, or one pixel) is called contiguous, as PyTorch does.
  const bool last = numel > 0 && g.channels_last && !x.is_contiguous();
  const auto format = last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({size, 4}, type, std::nullopt, std::nullopt, std::nullopt, format);
}

Tensor Activations::new_channels() const { return torch::stable::new_empty(x, {&g.c, 1}, acc_type); }

Tensor Activations::new_bytes(i64 n) const { return torch::stable::new_empty(x, {&n, 1}, ScalarType::Byte); }

}  // namespace resnet_fused
