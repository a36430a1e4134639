// Means over the plane of maps in ONNX Runtime's blocked layout ([planes, pixels, block]), in two steps, so that
// several threads can share one plane: sums of parts of a plane, then the mean from these.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// sums[block] of x [pixels, block].
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedSum, int64_t block, int64_t pixels, const float* x, float* sums)

// mean[block] = the sum of sums [parts, block] / pixels. Together the error is below 64 units in the last place of the
// mean of |x|, however large the plane.
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedMean, int64_t block, int64_t parts, int64_t pixels, const float* sums,
                           float* mean)

}  // namespace attn_deploy::native
