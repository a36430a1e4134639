#include "attention_plan.h"

#include <algorithm>

namespace attn_deploy::native {
namespace {

// A unit packs all keys that it reads, which costs as much as some rows do, and keeps its rows' sums in cache.
constexpr int64_t kMostRows = 256;
constexpr int64_t kFewestRows = 48;
// Work then divides by 2, 3, 4 and 6 threads, and a slow thread delays the others little.
constexpr int64_t kWantedUnits = 12;
// Multiply-adds, about 15 us on one core: a block that is claimed at once.
constexpr int64_t kWantedBlock = 1 << 19;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

AttentionHead HeadOf(const AttentionProblem& p, int64_t sample, int64_t window, int64_t head) {
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  AttentionHead of;
  of.query = p.query + sample * p.query_strides.sample + head * p.query_strides.head;
  of.key = p.key + sample * p.key_strides.sample + kv_head * p.key_strides.head;
  of.value = p.value + sample * p.value_strides.sample + kv_head * p.value_strides.head;
  of.output = p.output + sample * p.output_strides.sample + head * p.output_strides.head;
  of.query_stride = p.query_strides.token;
  of.key_stride = p.key_strides.token;
  of.value_stride = p.value_strides.token;
  of.output_stride = p.output_strides.token;
  of.scale = p.scale * (p.head_scale == nullptr ? 1.0f : p.head_scale[head]);
  if (p.index != nullptr) of.index = p.index + window * p.shape.query_len;
  if (p.fill != nullptr) {
    of.query_fill = p.fill + head * p.shape.head_dim;
    of.key_fill = of.query_fill + p.heads * p.shape.head_dim;
    of.value_fill = of.key_fill + p.heads * p.shape.head_dim;
  }
  if (p.bias != nullptr) {
    const int64_t item = p.bias_index == nullptr ? sample : p.bias_index[window];
    of.bias = p.bias + item * p.bias_strides[0] + head * p.bias_strides[1];
    of.bias_row_stride = p.bias_strides[2];
    of.bias_key_stride = p.bias_strides[3];
  }
  if (p.mask != nullptr) {
    of.mask = p.mask + sample * p.mask_strides[0] + head * p.mask_strides[1];
    of.mask_row_stride = p.mask_strides[2];
    of.mask_key_stride = p.mask_strides[3];
  }
  return of;
}

}  // namespace

AttentionBlocks SplitAttention(const AttentionProblem& p, int64_t parts) {
  AttentionBlocks blocks;
  const int64_t whole_heads = p.batch * p.windows * p.heads;
  const int64_t rows = p.shape.query_len;
  if (whole_heads == 0 || rows == 0) return blocks;
  const int64_t for_balance = std::min(CeilDivide(kWantedUnits, whole_heads), std::max<int64_t>(rows / kFewestRows, 1));
  blocks.parts = parts > 0 ? std::min(parts, rows) : std::max(for_balance, CeilDivide(rows, kMostRows));
  blocks.units = whole_heads * blocks.parts;
  const int64_t unit_rows = CeilDivide(rows, blocks.parts);
  const int64_t multiply_adds = unit_rows * p.shape.key_len * (p.shape.head_dim + p.shape.value_dim);
  blocks.units_per_block = std::max<int64_t>(kWantedBlock / std::max<int64_t>(multiply_adds, 1), 1);
  blocks.count = CeilDivide(blocks.units, blocks.units_per_block);
  blocks.scratch_floats = ATTN_DEPLOY_KERNEL(AttentionScratch)(p.shape, unit_rows);
  return blocks;
}

void RunAttentionUnits(const AttentionProblem& p, const AttentionBlocks& blocks, int64_t block, float* scratch) {
  const auto attend = ATTN_DEPLOY_KERNEL(AttendHead);
  const int64_t rows = p.shape.query_len;
  const int64_t end = std::min((block + 1) * blocks.units_per_block, blocks.units);
  for (int64_t unit = block * blocks.units_per_block; unit < end; ++unit) {
    const int64_t part = unit % blocks.parts;
    const int64_t head = unit / blocks.parts % p.heads;
    const int64_t window = unit / blocks.parts / p.heads % p.windows;
    const int64_t sample = unit / blocks.parts / p.heads / p.windows;
    attend(p.shape, HeadOf(p, sample, window, head), part * rows / blocks.parts, (part + 1) * rows / blocks.parts,
           scratch);
  }
}

}  // namespace attn_deploy::native
