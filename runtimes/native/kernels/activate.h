// Activations on contiguous floats.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// y[i] = activation(x[i]) for i in [0, count); y may be x.
ATTN_DEPLOY_DECLARE_KERNEL(void, Activate, Activation activation, const float* x, float* y, int64_t count)

}  // namespace attn_deploy::native
