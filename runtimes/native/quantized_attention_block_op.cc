// QuantizedAttentionBlock's forms over an index map: attn_deploy/ops/quantized_attention_block.py says what they compute.
#include "attention_block_operator.h"
#include "kernels/quantized_attention_block.h"
#include "operators.h"
#include "quantized_linear_weights.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

const std::vector<Operand> kInputs = {
    {"x"},        {"norm_scale"}, {"norm_bias"}, {"weight_qkv", ElementType::kUint8}, {"weight_qkv_scale"},
    {"bias_qkv"}, {"weight_out", ElementType::kUint8}, {"weight_out_scale"}, {"bias_out"}};
constexpr size_t kNormScale = 1;
constexpr size_t kNormBias = 2;
constexpr QuantizedLinearInputs kQkv = {3, 4, 5};
constexpr QuantizedLinearInputs kOut = {6, 7, 8};

class QuantizedBlockKernel : public AttentionBlockKernel {
 public:
  using AttentionBlockKernel::AttentionBlockKernel;

  OrtStatus* Init(const OrtKernelInfo* info) override {
    ATTN_DEPLOY_RETURN_IF_ERROR(qkv_.Read(*this, info, kQkv));
    ATTN_DEPLOY_RETURN_IF_ERROR(out_.Read(*this, info, kOut));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormScale, qkv_.in(), &norm_scale_));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormBias, qkv_.in(), &norm_bias_));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadAttention(info, {qkv_.in(), qkv_.out()}, {out_.in(), out_.out()}, kOut.bias));
    static_cast<WindowAttention&>(plan_) = attention();
    plan_.norm_scale = norm_scale_.data();
    plan_.norm_bias = norm_bias_.data();
    plan_.qkv = qkv_.packed();
    plan_.out = out_.packed();
    return nullptr;
  }

 private:
  AttentionBlockScratch ScratchOf(int64_t windows) const override {
    return ATTN_DEPLOY_INT8_KERNEL(QuantizedAttentionBlockScratchOf)(plan_, windows);
  }
  void RunWindows(const float* x, float* y, int64_t begin, int64_t end, float* floats, int64_t* ints) const override {
    ATTN_DEPLOY_INT8_KERNEL(RunQuantizedAttentionBlock)(plan_, x, y, begin, end, floats, ints);
  }

  std::vector<float> norm_scale_, norm_bias_;
  QuantizedLinearWeights qkv_, out_;
  QuantizedAttentionBlockPlan plan_;
};

}  // namespace

void AppendQuantizedAttentionBlock(const OrtApi& api, Operators* operators) {
  AppendAttentionBlockForms(api, "QuantizedAttentionBlock", kInputs, MakeInitialized<QuantizedBlockKernel>,
                            operators);
}

}  // namespace attn_deploy::native
