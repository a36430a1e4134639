#include <algorithm>
#include <string>
#include <utility>

#include "kernels/spatial_pool.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct PoolForm {
  const char* name;
  int mean;     // its channel of the output; -1 for none
  int maximum;  // as `mean`
  int channels;
};

constexpr PoolForm kForms[] = {{"SpatialPoolMean", 0, -1, 1},
                               {"SpatialPoolMax", -1, 0, 1},
                               {"SpatialPoolMeanMax", 0, 1, 2},
                               {"SpatialPoolMaxMean", 1, 0, 2}};

// Elements of a block of work. Pixels of a block are a multiple of kPixels, what the kernel takes at once at most.
constexpr int64_t kElementsPerBlock = 16384;
constexpr int64_t kPixels = 128;

class SpatialPoolKernel : public Kernel {
 public:
  SpatialPoolKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(*static_cast<const PoolForm*>(op.form)) {}

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const PoolForm& form_;
};

OrtStatus* SpatialPoolKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& x = inputs[0].shape;
  if (x.rank != 4 || x.dims[1] == 0) {
    return Fail("x has shape " + ToString(x) + "; expected [batch,channels,height,width] with channels");
  }
  Shape pooled = x;
  pooled.dims[1] = form_.channels;
  void* data = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, pooled, &data));

  const auto run = ATTN_DEPLOY_KERNEL(SpatialPool);
  const int64_t channels = x.dims[1];
  const int64_t pixels = x.dims[2] * x.dims[3];
  const int64_t width = std::max<int64_t>(kElementsPerBlock / channels / kPixels, 1) * kPixels;
  const int64_t parts = (pixels + width - 1) / width;
  return ParallelBlocks(Api(), context, x.dims[0] * parts, [&](int64_t block) {
    const int64_t sample = block / parts;
    const int64_t first = block % parts * width;
    float* const output = static_cast<float*>(data) + sample * form_.channels * pixels + first;
    run(static_cast<const float*>(inputs[0].data) + sample * channels * pixels + first, channels, pixels,
        std::min(width, pixels - first), form_.mean < 0 ? nullptr : output + form_.mean * pixels,
        form_.maximum < 0 ? nullptr : output + form_.maximum * pixels);
  });
}

OrtStatus* MakeSpatialPool(const CpuOp& op, const OrtKernelInfo*, std::string node_name,
                           std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<SpatialPoolKernel>(op, std::move(node_name));
  return nullptr;
}

template <int kChannels>
bool InferPooled(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  if (inputs[0].rank != 4) return false;
  *output = inputs[0];
  output->dims[1] = kChannels;
  return true;
}

}  // namespace

void AppendSpatialPool(const OrtApi& api, Operators* operators) {
  for (const PoolForm& form : kForms) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, std::vector<Operand>{{"x"}}, MakeSpatialPool,
                                                 form.channels == 1 ? InferPooled<1> : InferPooled<2>, &form));
  }
}

}  // namespace attn_deploy::native
