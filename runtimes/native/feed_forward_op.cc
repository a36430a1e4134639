// FeedForward{Gelu|Relu|Silu|GeluTanh}: attn_deploy/ops/feed_forward.py says what they compute.
#include "feed_forward_operator.h"
#include "kernels/feed_forward.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

const std::vector<Operand> kInputs = {{"x"},     {"norm_scale"}, {"norm_bias"}, {"weight1"},
                                      {"bias1"}, {"weight2"},    {"bias2"}};
constexpr LinearInputs kFirst = {3, 4, 1, 2};
constexpr LinearInputs kSecond = {5, 6};

class FloatKernel : public FeedForwardKernel {
 public:
  using FeedForwardKernel::FeedForwardKernel;

  OrtStatus* Init(const OrtKernelInfo* info) override {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &epsilon_));
    ATTN_DEPLOY_RETURN_IF_ERROR(first_.Read(*this, info, kFirst));
    ATTN_DEPLOY_RETURN_IF_ERROR(second_.Read(*this, info, kSecond));
    return CheckLayers({first_.in(), first_.out()}, {second_.in(), second_.out()});
  }

 private:
  OrtStatus* Run(OrtKernelContext* context, const float* x, float* y, int64_t rows) const override {
    FeedForwardPlan plan;
    plan.rows = rows;
    plan.channels = first_.in();
    plan.hidden = first_.out();
    plan.activation = activation();
    plan.epsilon = epsilon_;
    ATTN_DEPLOY_KERNEL(PlanFeedForward)(&plan);
    const FeedForwardArrays arrays = {x, plan.channels, first_.packed(), second_.packed(), y, plan.channels};
    const auto run = ATTN_DEPLOY_KERNEL(RunFeedForward);
    return ParallelBlocks(Api(), context, plan.blocks,
                          [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
  }

  float epsilon_ = 0.0f;
  LinearWeights first_, second_;
};

}  // namespace

void AppendFeedForward(const OrtApi& api, Operators* operators) {
  AppendFeedForwardForms(api, "FeedForward", kInputs, MakeInitialized<FloatKernel>, operators);
}

}  // namespace attn_deploy::native
