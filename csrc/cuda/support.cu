// Whether this library's kernels run on a device, asked before its operators are registered.
#include <cuda_runtime.h>

#include "elementwise.cuh"

// Null, or what is the matter: the device's architecture is none that this library was compiled for, or the driver is too old.
extern "C" __attribute__((visibility("default"))) const char* resnet_fused_cuda_problem(int device) {
  using namespace resnet_fused::cuda;
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, add_relu_kernel<float>);
  cudaSetDevice(previous);
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
