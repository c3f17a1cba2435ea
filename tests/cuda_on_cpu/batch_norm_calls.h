// What the calls of elementwise_kernels.cpp and sums_kernels.cpp share.
#pragma once

#include "calls.h"

#include "elementwise.cuh"
#include "launch_plan.h"

using namespace resnet_fused::cuda;

namespace {

// Of any dtype.
template <class Body>
const char* typed(int dtype, Body body) {
  return calls::typed<0, 1, 2, 3>(dtype, body);
}

template <class Body>
void gate_of(int gate, Body body) {
  switch (gate) {
    case 0: return body(std::integral_constant<Gate, Gate::kOpen>());
    case 1: return body(std::integral_constant<Gate, Gate::kMask>());
    default: return body(std::integral_constant<Gate, Gate::kActivation>());
  }
}

template <class Body>
void either(bool which, Body body) {
  which ? body(std::true_type()) : body(std::false_type());
}

}  // namespace

// How a call is run: resident blocks, splits of the rows (0: as planned), the seed of the order, whether in the general form,
// and so many blocks more than planned.
struct Run {
  int blocks, splits;
  unsigned seed;
  int general, idle;
};

struct Shape {
  int64_t count;
  int inner, channels, aligned;
  Elements elements() const { return {count, inner, channels, aligned != 0}; }
};
