// QuantizedFeedForward{Gelu|Relu|Silu|GeluTanh}: attn_deploy/ops/quantized_feed_forward.py says what they compute.
#include "feed_forward_operator.h"
#include "kernels/quantized_feed_forward.h"
#include "operators.h"
#include "quantized_linear_weights.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

const std::vector<Operand> kInputs = {
    {"x"},     {"norm_scale"}, {"norm_bias"}, {"weight1", ElementType::kUint8}, {"weight1_scale"},
    {"bias1"}, {"weight2", ElementType::kUint8}, {"weight2_scale"}, {"bias2"}};
constexpr size_t kNormScale = 1;
constexpr size_t kNormBias = 2;
constexpr QuantizedLinearInputs kFirst = {3, 4, 5};
constexpr QuantizedLinearInputs kSecond = {6, 7, 8};

class QuantizedKernel : public FeedForwardKernel {
 public:
  using FeedForwardKernel::FeedForwardKernel;

  OrtStatus* Init(const OrtKernelInfo* info) override {
    int64_t groups = 0;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &epsilon_));
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "groups", &groups));
    ATTN_DEPLOY_RETURN_IF_ERROR(first_.Read(*this, info, kFirst));
    ATTN_DEPLOY_RETURN_IF_ERROR(second_.Read(*this, info, kSecond, groups));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormScale, first_.in(), &norm_scale_));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormBias, first_.in(), &norm_bias_));
    return CheckLayers({first_.in(), first_.out()}, {second_.in(), second_.out()});
  }

 private:
  OrtStatus* Run(OrtKernelContext* context, const float* x, float* y, int64_t rows) const override {
    QuantizedFeedForwardPlan plan;
    plan.rows = rows;
    plan.channels = first_.in();
    plan.hidden = first_.out();
    plan.groups = second_.packed().groups;
    plan.activation = activation();
    plan.epsilon = epsilon_;
    ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedFeedForward)(&plan);
    QuantizedFeedForwardArrays arrays;
    arrays.x = x;
    arrays.norm_scale = norm_scale_.data();
    arrays.norm_bias = norm_bias_.data();
    arrays.weights1 = first_.packed();
    arrays.weights2 = second_.packed();
    arrays.y = y;
    arrays.x_stride = arrays.y_stride = plan.channels;
    const auto run = ATTN_DEPLOY_INT8_KERNEL(RunQuantizedFeedForward);
    return ParallelBlocks(Api(), context, plan.blocks,
                          [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
  }

  float epsilon_ = 0.0f;
  std::vector<float> norm_scale_, norm_bias_;
  QuantizedLinearWeights first_, second_;
};

}  // namespace

void AppendQuantizedFeedForward(const OrtApi& api, Operators* operators) {
  AppendFeedForwardForms(api, "QuantizedFeedForward", kInputs, MakeInitialized<QuantizedKernel>, operators);
}

}  // namespace attn_deploy::native
