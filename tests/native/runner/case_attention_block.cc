// Cases of the kernel RunAttentionBlock: ints {padded, cosine, bias, heads, windows at once}, floats {epsilon, scale},
// inputs as those of the AttentionBlockIndexed forms, with norm_scale 1 and norm_bias 0; output like x.
#include <algorithm>
#include <vector>

#include "case.h"
#include "kernels/attention_block.h"
#include "scratch.h"

namespace attn_deploy::native::runner {
namespace {

PackedWeights Pack(const Array& weight, const Array& bias, AlignedBuffer* buffer) {
  const int64_t in = weight.dims[0];
  const int64_t out = weight.dims[1];
  float* const packed = buffer->Floats(ATTN_DEPLOY_KERNEL(PackedWeightsSize)(in, out));
  ATTN_DEPLOY_KERNEL(PackWeights)(weight.floats(), bias.floats(), in, out, packed);
  return {packed, in, out};
}

std::vector<Array> RunCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  const Array& index = c.inputs.at(7);
  AlignedBuffer qkv, out, floats;
  AttentionBlockPlan plan;
  plan.tokens = x.dims[1];
  plan.channels = x.dims[2];
  plan.heads = c.ints.at(3);
  plan.windows = index.dims[0];
  plan.length = index.dims[1];
  plan.index = index.ints();
  plan.epsilon = static_cast<float>(c.floats.at(0));
  plan.scale = static_cast<float>(c.floats.at(1));
  plan.qkv = Pack(c.inputs[3], c.inputs[4], &qkv);  // of a case whose norm_scale is 1 and norm_bias 0
  plan.out = Pack(c.inputs[5], c.inputs[6], &out);
  plan.shape.query_len = plan.shape.key_len = plan.length;
  plan.shape.head_dim = plan.shape.value_dim = plan.channels / plan.heads;
  plan.shape.cosine = c.ints[1] != 0;
  size_t at = 8;
  if (c.ints[0] != 0) plan.fill = c.inputs.at(at++).floats();
  if (c.ints[1] != 0) plan.head_scale = c.inputs.at(at++).floats();
  if (c.ints[2] != 0) {
    plan.bias = c.inputs.at(at).floats();
    plan.bias_index = c.inputs.at(at + 1).ints();
  }

  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, x.dims, 0);
  std::vector<int64_t> outside;
  for (int64_t token = 0; token < plan.tokens; ++token) {
    if (std::find(plan.index, plan.index + index.size(), token) == plan.index + index.size()) outside.push_back(token);
  }
  const int64_t together = c.ints.at(4);
  const AttentionBlockScratch size = ATTN_DEPLOY_KERNEL(AttentionBlockScratchOf)(plan, together);
  std::vector<int64_t> ints(static_cast<size_t>(size.ints));
  for (int64_t sample = 0; sample < x.dims[0]; ++sample) {
    const float* from = x.floats() + sample * plan.tokens * plan.channels;
    float* to = outputs[0].floats() + sample * plan.tokens * plan.channels;
    for (int64_t begin = 0; begin < plan.windows; begin += together) {
      ATTN_DEPLOY_KERNEL(RunAttentionBlock)
      (plan, from, to, begin, std::min(begin + together, plan.windows), floats.Floats(size.floats), ints.data());
    }
    ATTN_DEPLOY_KERNEL(RunOutsideWindows)
    (plan, from, to, c.inputs[6].floats(), outside.data(), static_cast<int64_t>(outside.size()));
  }
  return outputs;
}

const Registered kRegistered("attention_block", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
