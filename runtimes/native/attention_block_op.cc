// AttentionBlock's forms over an index map: LayerNorm, projections, attention and residual of every window in one node.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "index_map.h"
#include "kernels/attention_block.h"
#include "linear_weights.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct Form {
  const char* name;
  bool padded;
  bool cosine;
  bool bias;
};

constexpr Form kForms[] = {
    {"AttentionBlockIndexed", false, false, false},
    {"AttentionBlockIndexedBias", false, false, true},
    {"AttentionBlockIndexedCosine", false, true, false},
    {"AttentionBlockIndexedCosineBias", false, true, true},
    {"AttentionBlockIndexedPadded", true, false, false},
    {"AttentionBlockIndexedPaddedBias", true, false, true},
    {"AttentionBlockIndexedPaddedCosine", true, true, false},
    {"AttentionBlockIndexedPaddedCosineBias", true, true, true},
};

enum Input { kX, kNormScale, kNormBias, kWeightQkv, kBiasQkv, kWeightOut, kBiasOut, kIndex, kFirstExtra };

// Rows of a product below which weights would be read from the cache too often.
constexpr int64_t kRowsAtOnce = 96;
// Blocks that there should be at least, so that threads end together.
constexpr int64_t kEnoughBlocks = 8;

std::vector<Operand> Inputs(const Form& form) {
  std::vector<Operand> inputs = {{"x"},        {"norm_scale"}, {"norm_bias"}, {"weight_qkv"},
                                 {"bias_qkv"}, {"weight_out"}, {"bias_out"},  {"index", ElementType::kInt64}};
  if (form.padded) inputs.push_back({"fill"});
  if (form.cosine) inputs.push_back({"head_scale"});
  if (form.bias) {
    inputs.push_back({"windows_bias"});
    inputs.push_back({"bias_index", ElementType::kInt64});
  }
  return inputs;
}

// A copy of a constant input, so that it outlives the graph's own, which ONNX Runtime may free.
template <typename T>
std::vector<T> Copied(const InputTensor& tensor) {
  int64_t size = 1;
  for (int64_t d = 0; d < tensor.shape.rank; ++d) size *= tensor.shape.dims[d];
  const T* data = static_cast<const T*>(tensor.data);
  return {data, data + size};
}

class AttentionBlockKernel : public Kernel {
 public:
  using Kernel::Kernel;

  // Everything but x is a constant: checked and packed here.
  OrtStatus* Init(const OrtKernelInfo* info);

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const Form& form() const { return *static_cast<const Form*>(op.form); }
  OrtStatus* ReadExtra(const OrtKernelInfo* info, std::vector<InputTensor>* inputs) const;
  OrtStatus* CheckShape(const InputTensor& input, size_t at, const Shape& expected) const;
  OrtStatus* CheckIndex();
  OrtStatus* KeepExtra(const std::vector<InputTensor>& inputs);

  AttentionBlockPlan plan_;
  LinearWeights qkv_, out_;
  std::vector<float> bias_out_, fill_, head_scale_, bias_;
  std::vector<int64_t> index_, bias_index_, outside_;
};

// From bias_out on.
OrtStatus* AttentionBlockKernel::ReadExtra(const OrtKernelInfo* info, std::vector<InputTensor>* inputs) const {
  inputs->resize(op.inputs.size());
  for (size_t i = kBiasOut; i < inputs->size(); ++i) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(Api(), info, i, &(*inputs)[i]));
    if (!(*inputs)[i].present) {
      return Fail(std::string(op.inputs[i].name) + " is not a constant; expected an initializer of the model");
    }
  }
  return nullptr;
}

OrtStatus* AttentionBlockKernel::CheckShape(const InputTensor& input, size_t at, const Shape& expected) const {
  if (input.shape == expected) return nullptr;
  return Fail(std::string(op.inputs[at].name) + " has shape " + ToString(input.shape) + "; expected " +
              ToString(expected));
}

// Copies what the form has behind its index map: fill, head_scale, bias.
OrtStatus* AttentionBlockKernel::KeepExtra(const std::vector<InputTensor>& inputs) {
  size_t at = kFirstExtra;
  if (form().padded) {
    ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {3, {3, plan_.heads, plan_.shape.head_dim}}));
    plan_.fill = (fill_ = Copied<float>(inputs[at++])).data();
  }
  if (form().cosine) {
    ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {1, {plan_.heads}}));
    plan_.head_scale = (head_scale_ = Copied<float>(inputs[at++])).data();
  }
  if (!form().bias) return nullptr;
  const int64_t distinct = inputs[at].shape.dims[0];
  ATTN_DEPLOY_RETURN_IF_ERROR(
      CheckShape(inputs[at], at, {4, {distinct, plan_.heads, plan_.length, plan_.length}}));
  plan_.bias = (bias_ = Copied<float>(inputs[at++])).data();
  ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {1, {plan_.windows}}));
  plan_.bias_index = (bias_index_ = Copied<int64_t>(inputs[at])).data();
  for (const int64_t window : bias_index_) {
    if (window < 0 || window >= distinct) {
      return Fail("bias_index holds " + std::to_string(window) + "; expected 0 to " + std::to_string(distinct - 1));
    }
  }
  return nullptr;
}

// Every token in at most one window; without padding in exactly one.
OrtStatus* AttentionBlockKernel::CheckIndex() {
  bool covers_every_token = false;
  const auto count = static_cast<int64_t>(index_.size());
  const std::string fault = CheckIndexMap(index_.data(), count, plan_.tokens, form().padded, &covers_every_token);
  if (!fault.empty()) return Fail(fault);
  if (covers_every_token) return nullptr;
  if (!form().padded) return Fail("index leaves out a token; expected every token in one window");
  std::vector<bool> inside(static_cast<size_t>(plan_.tokens), false);
  for (const int64_t token : index_) {
    if (token >= 0) inside[static_cast<size_t>(token)] = true;
  }
  for (int64_t token = 0; token < plan_.tokens; ++token) {
    if (!inside[static_cast<size_t>(token)]) outside_.push_back(token);
  }
  return nullptr;
}

OrtStatus* AttentionBlockKernel::Init(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &plan_.epsilon));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "scale", &plan_.scale));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "heads", &plan_.heads));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "tokens", &plan_.tokens));
  ATTN_DEPLOY_RETURN_IF_ERROR(qkv_.Read(*this, info, {kWeightQkv, kBiasQkv, kNormScale, kNormBias}));
  ATTN_DEPLOY_RETURN_IF_ERROR(out_.Read(*this, info, {kWeightOut, kBiasOut}));
  plan_.qkv = qkv_.packed();
  plan_.out = out_.packed();
  plan_.channels = plan_.qkv.in;
  if (plan_.heads < 1 || plan_.channels % plan_.heads != 0) {
    return Fail(std::to_string(plan_.channels) + " channels do not divide by " + std::to_string(plan_.heads) + " heads");
  }
  if (plan_.qkv.out != 3 * plan_.channels || plan_.out.in != plan_.channels || plan_.out.out != plan_.channels) {
    return Fail("weight_qkv gives " + std::to_string(plan_.qkv.out) + " columns and weight_out is [" +
                std::to_string(plan_.out.in) + "," + std::to_string(plan_.out.out) + "]; expected three times and [" +
                std::to_string(plan_.channels) + "," + std::to_string(plan_.channels) + "]");
  }
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadExtra(info, &inputs));
  if (inputs[kIndex].shape.rank != 2) {
    return Fail("index has shape " + ToString(inputs[kIndex].shape) + "; expected [windows, length]");
  }
  plan_.windows = inputs[kIndex].shape.dims[0];
  plan_.length = inputs[kIndex].shape.dims[1];
  plan_.shape.query_len = plan_.shape.key_len = plan_.length;
  plan_.shape.head_dim = plan_.shape.value_dim = plan_.channels / plan_.heads;
  plan_.shape.cosine = form().cosine;
  bias_out_ = Copied<float>(inputs[kBiasOut]);
  plan_.index = (index_ = Copied<int64_t>(inputs[kIndex])).data();
  ATTN_DEPLOY_RETURN_IF_ERROR(CheckIndex());
  return KeepExtra(inputs);
}

OrtStatus* AttentionBlockKernel::Compute(OrtKernelContext* context) const {
  InputTensor x;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, kX, &x));
  Shape expected = x.shape;
  if (x.shape.rank == 3) {
    expected.dims[1] = plan_.tokens;
    expected.dims[2] = plan_.channels;
  }
  if (x.shape.rank != 3 || x.shape != expected) {
    return Fail("x has shape " + ToString(x.shape) + "; expected [batch," + std::to_string(plan_.tokens) + "," +
                std::to_string(plan_.channels) + "]");
  }
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, x.shape, &output));
  const int64_t batch = x.shape.dims[0];
  const int64_t sample = plan_.tokens * plan_.channels;
  // Windows of one block: enough rows for the products, unless threads would have too few blocks then.
  const int64_t wanted = (kRowsAtOnce + plan_.length - 1) / std::max<int64_t>(plan_.length, 1);
  const int64_t most = std::max<int64_t>(plan_.windows * batch / kEnoughBlocks, 1);
  const int64_t together = std::max<int64_t>(std::min({wanted, most, plan_.windows}), 1);
  const int64_t blocks = (plan_.windows + together - 1) / together;
  const auto run = ATTN_DEPLOY_KERNEL(RunAttentionBlock);
  const auto outside = ATTN_DEPLOY_KERNEL(RunOutsideWindows);
  const AttentionBlockScratch size = ATTN_DEPLOY_KERNEL(AttentionBlockScratchOf)(plan_, together);
  return ParallelBlocks(Api(), context, batch * blocks, [&](int64_t block) {
    const float* from = static_cast<const float*>(x.data) + block / blocks * sample;
    float* to = static_cast<float*>(output) + block / blocks * sample;
    const int64_t begin = block % blocks * together;
    float* const floats = ThreadScratch().Floats(size.floats + 1 + 2 * size.ints);
    auto* const ints = reinterpret_cast<int64_t*>(floats + (size.floats + 1) / 2 * 2);
    run(plan_, from, to, begin, std::min(begin + together, plan_.windows), floats, ints);
    if (begin == 0 && !outside_.empty()) {
      outside(plan_, from, to, bias_out_.data(), outside_.data(), static_cast<int64_t>(outside_.size()));
    }
  });
}

OrtStatus* MakeAttentionBlock(const CpuOp& op, const OrtKernelInfo* info, std::string node_name,
                              std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<AttentionBlockKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

}  // namespace

void AppendAttentionBlock(const OrtApi& api, Operators* operators) {
  for (const Form& form : kForms) {
    operators->push_back(
        std::make_unique<CpuOp>(api, form.name, Inputs(form), MakeAttentionBlock, LikeFirstInput, &form));
  }
}

}  // namespace attn_deploy::native
