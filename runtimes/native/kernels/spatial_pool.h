// The SpatialPool kernel: mean and maximum over the channels of every pixel in one pass.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// x is [channels, stride], of which `pixels` columns are pooled; mean and maximum are [pixels], either may be null. At
// least one channel. The mean's error is below 32 units in the last place of the mean of |x|. The maximum of a pixel
// with NaN is NaN.
ATTN_DEPLOY_DECLARE_KERNEL(void, SpatialPool, const float* x, int64_t channels, int64_t stride, int64_t pixels,
                           float* mean, float* maximum)

}  // namespace attn_deploy::native
