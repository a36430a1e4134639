// What the operators on 8-bit maps [batch, height, width, channels] share: static scales and zero points.
#pragma once

#include <string>
#include <vector>

#include "operator.h"

namespace attn_deploy::native {

// Scales of a map: per channel, though the graph may hold one for all; and the level of 0.
struct Levels {
  std::vector<float> scale;
  uint8_t zero = 0;
};

// The constants at inputs `index` (float32 [1] or [channels], above 0) and `index` + 1 (uint8 [1]).
ort::OrtStatus* ReadLevels(const Kernel& kernel, const ort::OrtKernelInfo* info, size_t index, int64_t channels,
                           Levels* levels);

// A constant of this type and shape.
ort::OrtStatus* ReadTyped(const Kernel& kernel, const ort::OrtKernelInfo* info, size_t index,
                          ort::ONNXTensorElementDataType type, const Shape& expected, InputTensor* input);

// Fails unless `shape` is [batch, height, width, channels]; a dim of -1 in `expected` is any.
ort::OrtStatus* ExpectShape(const Kernel& kernel, const char* name, const Shape& shape, const Shape& expected);

}  // namespace attn_deploy::native
