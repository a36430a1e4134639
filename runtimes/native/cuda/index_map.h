// Checks of an index map that stands in the model as a constant, made once when a session is opened.
#pragma once

#include <cstdint>

#include "operator.h"

namespace attn_deploy::cuda {

// Where the node's input 1, the index map, is a constant: fails unless every value is a token and no token stands
// twice, -1 being allowed where `padded`; sets whether every token stands in it. Of one computed at run time nothing is
// known here; kernels take what is no token for padding. Throws std::bad_alloc.
ort::OrtStatus* CheckConstantIndex(const Kernel& kernel, const ort::OrtKernelInfo* info, int64_t tokens, bool padded,
                                   bool* covers_every_token);

}  // namespace attn_deploy::cuda
