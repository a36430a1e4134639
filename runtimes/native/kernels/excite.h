// What stands between pool and gate of channel attention, on vectors of a few hundred numbers: the two layers of
// squeeze-and-excitation (Hu et al. 2018, equation 3) and the convolution over channels of ECA (Wang et al. 2020,
// equation 5).
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// Channels of a panel of the second layer's packed weights, on every instruction set.
constexpr int64_t kExcitePanel = 64;

// The first layer's outputs [begin, end): hidden[r] = activation(dot(weight[r], pooled) + bias[r]); weight is
// [reduced, channels].
ATTN_DEPLOY_DECLARE_KERNEL(void, ExciteHidden, Activation activation, const float* pooled, const float* weight,
                           const float* bias, int64_t channels, int64_t begin, int64_t end, float* hidden)

// One panel of the second layer: gate[c] = activation(sum over r of hidden[r] * weight[r, c] + bias[c]) for c in
// [0, channels), channels <= kExcitePanel; weight is [reduced, kExcitePanel], bias [kExcitePanel].
ATTN_DEPLOY_DECLARE_KERNEL(void, ExciteGate, Activation activation, const float* hidden, const float* weight,
                           const float* bias, int64_t reduced, int64_t channels, float* gate)

// gate[c] = activation(sum over j of weight[j] * padded[c + j]) for c in [0, channels); padded is
// [channels + taps - 1].
ATTN_DEPLOY_DECLARE_KERNEL(void, EcaGate, Activation activation, const float* padded, const float* weight,
                           int64_t taps, int64_t channels, float* gate)

}  // namespace attn_deploy::native
