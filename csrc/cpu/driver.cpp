// Threads, scratch memory and the merge of tiles.
#include "driver.h"

#include <algorithm>
#include <limits>

#include "isa.h"

namespace resnet_fused {
namespace {

constexpr i64 kChunk = 4096;          // elements; a multiple of 64, so that chunks share no byte of a mask
constexpr i64 kGrainElements = 32768;  // below this a second thread does not pay

// What the kernels of the three instruction sets differ in is only how they were compiled.
const Table* tables() {
  switch (selected_isa()) {
#if defined(RESNET_FUSED_X86)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return avx512::kTables;
    case Isa::kAvx2: return avx2::kTables;
#endif
    default: return baseline::kTables;
  }
}

const Products* all_products() {
  switch (selected_isa()) {
#if defined(RESNET_FUSED_X86)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return avx512::kProducts;
    case Isa::kAvx2: return avx2::kProducts;
#endif
    default: return baseline::kProducts;
  }
}

template <class A>
void merge_sums(const Geometry& g, const A* sum1, const A* sum2, A* out1, A* out2, i64 begin, i64 end) {
  std::vector<double> total(2 * (end - begin), 0.0);
  for (i64 part = 0; part < g.parts; ++part)
    for (i64 c = begin; c < end; ++c) {
      total[2 * (c - begin)] += sum1[part * g.c + c];
      total[2 * (c - begin) + 1] += sum2[part * g.c + c];
    }
  for (i64 c = begin; c < end; ++c) {
    out1[c] = static_cast<A>(total[2 * (c - begin)]);
    out2[c] = static_cast<A>(total[2 * (c - begin) + 1]);
  }
}

// Chan's formula over all tiles at once: the mean first, then every tile's squares about it.
template <class A>
void merge_moments(
    const Geometry& g, const A* shift, const A* sum1, const A* sum2, A* mean, A* var, i64 begin, i64 end) {
  const double count = static_cast<double>(g.rows);
  const i64 n_channels = end - begin;
  std::vector<double> m(n_channels, 0.0), v(n_channels, 0.0);
  const auto rows = [&](i64 part) {
    return static_cast<double>(std::min(g.tile_rows, g.rows - part * g.tile_rows));
  };
  // The correction of a tile mean that is not finite is not a number: the tile mean alone is the answer.
  const auto correction = [](double k, double s) { return k - k == 0.0 ? s : 0.0; };
  for (i64 part = 0; part < g.parts; ++part) {
    const i64 at = part * g.c + begin;
    const double n = rows(part);
    for (i64 c = 0; c < n_channels; ++c) m[c] += shift[at + c] * n + correction(shift[at + c], sum1[at + c]);
  }
  for (i64 c = 0; c < n_channels; ++c) m[c] /= count;
  for (i64 part = 0; part < g.parts; ++part) {
    const i64 at = part * g.c + begin;
    const double n = rows(part), inverse = 1.0 / n;
    for (i64 c = 0; c < n_channels; ++c) {
      const double s = sum1[at + c], d = (shift[at + c] - m[c]) + s * inverse;
      v[c] += (sum2[at + c] - s * s * inverse) + n * d * d;
    }
  }
  for (i64 c = begin; c < end; ++c) {
    mean[c] = static_cast<A>(m[c - begin]);
    const double biased = v[c - begin] / count;
    var[c] = static_cast<A>(biased < 0.0 ? 0.0 : biased);
  }
}

template <class F>
std::tuple<Tensor, Tensor> merge(const TiledActivations& t, const F& f) {
  Tensor first = t.new_channels(), second = t.new_channels();
  void *to1 = first.mutable_data_ptr(), *to2 = second.mutable_data_ptr();
  if (t.numel > 0)
    torch::stable::parallel_for(0, t.g.c, std::max<i64>(16, 8192 / t.g.parts), [&](i64 b, i64 e) {
      if (t.dtype == kF64) f(static_cast<double*>(to1), static_cast<double*>(to2), b, e);
      else f(static_cast<float*>(to1), static_cast<float*>(to2), b, e);
    });
  return {first, second};
}

// The sums of nothing are 0, its moments NaN.
template <class A>
void fill(const Tensor& t, i64 n, A value) {
  std::fill_n(static_cast<A*>(t.mutable_data_ptr()), n, value);
}

void fill_channels(const TiledActivations& t, const Tensor& to, double value) {
  if (t.dtype == kF64) fill<double>(to, t.g.c, value);
  else fill<float>(to, t.g.c, static_cast<float>(value));
}

}  // namespace

const Table& kernels(Dtype dtype) {
  static const Table* const chosen = tables();
  return chosen[dtype];
}

const Products& products(Dtype dtype) {
  static const Products* const chosen = all_products();
#if defined(RESNET_FUSED_X86)
  static const bool dot = selected_isa() == Isa::kAvx512Bf16;
  if (dot && dtype == kBF16) return avx512_bf16::kProductsBF16;
#endif
  return chosen[dtype];
}

void run_elements(const TiledActivations& t, RangeKernel kernel, const Args& args) {
  const i64 chunks = (t.numel + kChunk - 1) / kChunk;
  if (chunks == 0) return;
  torch::stable::parallel_for(0, chunks, kGrainElements / kChunk, [&](i64 b, i64 e) {
    kernel(args, b * kChunk, std::min(e * kChunk, t.numel), nullptr);
  });
}

void run_units(const TiledActivations& t, RangeKernel kernel, const Args& args, i64 units, i64 elements, i64 scratch) {
  if (t.numel == 0 || units == 0) return;
  const i64 grain = std::max<i64>(1, kGrainElements / std::max<i64>(1, elements));
  torch::stable::parallel_for(0, units, grain, [&](i64 b, i64 e) {
    const std::unique_ptr<char[]> memory(new char[scratch * t.acc_size]);
    kernel(args, b, e, memory.get());
  });
}

Partials::Partials(const TiledActivations& t, int arrays, Args& args) {
  if (t.numel == 0) {
    size_ = 0;
    return;
  }
  size_ = args.g.parts * args.g.c;
  data_.reset(new char[arrays * size_ * t.acc_size]);
  const i64 step = size_ * t.acc_size;
  args.sum1 = data_.get();
  args.sum2 = data_.get() + step;
  args.tile_shift = arrays > 2 ? data_.get() + 2 * step : nullptr;
}

std::tuple<Tensor, Tensor> Partials::sums(const TiledActivations& t) const {
  // Tiles may have been cut anew for this reduction.
  Geometry g = t.g;
  if (t.numel > 0) g.parts = size_ / g.c;
  auto result = merge(t, [&](auto* out1, auto* out2, i64 b, i64 e) {
    const auto* sum = reinterpret_cast<decltype(out1)>(data_.get());
    merge_sums(g, sum, sum + size_, out1, out2, b, e);
  });
  if (t.numel == 0) {
    fill_channels(t, std::get<0>(result), 0.0);
    fill_channels(t, std::get<1>(result), 0.0);
  }
  return result;
}

std::tuple<Tensor, Tensor> Partials::moments(const TiledActivations& t) const {
  auto result = merge(t, [&](auto* out1, auto* out2, i64 b, i64 e) {
    const auto* sum = reinterpret_cast<decltype(out1)>(data_.get());
    merge_moments(t.g, sum + 2 * size_, sum, sum + size_, out1, out2, b, e);
  });
  if (t.numel == 0) {
    fill_channels(t, std::get<0>(result), std::numeric_limits<double>::quiet_NaN());
    fill_channels(t, std::get<1>(result), std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

}  // namespace resnet_fused
