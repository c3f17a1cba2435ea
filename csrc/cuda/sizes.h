// What launchers and kernels agree on.
#pragma once

#include <cstdint>

namespace resnet_fused::cuda {

// Parts of a whole, the last of which may be smaller.
constexpr int64_t cut(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

constexpr int kOctet = 8;      // elements that a thread takes at a time
constexpr int kThreads = 256;  // of a block
constexpr int kLanes = 32;     // of a warp
constexpr int kChannelsOfJoin = 8;  // of a block that joins splits: 32 bytes of float32, the least that memory gives
constexpr int kConvDepth = 32;      // of a convolution's reduction, in a step
constexpr int kConvStages = 3;      // steps in shared memory

}  // namespace resnet_fused::cuda
