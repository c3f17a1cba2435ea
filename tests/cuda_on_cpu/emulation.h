// CUDA on a processor: kernels compiled by a host compiler, one block after another, a fiber for each thread.
//
// Blocks run in shuffled order, and so do the warps of a block between two barriers, each as far as it gets, and the
// lanes of a warp: what depends on an order gives other results from seed to seed. Shared memory is new for each block, of
// exactly its size, and filled with NaN. What a GPU would do silently or hang at is an error here: a barrier that some
// threads never reach, a warp function whose mask names lanes that do not call it or leaves out the caller, different masks
// within a warp.
//
// Not modelled: memory order between blocks, bank conflicts, divergence inside a warp without a warp function.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return size_t{x} * y * z; }
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class Waits { kNothing, kBarrier, kWarp, kForever };  // kForever: the thread has ended

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  dim3 index;
  Waits waits = Waits::kNothing;
  unsigned mask = 0;        // of the warp function it waits in
  unsigned generation = 0;  // how many warp functions it has called
  unsigned shared_used = 0;
  uint64_t slots[2] = {};   // its values, of two generations: no lane is more than one ahead
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler{};
  size_t current = 0;
  uint64_t launches = 0;
  std::function<void()> body;
  std::vector<std::unique_ptr<char[]>> shared;  // allocations of the block, in program order
  std::vector<size_t> shared_bytes;
  std::mt19937 random;
  std::exception_ptr error;
  void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  const dim3 t = machine.fibers[machine.current].index;
  throw std::runtime_error(what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(t.x) + ", " +
                           std::to_string(t.y) + ")");
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("an address that is no multiple of 16 bytes");
}

inline void to_scheduler(bool ends) {
  Fiber& fiber = machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  threadIdx = machine.fibers[machine.current].index;
  (void)ends;
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &machine.scheduler_stack_bytes);
  machine.scheduler_stack = const_cast<void*>(bottom);
#endif
  try {
    machine.body();
  } catch (...) {
    if (!machine.error) machine.error = std::current_exception();
  }
  machine.fibers[machine.current].waits = Waits::kForever;
  to_scheduler(true);
}

inline void resume(size_t thread) {
  machine.current = thread;
  Fiber& fiber = machine.fibers[thread];
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void wait(Waits what) {
  machine.fibers[machine.current].waits = what;
  to_scheduler(false);
  if (machine.error) throw std::runtime_error("another thread failed");
}

// Whether every lane that the mask of this waiting thread names waits in the same warp function.
inline bool warp_is_complete(size_t thread) {
  const Fiber& fiber = machine.fibers[thread];
  const size_t first = thread / kLanes * kLanes;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    if (first + lane >= machine.fibers.size()) return false;
    const Fiber& other = machine.fibers[first + lane];
    // A lane that has already been let go has finished this generation.
    if (other.generation < fiber.generation) return false;
    if (other.waits == Waits::kWarp && other.generation == fiber.generation && other.mask != fiber.mask) return false;
  }
  return true;
}

// Runs the threads of a warp until none can go on. Returns whether any could.
inline bool run_warp(size_t first) {
  std::vector<size_t> order;
  for (size_t i = first; i < std::min(first + kLanes, machine.fibers.size()); ++i) order.push_back(i);
  bool ran = false;
  for (bool going = true; going; ran = ran || going) {
    going = false;
    std::shuffle(order.begin(), order.end(), machine.random);
    for (size_t thread : order) {
      Fiber& fiber = machine.fibers[thread];
      if (fiber.waits == Waits::kWarp && (machine.error || warp_is_complete(thread))) fiber.waits = Waits::kNothing;
      if (fiber.waits != Waits::kNothing) continue;
      resume(thread);
      going = true;
    }
  }
  return ran;
}

// Each warp gets as far as it can before the next one moves, in another order behind each barrier: nothing but a barrier
// keeps them in step.
inline void run_block() {
  std::vector<size_t> warps;
  for (size_t first = 0; first < machine.fibers.size(); first += kLanes) warps.push_back(first);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    bool any_ran = false;
    for (size_t first : warps) any_ran = run_warp(first) || any_ran;
    const bool all_ended = std::all_of(machine.fibers.begin(), machine.fibers.end(),
                                       [](const Fiber& fiber) { return fiber.waits == Waits::kForever; });
    if (all_ended) return;
    if (any_ran) continue;
    const bool at_barrier = std::all_of(machine.fibers.begin(), machine.fibers.end(), [](const Fiber& fiber) {
      return fiber.waits == Waits::kBarrier || fiber.waits == Waits::kForever;
    });
    if (!at_barrier && !machine.error) {
      machine.error = std::make_exception_ptr(
          std::runtime_error("a warp function waits for lanes that its mask names and that do not call it"));
    }
    const bool some_ended = std::any_of(machine.fibers.begin(), machine.fibers.end(),
                                        [](const Fiber& fiber) { return fiber.waits == Waits::kForever; });
    if (at_barrier && some_ended && !machine.error) {
      machine.error = std::make_exception_ptr(std::runtime_error("a barrier that some threads of the block never reach"));
    }
    for (Fiber& fiber : machine.fibers) {
      if (fiber.waits == Waits::kBarrier) fiber.waits = Waits::kNothing;
    }
  }
}

// Runs a kernel; throws what went wrong.
template <class Kernel, class... Arguments>
void launch(dim3 grid, dim3 block, uint32_t seed, Kernel kernel, Arguments... arguments) {
  gridDim = grid;
  blockDim = block;
  machine.random.seed(seed);
  machine.error = nullptr;
  machine.body = [=] { kernel(arguments...); };
  if (machine.fibers.size() != block.count()) machine.fibers = std::vector<Fiber>(block.count());
  ++machine.launches;
  std::vector<size_t> blocks(grid.count());
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (size_t number : blocks) {
    blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / (size_t{grid.x} * grid.y));
    machine.shared.clear();
    machine.shared_bytes.clear();
    for (size_t i = 0; i < machine.fibers.size(); ++i) {
      Fiber& fiber = machine.fibers[i];
      fiber.index = dim3(i % block.x, i / block.x % block.y, i / (size_t{block.x} * block.y));
      fiber.waits = Waits::kNothing;
      fiber.generation = fiber.shared_used = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(run_thread), 0);
    }
    run_block();
    if (machine.error) std::rethrow_exception(machine.error);
  }
}

// The block's array number so and so in program order, which is the same in every thread.
inline void* shared_array(size_t bytes) {
  Fiber& fiber = machine.fibers[machine.current];
  const unsigned number = fiber.shared_used++;
  if (number == machine.shared.size()) {
    machine.shared.push_back(std::make_unique<char[]>(bytes));
    machine.shared_bytes.push_back(bytes);
    std::memset(machine.shared.back().get(), 0xff, bytes);
  }
  if (machine.shared_bytes[number] != bytes) fail("threads of a block declare different shared arrays");
  return machine.shared[number].get();
}

// Exchanges a value within a warp; the result reads lane i's.
template <class T>
auto exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Fiber& fiber = machine.fibers[machine.current];
  const size_t first = machine.current / kLanes * kLanes;
  if (!(mask >> (machine.current - first) & 1)) fail("a warp function whose mask leaves out the caller");
  const unsigned slot = ++fiber.generation % 2;
  fiber.mask = mask;
  std::memcpy(&fiber.slots[slot], &value, sizeof(T));
  wait(Waits::kWarp);
  return [=](unsigned lane) {
    if (!(mask >> lane & 1)) fail("a warp function reads a lane outside its mask");
    T result;
    std::memcpy(&result, &machine.fibers[first + lane].slots[slot], sizeof(T));
    return result;
  };
}

inline unsigned lane() { return machine.current % kLanes; }

}  // namespace emulation

#define RESNET_FUSED_SHARED(type, name, count) type* const name = static_cast<type*>(emulation::shared_array(sizeof(type) * (count)))

inline void __syncthreads() { emulation::wait(emulation::Waits::kBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulation::exchange(mask, value)(emulation::lane() ^ with);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulation::exchange(mask, value)(from % emulation::kLanes);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned from = emulation::lane() + by;
  const auto of = emulation::exchange(mask, value);
  return from < emulation::kLanes ? of(from) : value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const auto of = emulation::exchange(mask, vote);
  unsigned found = 0;
  for (unsigned lane = 0; lane < emulation::kLanes; ++lane) {
    if (mask >> lane & 1) found |= unsigned{of(lane)} << lane;
  }
  return found;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }
