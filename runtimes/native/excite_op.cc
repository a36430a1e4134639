// What stands between the pool and the gate of channel attention, as one operator on the pooled vector, whose bytes are
// the same in the plain and the blocked layout.
#include "kernels/excite.h"

#include <algorithm>
#include <cstring>

#include "blocked_map.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct ExciteForm {
  const char* name;
  Activation hidden;
  Activation gate;
};

constexpr ExciteForm kForms[] = {
    {"BlockedExciteReluSigmoid", Activation::kRelu, Activation::kSigmoid},
    {"BlockedExciteReluHardSigmoid", Activation::kRelu, Activation::kHardSigmoid},
    {"BlockedExciteSiluSigmoid", Activation::kSilu, Activation::kSigmoid},
    {"BlockedExciteSiluHardSigmoid", Activation::kSilu, Activation::kHardSigmoid},
    {"BlockedExciteHardswishSigmoid", Activation::kHardswish, Activation::kSigmoid},
    {"BlockedExciteHardswishHardSigmoid", Activation::kHardswish, Activation::kHardSigmoid},
};

// Weights of a layer from which two threads are faster than one, and of a block of work: 64 KiB, a few us.
constexpr int64_t kWeightsPerBlock = 16384;

// [batch, channels padded to blocks, 1, 1] in and out; padding comes out as 0.
class VectorKernel : public BlockedKernel {
 public:
  using BlockedKernel::BlockedKernel;

 protected:
  OrtStatus* Prepare(OrtKernelContext* context, BlockedMap* map, const float** pooled, float** gate) const;
};

OrtStatus* VectorKernel::Prepare(OrtKernelContext* context, BlockedMap* map, const float** pooled,
                                 float** gate) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("pooled", inputs[0].shape, map));
  if (map->pixels != 1) return Fail("pooled has shape " + ToString(inputs[0].shape) + "; expected one pixel");
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, inputs[0].shape, &output));
  *pooled = static_cast<const float*>(inputs[0].data);
  *gate = static_cast<float*>(output);
  for (int64_t sample = 0; sample < map->batch; ++sample) {
    std::fill(*gate + sample * map->padded + channels(), *gate + (sample + 1) * map->padded, 0.0f);
  }
  return nullptr;
}

class ExciteKernel : public VectorKernel {
 public:
  ExciteKernel(const CpuOp& op, std::string node_name)
      : VectorKernel(op, std::move(node_name)), form_(*static_cast<const ExciteForm*>(op.form)) {}

  OrtStatus* Compute(OrtKernelContext* context) const override;
  OrtStatus* Pack(const OrtKernelInfo* info);

 private:
  int64_t panels() const { return (channels() + kExcitePanel - 1) / kExcitePanel; }

  const ExciteForm& form_;
  int64_t reduced_ = 0;
  AlignedBuffer memory_;
  float* weight1_ = nullptr;  // [reduced, channels]
  float* bias1_ = nullptr;    // [reduced]
  float* weight2_ = nullptr;  // [panels, reduced, kExcitePanel]
  float* bias2_ = nullptr;    // [panels, kExcitePanel]
};

OrtStatus* ExciteKernel::Pack(const OrtKernelInfo* info) {
  InputTensor given[4];
  for (size_t i = 0; i < 4; ++i) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(Api(), info, i + 1, &given[i]));
    if (!given[i].present) return Fail(std::string(op.inputs[i + 1].name) + " is no constant");
  }
  reduced_ = given[0].shape.rank == 2 ? given[0].shape.dims[0] : 0;
  const Shape expected[4] = {
      {2, {reduced_, channels()}}, {1, {reduced_}}, {2, {channels(), reduced_}}, {1, {channels()}}};
  for (size_t i = 0; i < 4; ++i) {
    if (reduced_ < 1 || given[i].shape != expected[i] || given[i].type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      return Fail(std::string(op.inputs[i + 1].name) + " has shape " + ToString(given[i].shape) + "; expected " +
                  ToString(expected[i]) + " of float32");
    }
  }
  const auto data = [&](size_t i) { return static_cast<const float*>(given[i].data); };
  const int64_t padded = panels() * kExcitePanel;
  float* memory = memory_.Floats(reduced_ * channels() + reduced_ + padded * (reduced_ + 1));
  weight2_ = memory;
  bias2_ = weight2_ + padded * reduced_;
  bias1_ = bias2_ + padded;
  weight1_ = bias1_ + reduced_;
  std::copy_n(data(0), reduced_ * channels(), weight1_);
  std::copy_n(data(1), reduced_, bias1_);
  std::fill_n(weight2_, padded * (reduced_ + 1), 0.0f);
  for (int64_t c = 0; c < channels(); ++c) {
    float* const column = weight2_ + c / kExcitePanel * kExcitePanel * reduced_ + c % kExcitePanel;
    for (int64_t r = 0; r < reduced_; ++r) column[r * kExcitePanel] = data(2)[c * reduced_ + r];
  }
  std::copy_n(data(3), channels(), bias2_);
  return nullptr;
}

OrtStatus* ExciteKernel::Compute(OrtKernelContext* context) const {
  BlockedMap map;
  const float* pooled = nullptr;
  float* gate = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(Prepare(context, &map, &pooled, &gate));
  float* const hidden = ThreadScratch().Floats(map.batch * reduced_);
  const auto run_hidden = ATTN_DEPLOY_KERNEL(ExciteHidden);
  const auto run_gate = ATTN_DEPLOY_KERNEL(ExciteGate);
  const auto hidden_rows = [&](int64_t begin, int64_t end) {
    for (int64_t sample = 0; sample < map.batch; ++sample) {
      run_hidden(form_.hidden, pooled + sample * map.padded, weight1_, bias1_, channels(), begin, end,
                 hidden + sample * reduced_);
    }
  };
  const auto gate_panel = [&](int64_t panel) {
    const int64_t first = panel * kExcitePanel;
    for (int64_t sample = 0; sample < map.batch; ++sample) {
      run_gate(form_.gate, hidden + sample * reduced_, weight2_ + first * reduced_, bias2_ + first, reduced_,
               std::min(channels() - first, kExcitePanel), gate + sample * map.padded + first);
    }
  };
  if (reduced_ * channels() * map.batch <= 2 * kWeightsPerBlock) {
    return ParallelBlocks(Api(), context, 1, [&](int64_t) {
      hidden_rows(0, reduced_);
      for (int64_t panel = 0; panel < panels(); ++panel) gate_panel(panel);
    });
  }
  const int64_t rows = std::max<int64_t>(kWeightsPerBlock / channels() / 4 * 4, 4);
  ATTN_DEPLOY_RETURN_IF_ERROR(ParallelBlocks(Api(), context, (reduced_ + rows - 1) / rows, [&](int64_t block) {
    hidden_rows(block * rows, std::min((block + 1) * rows, reduced_));
  }));
  const int64_t together = std::max<int64_t>(kWeightsPerBlock / (kExcitePanel * reduced_), 1);
  return ParallelBlocks(Api(), context, (panels() + together - 1) / together, [&](int64_t block) {
    for (int64_t p = block * together; p < std::min((block + 1) * together, panels()); ++p) gate_panel(p);
  });
}

OrtStatus* MakeExcite(const CpuOp& op, const OrtKernelInfo* info, std::string node_name,
                      std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<ExciteKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->ReadAttributes(info));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Pack(info));
  *kernel = std::move(made);
  return nullptr;
}

class EcaKernel : public VectorKernel {
 public:
  using VectorKernel::VectorKernel;

  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* EcaKernel::Compute(OrtKernelContext* context) const {
  InputTensor weight;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, 1, &weight));
  const int64_t taps = weight.shape.rank == 1 ? weight.shape.dims[0] : 0;
  if (taps % 2 == 0) return Fail("weight has shape " + ToString(weight.shape) + "; expected [taps], an odd number");
  BlockedMap map;
  const float* pooled = nullptr;
  float* gate = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(Prepare(context, &map, &pooled, &gate));
  const int64_t edge = taps / 2;
  float* const padded = ThreadScratch().Floats(channels() + taps - 1);
  std::fill_n(padded, edge, 0.0f);
  std::fill_n(padded + edge + channels(), edge, 0.0f);
  const auto run = ATTN_DEPLOY_KERNEL(EcaGate);
  return ParallelBlocks(Api(), context, 1, [&](int64_t) {
    for (int64_t sample = 0; sample < map.batch; ++sample) {
      std::copy_n(pooled + sample * map.padded, channels(), padded + edge);
      run(Activation::kSigmoid, padded, static_cast<const float*>(weight.data), taps, channels(),
          gate + sample * map.padded);
    }
  });
}

}  // namespace

void AppendExcite(const OrtApi& api, Operators* operators) {
  const std::vector<Operand> inputs = {{"pooled"}, {"weight1"}, {"bias1"}, {"weight2"}, {"bias2"}};
  for (const ExciteForm& form : kForms) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, inputs, MakeExcite, LikeFirstInput, &form));
  }
  const std::vector<Operand> eca = {{"pooled"}, {"weight"}};
  operators->push_back(
      std::make_unique<CpuOp>(api, "BlockedEca", eca, MakeBlocked<EcaKernel>, LikeFirstInput));
}

}  // namespace attn_deploy::native
