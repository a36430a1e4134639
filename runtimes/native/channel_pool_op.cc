#include <algorithm>
#include <string>
#include <utility>

#include "kernels/channel_pool.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct PoolForm {
  const char* name;
  bool mean;
  bool maximum;
};

constexpr PoolForm kForms[] = {
    {"ChannelPoolMean", true, false}, {"ChannelPoolMax", false, true}, {"ChannelPoolMeanMax", true, true}};

// Elements of a block of work: about 1.5 us from a cache, a third of what waking a thread takes.
constexpr int64_t kElementsPerBlock = 16384;

class ChannelPoolKernel : public Kernel {
 public:
  ChannelPoolKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(*static_cast<const PoolForm*>(op.form)) {}

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const PoolForm& form_;
};

OrtStatus* ChannelPoolKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& x = inputs[0].shape;
  if (x.rank != 4 || x.dims[2] * x.dims[3] == 0) {
    return Fail("x has shape " + ToString(x) + "; expected [batch,channels,height,width] with pixels");
  }
  const Shape pooled = {4, {x.dims[0], x.dims[1], 1, 1}};
  void* mean = nullptr;
  void* maximum = nullptr;
  size_t outputs = 0;
  if (form_.mean) ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, outputs++, pooled, &mean));
  if (form_.maximum) ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, outputs, pooled, &maximum));

  const auto run = ATTN_DEPLOY_KERNEL(ChannelPool);
  const int64_t planes = x.dims[0] * x.dims[1];
  const int64_t pixels = x.dims[2] * x.dims[3];
  const int64_t together = std::max<int64_t>(kElementsPerBlock / pixels, 1);
  return ParallelBlocks(Api(), context, (planes + together - 1) / together, [&](int64_t block) {
    const int64_t first = block * together;
    run(static_cast<const float*>(inputs[0].data) + first * pixels, std::min(together, planes - first), pixels,
        mean == nullptr ? nullptr : static_cast<float*>(mean) + first,
        maximum == nullptr ? nullptr : static_cast<float*>(maximum) + first);
  });
}

OrtStatus* MakeChannelPool(const CpuOp& op, const OrtKernelInfo*, std::string node_name,
                           std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<ChannelPoolKernel>(op, std::move(node_name));
  return nullptr;
}

bool InferPooled(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  if (inputs[0].rank != 4) return false;
  *output = inputs[0];
  output->dims[2] = output->dims[3] = 1;
  return true;
}

}  // namespace

void AppendChannelPool(const OrtApi& api, Operators* operators) {
  for (const PoolForm& form : kForms) {
    std::vector<CpuOp::InferShape> infer_more;
    if (form.mean && form.maximum) infer_more.push_back(InferPooled);
    operators->push_back(std::make_unique<CpuOp>(api, form.name, std::vector<Operand>{{"x"}}, MakeChannelPool,
                                                 InferPooled, &form, infer_more));
  }
}

}  // namespace attn_deploy::native
