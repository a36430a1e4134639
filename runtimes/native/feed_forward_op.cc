// FeedForward{Gelu|Relu|Silu|GeluTanh}: attn_deploy/ops/feed_forward.py says what they compute.
#include <string>
#include <utility>
#include <vector>

#include "kernels/feed_forward.h"
#include "linear_weights.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct FeedForwardForm {
  const char* name;
  Activation activation;
};

constexpr FeedForwardForm kForms[] = {{"FeedForwardGelu", Activation::kGelu},
                                      {"FeedForwardRelu", Activation::kRelu},
                                      {"FeedForwardSilu", Activation::kSilu},
                                      {"FeedForwardGeluTanh", Activation::kGeluTanh}};

const std::vector<Operand> kInputs = {{"x"},     {"norm_scale"}, {"norm_bias"}, {"weight1"},
                                      {"bias1"}, {"weight2"},    {"bias2"}};
constexpr LinearInputs kFirst = {3, 4, 1, 2};
constexpr LinearInputs kSecond = {5, 6};

class FeedForwardKernel : public Kernel {
 public:
  FeedForwardKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(*static_cast<const FeedForwardForm*>(op.form)) {}

  OrtStatus* Init(const OrtKernelInfo* info) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &epsilon_));
    ATTN_DEPLOY_RETURN_IF_ERROR(first_.Read(*this, info, kFirst));
    ATTN_DEPLOY_RETURN_IF_ERROR(second_.Read(*this, info, kSecond));
    const Shape got = {2, {second_.in(), second_.out()}};
    const Shape expected = {2, {first_.out(), first_.in()}};
    if (got == expected) return nullptr;
    return Fail("weight2 has shape " + ToString(got) + "; expected " + ToString(expected) + ", weight1's transposed");
  }

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const FeedForwardForm& form_;
  float epsilon_ = 0.0f;
  LinearWeights first_;
  LinearWeights second_;
};

OrtStatus* FeedForwardKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  FeedForwardPlan plan;
  ATTN_DEPLOY_RETURN_IF_ERROR(CountRows(*this, inputs[0].shape, first_.in(), &plan.rows));
  void* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, inputs[0].shape, &y));
  if (plan.rows == 0) return nullptr;

  plan.channels = first_.in();
  plan.hidden = first_.out();
  plan.activation = form_.activation;
  plan.epsilon = epsilon_;
  ATTN_DEPLOY_KERNEL(PlanFeedForward)(&plan);
  const FeedForwardArrays arrays = {static_cast<const float*>(inputs[0].data), plan.channels, first_.packed(),
                                    second_.packed(), static_cast<float*>(y), plan.channels};
  const auto run = ATTN_DEPLOY_KERNEL(RunFeedForward);
  return ParallelBlocks(Api(), context, plan.blocks,
                        [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
}

OrtStatus* MakeFeedForward(const CpuOp& op, const OrtKernelInfo* info, std::string node_name,
                           std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<FeedForwardKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

}  // namespace

void AppendFeedForward(const OrtApi& api, Operators* operators) {
  for (const FeedForwardForm& form : kForms) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, kInputs, MakeFeedForward, LikeFirstInput, &form));
  }
}

}  // namespace attn_deploy::native
