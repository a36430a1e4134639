// The activations that kernels apply to their results; kernels/vector_activations.h computes them on the CPU.
#pragma once

namespace attn_deploy::native {

enum class Activation { kNone, kRelu, kSilu, kGelu, kGeluTanh, kHardswish, kSigmoid, kHardSigmoid };

}  // namespace attn_deploy::native
