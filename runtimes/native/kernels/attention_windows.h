// What the attention blocks over windows do between their projections. Included only by sources in kernels/.
#pragma once

#include "attention_block.h"
#include "layer_norm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

using AttendFunction = void (*)(const AttentionShape& shape, const AttentionHead& head, int64_t row_begin,
                                int64_t row_end, float* scratch);

// The tokens at the places of windows, to be read: token 0 for padding, whose query, key and value are overwritten
// once they are made (windows with padding are few).
ATTN_DEPLOY_INLINE void TokensToRead(const int64_t* index, int64_t rows, int64_t* tokens) {
  for (int64_t r = 0; r < rows; ++r) tokens[r] = Maximum(index[r], 0);
}

// One row per place of the windows [begin, end): qkv [rows, 3 * channels] -> attended [rows, channels].
ATTN_DEPLOY_INLINE void AttendWindows(const WindowAttention& attention, AttendFunction attend, int64_t begin,
                                      int64_t end, float* qkv, int64_t qkv_stride, float* attended,
                                      int64_t attended_stride, float* scratch) {
  const int64_t channels = attention.channels;
  const int64_t head_dim = attention.shape.head_dim;
  const int64_t scores = attention.length * attention.length;
  AttentionHead head;
  head.query_stride = head.key_stride = head.value_stride = qkv_stride;
  head.output_stride = attended_stride;
  head.bias_row_stride = attention.length;
  for (int64_t window = begin; window < end; ++window) {
    const int64_t* index = attention.index + window * attention.length;
    for (int64_t r = 0; r < attention.length; ++r) {
      if (index[r] < 0) CopyRows({attention.fill, 0}, 1, 3 * channels, qkv + r * qkv_stride, 0);
    }
    for (int64_t h = 0; h < attention.heads; ++h) {
      head.query = qkv + h * head_dim;
      head.key = head.query + channels;
      head.value = head.key + channels;
      head.output = attended + h * head_dim;
      head.scale = attention.head_scale == nullptr ? attention.scale : attention.scale * attention.head_scale[h];
      if (attention.bias != nullptr) {
        head.bias = attention.bias + (attention.bias_index[window] * attention.heads + h) * scores;
      }
      attend(attention.shape, head, 0, attention.length, scratch);
    }
    qkv += attention.length * qkv_stride;
    attended += attention.length * attended_stride;
  }
}

// Moves the rows of tokens together, over those of padding: row r of what is left belongs to tokens[r]. How many.
ATTN_DEPLOY_INLINE int64_t DropPadding(const int64_t* index, int64_t rows, int64_t channels, float* attended,
                                       int64_t stride, int64_t* tokens) {
  int64_t kept = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (index[r] < 0) continue;
    if (kept != r) CopyRows({attended + r * stride, 0}, 1, channels, attended + kept * stride, 0);
    tokens[kept++] = index[r];
  }
  return kept;
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
