// The convolution kernel as functions of C, for tests: it runs on a processor. A function returns null, or says what
// went wrong.
#include "calls.h"

#include "conv/implicit_gemm.cuh"

using namespace resnet_fused::cuda;

namespace {

template <class Body>
void filtered(int size, Body body) {
  switch (size) {
    case 1: return body(std::integral_constant<int, 1>());
    case 3: return body(std::integral_constant<int, 3>());
    default: throw std::invalid_argument("size of the filter");
  }
}

template <class Body>
void tiled(int tile, Body body) {
  switch (tile) {
    case 0: return body(static_cast<ConvTile64x64*>(nullptr));
    case 1: return body(static_cast<ConvTile128x64*>(nullptr));
    case 2: return body(static_cast<ConvTile128x128*>(nullptr));
    default: throw std::invalid_argument("tile");
  }
}

}  // namespace

extern "C" {

struct Conv {
  int n, h, w, c, k, stride, size, tile;
  unsigned seed;
};

const char* conv(int dtype, Conv of, const void* x, const void* x_scale, const void* x_shift, int x_relu,
                 const void* filter, const void* scale, const void* shift, const void* residual, int relu, void* out,
                 uint8_t* mask, void* partials) {
  const ConvShape shape{of.n, of.h, of.w, of.c, of.k, of.stride};
  const ConvPrologue prologue{static_cast<const float*>(x_scale), static_cast<const float*>(x_shift), x_relu != 0};
  const auto run = [&]<class T, int R, class Tile>(T*, std::integral_constant<int, R>, Tile*) {
    const ConvEpilogue<T> epilogue{static_cast<const float*>(scale), static_cast<const float*>(shift),
                                   static_cast<const T*>(residual), relu != 0, mask, static_cast<float*>(partials)};
    const auto kernel = x_scale ? conv_kernel<T, R, true, Tile> : conv_kernel<T, R, false, Tile>;
    emulation::launch(tiles_of_rows<Tile>(shape) * cut(shape.k, Tile::kN), Tile::kBlock, of.seed, kernel, static_cast<const T*>(x), prologue,
                      static_cast<const T*>(filter), static_cast<T*>(out), epilogue, shape);
  };
  return calls::typed<2, 3>(dtype, [&](auto* type) {
    filtered(of.size, [&](auto size) { tiled(of.tile, [&](auto* tile) { run(type, size, tile); }); });
  });
}

const char* moments(int, const void* partials, int splits, int channels, void* mean, void* var) {
  return calls::guarded([&] {
    emulation::launch((channels + kChannelsOfJoin - 1) / kChannelsOfJoin, kThreads, 1, finalise_moments_kernel<float>,
                      static_cast<const float*>(partials), splits, int64_t{channels}, static_cast<float*>(mean),
                      static_cast<float*>(var));
  });
}
}
