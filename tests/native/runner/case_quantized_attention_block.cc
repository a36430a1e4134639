// Cases of the kernel RunQuantizedAttentionBlock, as attention_block_case.h has them.
#include "attention_block_case.h"
#include "kernels/quantized_attention_block.h"
#include "quantized_input.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> RunCase(const Case& c) {
  AlignedBuffer qkv, out;
  QuantizedAttentionBlockPlan plan;
  ReadAttention(c, 9, &plan);
  plan.norm_scale = c.inputs[1].floats();
  plan.norm_bias = c.inputs[2].floats();
  plan.qkv = PackedInput(c, 3, 1, &qkv);
  plan.out = PackedInput(c, 6, 1, &out);
  const auto run = ATTN_DEPLOY_INT8_KERNEL(RunQuantizedAttentionBlock);
  const AttentionBlockScratch size = ATTN_DEPLOY_INT8_KERNEL(QuantizedAttentionBlockScratchOf)(plan, c.ints.at(4));
  return RunSamples(c, plan, size, c.inputs[8].floats(),
                    [&](const float* x, float* y, int64_t begin, int64_t end, float* floats, int64_t* ints) {
                      run(plan, x, y, begin, end, floats, ints);
                    });
}

const Registered kRegistered("quantized_attention_block", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
