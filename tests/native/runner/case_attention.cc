// Cases of the attention kernels, as all heads of a problem. Ints: {packed, indexed, padded, cosine, causal, bias,
// mask, parts}; floats: {scale, softcap}. Inputs: qkv, or query, key and value; then those of index, fill, head_scale,
// bias, bias_index and mask that the flags name. Parts above 0 is how many parts each head's rows are split into, in place of
// the plan's own choice. Outputs: output, floats of scratch memory.
#include "attention_plan.h"
#include "case.h"

namespace attn_deploy::native::runner {
namespace {

struct Flags {
  bool packed, indexed, padded, cosine, causal, bias, mask;
};

TokenStrides Dense(const std::vector<int64_t>& dims) {
  return {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3]};
}

void Broadcast(const std::vector<int64_t>& dims, int64_t (&strides)[4]) {
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    strides[d] = dims.at(static_cast<size_t>(d)) == 1 ? 0 : stride;
    stride *= dims[static_cast<size_t>(d)];
  }
}

// [batch, tokens, 3, heads, head_dim]; the output's dims.
std::vector<int64_t> ReadPacked(const Array& qkv, AttentionProblem* p) {
  const int64_t tokens = qkv.dims.at(1);
  p->batch = qkv.dims[0];
  p->heads = p->kv_heads = qkv.dims.at(3);
  p->shape.head_dim = p->shape.value_dim = qkv.dims.at(4);
  p->shape.query_len = p->shape.key_len = tokens;
  const int64_t channels = p->heads * p->shape.head_dim;
  p->query = qkv.floats();
  p->key = p->query + channels;
  p->value = p->key + channels;
  p->query_strides = p->key_strides = p->value_strides = {tokens * 3 * channels, 3 * channels, p->shape.head_dim};
  p->output_strides = {tokens * channels, channels, p->shape.head_dim};
  return {p->batch, tokens, channels};
}

std::vector<int64_t> ReadSeparate(const Array& query, const Array& key, const Array& value, AttentionProblem* p) {
  p->batch = query.dims.at(0);
  p->heads = query.dims.at(2);
  p->kv_heads = key.dims.at(2);
  p->shape.query_len = query.dims[1];
  p->shape.key_len = key.dims[1];
  p->shape.head_dim = query.dims.at(3);
  p->shape.value_dim = value.dims.at(3);
  p->query = query.floats();
  p->key = key.floats();
  p->value = value.floats();
  p->query_strides = Dense(query.dims);
  p->key_strides = Dense(key.dims);
  p->value_strides = Dense(value.dims);
  const std::vector<int64_t> output = {p->batch, query.dims[1], p->heads, p->shape.value_dim};
  p->output_strides = Dense(output);
  return output;
}

std::vector<Array> RunCase(const Case& c) {
  const auto flag = [&c](size_t i) { return c.ints.at(i) != 0; };
  const Flags flags = {flag(0), flag(1), flag(2), flag(3), flag(4), flag(5), flag(6)};
  AttentionProblem p;
  p.scale = static_cast<float>(c.floats.at(0));
  p.shape.softcap = static_cast<float>(c.floats.at(1));
  p.shape.cosine = flags.cosine;
  p.shape.causal = flags.causal;
  size_t next = flags.packed ? 1 : 3;
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat,
                       flags.packed ? ReadPacked(c.inputs.at(0), &p)
                                    : ReadSeparate(c.inputs.at(0), c.inputs.at(1), c.inputs.at(2), &p),
                       1);
  p.output = outputs[0].floats();
  if (flags.indexed) {
    const Array& index = c.inputs.at(next++);
    p.index = index.ints();
    p.windows = index.dims.at(0);
    p.shape.query_len = p.shape.key_len = index.dims.at(1);
  }
  if (flags.padded) {
    p.fill = c.inputs.at(next++).floats();
    for (int64_t i = 0; i < outputs[0].size(); ++i) p.output[i] = 0.0f;
  }
  if (flags.cosine) p.head_scale = c.inputs.at(next++).floats();
  if (flags.bias) {
    const Array& bias = c.inputs.at(next++);
    p.bias = bias.floats();
    Broadcast(bias.dims, p.bias_strides);
    if (flags.indexed) p.bias_index = c.inputs.at(next++).ints();
  }
  if (flags.mask) {
    const Array& mask = c.inputs.at(next++);
    p.mask = reinterpret_cast<const bool*>(mask.bytes());
    Broadcast(mask.dims, p.mask_strides);
  }
  const AttentionBlocks blocks = SplitAttention(p, c.ints.at(7));
  // Exactly as large as asked for, so that AddressSanitizer sees what is written behind it.
  const Array scratch(Type::kFloat, {blocks.scratch_floats}, 0);
  for (int64_t block = 0; block < blocks.count; ++block) RunAttentionUnits(p, blocks, block, scratch.floats());
  outputs.emplace_back(Type::kInt64, std::vector<int64_t>{1}, 0);
  *reinterpret_cast<int64_t*>(outputs[1].bytes()) = blocks.scratch_floats;
  return outputs;
}

const Registered kRegistered("attention", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
