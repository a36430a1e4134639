// Cases of the kernel RunAttentionBlock, as attention_block_case.h has them, with norm_scale 1 and norm_bias 0.
#include "attention_block_case.h"

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
  AlignedBuffer qkv, out;
  AttentionBlockPlan plan;
  ReadAttention(c, 7, &plan);
  plan.qkv = Pack(c.inputs[3], c.inputs[4], &qkv);
  plan.out = Pack(c.inputs[5], c.inputs[6], &out);
  const auto run = ATTN_DEPLOY_KERNEL(RunAttentionBlock);
  const AttentionBlockScratch size = ATTN_DEPLOY_KERNEL(AttentionBlockScratchOf)(plan, c.ints.at(4));
  return RunSamples(c, plan, size, c.inputs[6].floats(),
                    [&](const float* x, float* y, int64_t begin, int64_t end, float* floats, int64_t* ints) {
                      run(plan, x, y, begin, end, floats, ints);
                    });
}

const Registered kRegistered("attention_block", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
