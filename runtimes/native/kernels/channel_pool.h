// The ChannelPool kernel: mean and maximum of every channel's plane in one pass.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// x is [planes, pixels], dense; mean and maximum are [planes], either may be null. At least one pixel. The mean's error
// is below 32 units in the last place of the mean of |x|, however large the plane. The maximum of a plane with NaN is
// NaN.
ATTN_DEPLOY_DECLARE_KERNEL(void, ChannelPool, const float* x, int64_t planes, int64_t pixels, float* mean,
                           float* maximum)

}  // namespace attn_deploy::native
