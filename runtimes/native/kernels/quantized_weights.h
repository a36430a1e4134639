// 8-bit weight matrices as the integer matrix product reads them: packed once, when a model is loaded.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// A packed matrix [in, out] of weights -127..127, with a scale and a bias per output. `data`, at a cache line, holds
// panels of a few columns (how many depends on the instruction set; zeros beyond `out`), each: the scales and biases of
// these columns; then, for each group of in / groups inputs, the columns' sums and the weights, kGroup inputs of a
// column beside one another, zeros beyond the group's last input.
//
// Groups are inputs whose levels have a scale of their own (the hidden layer of a feed-forward).
struct QuantizedWeights {
  const void* data = nullptr;
  int64_t in = 0;
  int64_t out = 0;
  int64_t groups = 1;  // divides `in`
};

// How many bytes PackQuantizedWeights writes: a multiple of 64.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(int64_t, QuantizedWeightsSize, int64_t in, int64_t out, int64_t groups)

// Packs `weight` [in, out] (contiguous; 128 is the weight 0, 1 is -127 and 255 is 127), `weight_scale` [out] and `bias`
// [out], or zeros where it is null.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PackQuantizedWeights, const uint8_t* weight, const float* weight_scale,
                                const float* bias, int64_t in, int64_t out, int64_t groups, void* packed)

}  // namespace attn_deploy::native
