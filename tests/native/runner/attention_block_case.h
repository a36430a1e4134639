// What the cases of the attention blocks over windows share. A case: ints {padded, cosine, bias, heads, windows at once},
// floats {epsilon, scale}, inputs as those of the operator's Indexed forms; output like x.
#pragma once

#include <algorithm>
#include <vector>

#include "case.h"
#include "kernels/attention_block.h"
#include "scratch.h"

namespace attn_deploy::native::runner {

// Everything but the projections; `index_at` is the number of the input `index`.
inline void ReadAttention(const Case& c, size_t index_at, WindowAttention* attention) {
  const Array& x = c.inputs.at(0);
  const Array& index = c.inputs.at(index_at);
  attention->tokens = x.dims[1];
  attention->channels = x.dims[2];
  attention->heads = c.ints.at(3);
  attention->windows = index.dims[0];
  attention->length = index.dims[1];
  attention->index = index.ints();
  attention->epsilon = static_cast<float>(c.floats.at(0));
  attention->scale = static_cast<float>(c.floats.at(1));
  attention->shape.query_len = attention->shape.key_len = attention->length;
  attention->shape.head_dim = attention->shape.value_dim = attention->channels / attention->heads;
  attention->shape.cosine = c.ints[1] != 0;
  size_t at = index_at + 1;
  if (c.ints[0] != 0) attention->fill = c.inputs.at(at++).floats();
  if (c.ints[1] != 0) attention->head_scale = c.inputs.at(at++).floats();
  if (c.ints[2] != 0) {
    attention->bias = c.inputs.at(at).floats();
    attention->bias_index = c.inputs.at(at + 1).ints();
  }
}

// run(x, y, begin, end, floats, ints) for all windows of all samples, and the tokens of none.
template <typename RunWindows>
std::vector<Array> RunSamples(const Case& c, const WindowAttention& attention, const AttentionBlockScratch& size,
                              const float* bias_out, const RunWindows& run) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, x.dims, 0);
  const int64_t* const index_end = attention.index + attention.windows * attention.length;
  std::vector<int64_t> outside;
  for (int64_t token = 0; token < attention.tokens; ++token) {
    if (std::find(attention.index, index_end, token) == index_end) outside.push_back(token);
  }
  const int64_t together = c.ints.at(4);
  AlignedBuffer floats;
  std::vector<int64_t> ints(static_cast<size_t>(size.ints));
  for (int64_t sample = 0; sample < x.dims[0]; ++sample) {
    const float* from = x.floats() + sample * attention.tokens * attention.channels;
    float* to = outputs[0].floats() + sample * attention.tokens * attention.channels;
    for (int64_t begin = 0; begin < attention.windows; begin += together) {
      run(from, to, begin, std::min(begin + together, attention.windows), floats.Floats(size.floats), ints.data());
    }
    ATTN_DEPLOY_KERNEL(RunOutsideWindows)
    (attention, from, to, bias_out, outside.data(), static_cast<int64_t>(outside.size()));
  }
  return outputs;
}

}  // namespace attn_deploy::native::runner
