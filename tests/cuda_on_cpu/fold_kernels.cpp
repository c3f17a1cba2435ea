// fold_kernel as a function of C, for tests.
#include "emulation.h"

#include "fold.cuh"

#include <vector>

using namespace resnet_fused::cuda;

namespace {

std::string message;

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

// from, to: double, float, BFloat16, Half.
extern "C" const char* fold(int to, int from, const Layer* layers, int count, unsigned seed) {
  try {
    if (from == 0 && to == 0) {
      fold_all<double, double>(layers, count, seed);
    } else if (from == 1 && to == 1) {
      fold_all<float, float>(layers, count, seed);
    } else if (from == 1 && to == 2) {
      fold_all<float, BFloat16>(layers, count, seed);
    } else if (from == 1 && to == 3) {
      fold_all<float, Half>(layers, count, seed);
    } else if (from == 2 && to == 2) {
      fold_all<BFloat16, BFloat16>(layers, count, seed);
    } else if (from == 3 && to == 3) {
      fold_all<Half, Half>(layers, count, seed);
    } else {
      throw std::invalid_argument("dtypes");
    }
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
