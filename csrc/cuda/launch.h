// From an operator to a kernel's launch: the device and its stream, the dtype. A host compiler gets a twin of the stream
// that runs kernels in the emulation of tests/cuda_on_cpu, on tensors of the processor.
#pragma once

#include <algorithm>

#include "../arguments.h"
#include "device.cuh"
#include "launch_plan.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// Which operators this library's kernels are, and of what; tests have others beside the real ones.
#if !defined(RESNET_FUSED_NAMESPACE)
#define RESNET_FUSED_NAMESPACE resnet_fused
#define RESNET_FUSED_KEY CUDA
#endif

namespace resnet_fused::cuda {

#if defined(__CUDACC__)

// The current stream of an operator's device, which is the current one as long as this object lives.
class Stream {
 public:
  explicit Stream(const Activations& t) : Stream(t.op, t.x) {}

  Stream(const char* op, const Tensor& x) : op_(op), device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(current_stream()(device_, &stream) == AOTI_TORCH_SUCCESS, op, ": PyTorch gave no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Arguments become what the kernel's parameters are: untyped pointers of tensors typed ones.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, const Arguments&... arguments) const {
    kernel<<<grid, block, 0, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
  }

  // How many blocks of a kernel run at once.
  template <class... Parameters>
  i64 resident_blocks(void (*kernel)(Parameters...), int block) const {
    int multiprocessors = 0, of_each = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, block, 0));
    return i64{multiprocessors} * std::max(1, of_each);
  }

 private:
  using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

  // Only a CUDA build of PyTorch has it, and this library is linked without one: Stream::nativeHandle, which every build
  // has, came with PyTorch 2.13.
  static CurrentStream current_stream() {
    static const auto found = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(found != nullptr, "resnet_fused: the CUDA kernels need a CUDA build of PyTorch");
    return found;
  }

  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
  }

  const char* op_;
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#else

class Stream {
 public:
  explicit Stream(const Activations&) {}
  Stream(const char*, const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, const Arguments&... arguments) const {
    static unsigned seed = 0;
    emulation::launch(grid, block, ++seed, kernel, static_cast<Parameters>(arguments)...);
  }

  template <class... Parameters>
  i64 resident_blocks(void (*)(Parameters...), int) const {
    return 4;
  }
};

#endif

// body.operator()<T>() with the T of a dtype, one of those that Activations accepts.
template <class Body>
void typed(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    default: return body.template operator()<Half>();
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Bytes16) == 0; }

// A number that the kernels hold in 32 bits.
inline int narrow(const char* op, const char* what, i64 value) {
  STD_TORCH_CHECK(value <= INT32_MAX, op, ": expected ", what, " below 2**31, got ", value);
  return static_cast<int>(value);
}

inline void* address(const Tensor& t) { return t.mutable_data_ptr(); }

// Of a mask, which is empty where nobody wants it.
inline uint8_t* mask_address(const Tensor& mask) {
  return mask.numel() > 0 ? static_cast<uint8_t*>(address(mask)) : nullptr;
}

}  // namespace resnet_fused::cuda
