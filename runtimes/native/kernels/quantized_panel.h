// Where things stand in packed 8-bit weights. Included only by sources in kernels/.
#pragma once

#include "dot.h"
#include "gemm.h"
#include "quantized_weights.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Offsets in bytes within a panel, which starts with kPanelColumns float scales and as many biases.
struct QuantizedPanel {
  explicit QuantizedPanel(const QuantizedWeights& weights) : QuantizedPanel(weights.in, weights.groups) {}
  QuantizedPanel(int64_t in, int64_t groups)
      : weights_of_group(LevelGroups(in / groups) * kStep * static_cast<int64_t>(sizeof(PackedWeight))),
        group_stride(kSums + weights_of_group),
        stride(2 * kFloats + groups * group_stride) {}

  // Weights of kGroup inputs.
  static constexpr int64_t kStep = kPanelColumns * kGroup;
  static constexpr int64_t kFloats = kPanelColumns * static_cast<int64_t>(sizeof(float));
  static constexpr int64_t kSums = kPanelColumns * static_cast<int64_t>(sizeof(int32_t));

  static const float* Scale(const char* panel) { return reinterpret_cast<const float*>(panel); }
  static const float* Bias(const char* panel) { return reinterpret_cast<const float*>(panel + kFloats); }
  // The columns' sums over the group's inputs, negated.
  const int32_t* MinusSums(const char* panel, int64_t group) const {
    return reinterpret_cast<const int32_t*>(panel + 2 * kFloats + group * group_stride);
  }
  const PackedWeight* Weights(const char* panel, int64_t group) const {
    return reinterpret_cast<const PackedWeight*>(panel + 2 * kFloats + group * group_stride + kSums);
  }

  int64_t weights_of_group;
  int64_t group_stride;
  int64_t stride;
};

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
