// AttentionBlock's forms over an index map: LayerNorm, projections, attention and residual of every window in one node.
#include "attention_block_operator.h"
#include "linear_weights.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

const std::vector<Operand> kInputs = {{"x"},        {"norm_scale"}, {"norm_bias"}, {"weight_qkv"},
                                      {"bias_qkv"}, {"weight_out"}, {"bias_out"}};
enum Input { kX, kNormScale, kNormBias, kWeightQkv, kBiasQkv, kWeightOut, kBiasOut };

class FloatBlockKernel : public AttentionBlockKernel {
 public:
  using AttentionBlockKernel::AttentionBlockKernel;

  OrtStatus* Init(const OrtKernelInfo* info) override {
    ATTN_DEPLOY_RETURN_IF_ERROR(qkv_.Read(*this, info, {kWeightQkv, kBiasQkv, kNormScale, kNormBias}));
    ATTN_DEPLOY_RETURN_IF_ERROR(out_.Read(*this, info, {kWeightOut, kBiasOut}));
    ATTN_DEPLOY_RETURN_IF_ERROR(
        ReadAttention(info, {qkv_.in(), qkv_.out()}, {out_.in(), out_.out()}, kBiasOut));
    static_cast<WindowAttention&>(plan_) = attention();
    plan_.qkv = qkv_.packed();
    plan_.out = out_.packed();
    return nullptr;
  }

 private:
  AttentionBlockScratch ScratchOf(int64_t windows) const override {
    return ATTN_DEPLOY_KERNEL(AttentionBlockScratchOf)(plan_, windows);
  }
  void RunWindows(const float* x, float* y, int64_t begin, int64_t end, float* floats, int64_t* ints) const override {
    ATTN_DEPLOY_KERNEL(RunAttentionBlock)(plan_, x, y, begin, end, floats, ints);
  }

  LinearWeights qkv_, out_;
  AttentionBlockPlan plan_;
};

}  // namespace

void AppendAttentionBlock(const OrtApi& api, Operators* operators) {
  AppendAttentionBlockForms(api, "AttentionBlock", kInputs, MakeInitialized<FloatBlockKernel>, operators);
}

}  // namespace attn_deploy::native
