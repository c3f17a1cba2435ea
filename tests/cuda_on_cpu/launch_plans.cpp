// Plans as functions of C, for tests.
#include "launch_plan.h"

using namespace resnet_fused::cuda;

extern "C" {

LaunchPlan elementwise_plan(int64_t count, int64_t inner, int64_t channels, int aligned, int element_size, int tensors,
                            int masks, int64_t resident) {
  return plan_elementwise(count, inner, channels, aligned != 0, element_size, tensors, masks, resident);
}

LaunchPlan channel_sums_plan(int64_t images, int64_t inner, int64_t channels, int channels_last, int aligned,
                             int element_size, int accumulate_size, int tensors, int values) {
  return plan_channel_sums(images, inner, channels, channels_last != 0, aligned != 0, element_size, accumulate_size,
                           tensors, values);
}
}
