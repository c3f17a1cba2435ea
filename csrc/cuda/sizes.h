// What launchers and kernels agree on.
#pragma once

namespace resnet_fused::cuda {

constexpr int kOctet = 8;      // elements that a thread takes at a time
constexpr int kThreads = 256;  // of a block
constexpr int kLanes = 32;     // of a warp

}  // namespace resnet_fused::cuda
