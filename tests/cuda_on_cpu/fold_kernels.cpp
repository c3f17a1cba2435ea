// fold_kernel as a function of C, for tests.
#include "calls.h"

#include "fold.cuh"

#include <vector>

using namespace resnet_fused::cuda;

namespace {

// A layer without types, as a test fills it.
struct Layer {
  const void *weight, *bias, *gamma, *beta, *mean, *var;
  double eps;
  void *folded, *shift;
  int outputs, channels, taps, channels_last;
};

template <class S, class T>
void fold_all(const Layer* from, int count, unsigned seed) {
  std::vector<FoldedLayer<S, T>> layers;
  int64_t rows = 0;
  for (const Layer* l = from; l < from + count; ++l) {
    const auto in = [](const void* p) { return static_cast<const S*>(p); };
    layers.push_back({in(l->weight), in(l->bias), in(l->gamma), in(l->beta), in(l->mean), in(l->var), l->eps,
                      static_cast<T*>(l->folded), static_cast<T*>(l->shift), l->outputs, l->channels, l->taps,
                      l->channels_last != 0, rows});
    rows += l->outputs;
  }
  const unsigned blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  emulation::launch(blocks, kThreads, seed, fold_kernel<S, T>, static_cast<const FoldedLayer<S, T>*>(layers.data()),
                    count, rows);
}

}  // namespace

// From parameters of a dtype to the same, and from float32 to half precision.
extern "C" const char* fold(int to, int from, const Layer* layers, int count, unsigned seed) {
  return calls::typed<0, 1, 2, 3>(to, [&]<class T>(T*) {
    if (from == to) return fold_all<T, T>(layers, count, seed);
    if constexpr (sizeof(T) == 2) {
      if (from == 1) return fold_all<float, T>(layers, count, seed);
    }
    throw std::invalid_argument("dtypes");
  });
}
