// Tensor cores in half precision, and the copies that feed them. For NVIDIA GPUs from sm_80 on; a host compiler gets
// twins that do the same to the fibers of tests/cuda_on_cpu.
//
// Fragments are PTX's of m16n8k16: with g = lane / 4 and t = lane % 4, register i of A holds row g + 8·(i % 2), columns
// 2t + 8·(i / 2) and the next; register i of B rows 2t + 8·i and the next of column g; value i of the sums
// row g + 8·(i / 2), column 2t + i % 2.
#pragma once

#include "../device.cuh"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace resnet_fused::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, both aligned; zeros where not valid, and global is not read. Others see them
// after wait() in the thread that called, and then a barrier.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group: the copies since the last one.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups but the last kOpen of this thread have arrived.
template <int kOpen>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives row i % 8 of matrix i / 8. Lane i gets the pair i % 4 in row i / 4
// of each.
__device__ __forceinline__ void load_matrices_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums += A·B.
template <class T>
__device__ __forceinline__ void add_product(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else

namespace twin {

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

// A thread's copies that have not arrived: groups, the last of which is not closed.
struct Copies {
  uint64_t launch;
  dim3 block;
  std::vector<std::vector<Copy>> groups;
};

// One lane's, of two generations: no lane is more than one ahead.
struct Fragments {
  uint32_t a[2][4], b[2][2];
};

inline std::vector<Copies> copies;  // of each thread of the block
inline std::vector<Fragments> fragments;

inline Copies& copies_of_this_thread() {
  copies.resize(emulation::machine.fibers.size(), {});
  Copies& mine = copies[emulation::machine.current];
  const bool begins = mine.launch != emulation::machine.launches || mine.block.x != blockIdx.x ||
                      mine.block.y != blockIdx.y || mine.block.z != blockIdx.z;
  if (begins) mine = {emulation::machine.launches, blockIdx, {{}}};
  return mine;
}

template <class T>
float element(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * i);
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

}  // namespace twin

// The copy may happen at any time until it is waited for: what was there is lost at once, what comes is late.
inline void copy_async16(void* shared, const void* global, bool valid) {
  emulation::check_aligned(shared);
  emulation::check_aligned(global);
  std::memset(shared, 0xff, 16);
  twin::copies_of_this_thread().groups.back().push_back({shared, global, valid});
}

inline void commit() { twin::copies_of_this_thread().groups.emplace_back(); }

template <int kOpen>
void wait() {
  auto& groups = twin::copies_of_this_thread().groups;
  while (groups.size() > kOpen + 1) {
    for (const twin::Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices_x4(uint32_t (&out)[4], const void* row) {
  emulation::check_aligned(row);
  const auto rows = emulation::exchange(~0u, row);
  const unsigned lane = emulation::lane();
  for (unsigned i = 0; i < 4; ++i) {
    std::memcpy(&out[i], static_cast<const char*>(rows(i * 8 + lane / 4)) + lane % 4 * 4, 4);
  }
}

template <class T>
void add_product(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using emulation::machine;
  twin::fragments.resize(machine.fibers.size());
  const size_t first = machine.current / emulation::kLanes * emulation::kLanes;
  const unsigned lane = emulation::lane(), generation = (machine.fibers[machine.current].generation + 1) % 2;
  std::memcpy(twin::fragments[machine.current].a[generation], a, sizeof(a));
  std::memcpy(twin::fragments[machine.current].b[generation], b, sizeof(b));
  __syncwarp();
  for (unsigned k = 0; k < 16; ++k) {
    float of_a[2], of_b[2];
    for (unsigned i = 0; i < 2; ++i) {
      const twin::Fragments& holds_a = twin::fragments[first + lane / 4 * 4 + k % 8 / 2];
      const twin::Fragments& holds_b = twin::fragments[first + (lane % 4 * 2 + i) * 4 + k % 8 / 2];
      of_a[i] = twin::element<T>(holds_a.a[generation][k / 8 * 2 + i], k % 2);
      of_b[i] = twin::element<T>(holds_b.b[generation][k / 8], k % 2);
    }
    for (unsigned i = 0; i < 4; ++i) sums[i] += of_a[i / 2] * of_b[i % 2];
  }
}

#endif

}  // namespace resnet_fused::cuda
