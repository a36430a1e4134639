// Weight matrices as the matrix product reads them: packed once, when a model is loaded.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// A packed matrix [in, out] with its bias [out]. `data` holds panels of a few columns (how many depends on the
// instruction set; zeros beyond `out`), each the bias of these columns and then, input by input, their weights.
struct PackedWeights {
  const float* data = nullptr;
  int64_t in = 0;
  int64_t out = 0;
};

// How many floats PackWeights writes.
ATTN_DEPLOY_DECLARE_KERNEL(int64_t, PackedWeightsSize, int64_t in, int64_t out)

// Packs `weight` [in, out] (contiguous) and `bias` [out], or zeros where it is null.
ATTN_DEPLOY_DECLARE_KERNEL(void, PackWeights, const float* weight, const float* bias, int64_t in, int64_t out,
                           float* packed)

}  // namespace attn_deploy::native
