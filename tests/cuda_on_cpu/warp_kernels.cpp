// Kernels that do wrong what a GPU would let pass or hang at, and one that does it right.
#include "calls.h"

namespace {

// Sums of the thread numbers of a block, by shuffles and shared memory.
void sums(float* out) {
  double value = threadIdx.x;
  for (int with = 16; with > 0; with /= 2) value += __shfl_xor_sync(0xffffffffu, value, with);
  RESNET_FUSED_SHARED(double, of_warps, 2);
  RESNET_FUSED_SHARED(unsigned, votes, 2);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 1);
  if (threadIdx.x % 32 == 0) {
    of_warps[threadIdx.x / 32] = value;
    votes[threadIdx.x / 32] = odd;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    out[blockIdx.x] = static_cast<float>(of_warps[0] + of_warps[1]);
    if (votes[0] != 0xaaaaaaaau || votes[1] != 0xaaaaaaaau) out[blockIdx.x] = -1;
  }
}

void without_barrier(float* out) {
  RESNET_FUSED_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 0;
    for (int i = 0; i < 64; ++i) out[blockIdx.x] += values[i];
  }
}

void barrier_in_a_branch(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

void mask_without_the_caller(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

void mask_with_lanes_that_do_not_call(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void lane_outside_the_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

void different_arrays(float* out) {
  RESNET_FUSED_SHARED(float, values, threadIdx.x < 32 ? 1 : 2);
  out[threadIdx.x] = values[0];
}

void beyond_shared_memory(float* out) {
  RESNET_FUSED_SHARED(float, values, 64);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

void order_of_blocks(float* out) { out[0] = static_cast<float>(blockIdx.x); }

}  // namespace

extern "C" const char* warp_kernel(int, int which, int blocks, unsigned seed, float* out) {
  void (*const kernels[])(float*) = {sums,
                                     without_barrier,
                                     barrier_in_a_branch,
                                     mask_without_the_caller,
                                     mask_with_lanes_that_do_not_call,
                                     lane_outside_the_mask,
                                     different_arrays,
                                     beyond_shared_memory,
                                     order_of_blocks};
  return calls::guarded([&] { emulation::launch(blocks, 64, seed, kernels[which], out); });
}
