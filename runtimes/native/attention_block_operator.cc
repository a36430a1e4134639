#include "attention_block_operator.h"

#include <algorithm>

#include "index_map.h"

namespace attn_deploy::native {

using namespace ort;

namespace {

struct Form {
  const char* suffix;
  bool padded;
  bool cosine;
  bool bias;
};

constexpr Form kForms[] = {
    {"Indexed", false, false, false},         {"IndexedBias", false, false, true},
    {"IndexedCosine", false, true, false},    {"IndexedCosineBias", false, true, true},
    {"IndexedPadded", true, false, false},    {"IndexedPaddedBias", true, false, true},
    {"IndexedPaddedCosine", true, true, false}, {"IndexedPaddedCosineBias", true, true, true},
};

constexpr size_t kX = 0;

// Rows of a product below which weights would be read from the cache too often.
constexpr int64_t kRowsAtOnce = 96;
// Blocks that there should be at least, so that threads end together.
constexpr int64_t kEnoughBlocks = 8;

const Form& FormOf(const Kernel& kernel) { return *static_cast<const Form*>(kernel.op.form); }

// A copy of a constant input, so that it outlives the graph's own, which ONNX Runtime may free.
template <typename T>
std::vector<T> Copied(const InputTensor& tensor) {
  int64_t size = 1;
  for (int64_t d = 0; d < tensor.shape.rank; ++d) size *= tensor.shape.dims[d];
  const T* data = static_cast<const T*>(tensor.data);
  return {data, data + size};
}

// The constants from input `first` on; others stay empty.
OrtStatus* ReadConstants(const Kernel& kernel, const OrtKernelInfo* info, size_t first,
                         std::vector<InputTensor>* inputs) {
  inputs->resize(kernel.op.inputs.size());
  for (size_t i = first; i < inputs->size(); ++i) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(kernel.Api(), info, i, &(*inputs)[i]));
    if (!(*inputs)[i].present) {
      return kernel.Fail(std::string(kernel.op.inputs[i].name) +
                         " is not a constant; expected an initializer of the model");
    }
  }
  return nullptr;
}

}  // namespace

OrtStatus* AttentionBlockKernel::CheckShape(const InputTensor& input, size_t at, const Shape& expected) const {
  if (input.shape == expected) return nullptr;
  return Fail(std::string(op.inputs[at].name) + " has shape " + ToString(input.shape) + "; expected " +
              ToString(expected));
}

// Copies what the form has behind its index map, from input `at` on: fill, head_scale, bias.
OrtStatus* AttentionBlockKernel::KeepExtra(const std::vector<InputTensor>& inputs, size_t at) {
  const Form& form = FormOf(*this);
  if (form.padded) {
    ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {3, {3, attention_.heads, attention_.shape.head_dim}}));
    attention_.fill = (fill_ = Copied<float>(inputs[at++])).data();
  }
  if (form.cosine) {
    ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {1, {attention_.heads}}));
    attention_.head_scale = (head_scale_ = Copied<float>(inputs[at++])).data();
  }
  if (!form.bias) return nullptr;
  const int64_t distinct = inputs[at].shape.dims[0];
  ATTN_DEPLOY_RETURN_IF_ERROR(
      CheckShape(inputs[at], at, {4, {distinct, attention_.heads, attention_.length, attention_.length}}));
  attention_.bias = (bias_ = Copied<float>(inputs[at++])).data();
  ATTN_DEPLOY_RETURN_IF_ERROR(CheckShape(inputs[at], at, {1, {attention_.windows}}));
  attention_.bias_index = (bias_index_ = Copied<int64_t>(inputs[at])).data();
  for (const int64_t window : bias_index_) {
    if (window < 0 || window >= distinct) {
      return Fail("bias_index holds " + std::to_string(window) + "; expected 0 to " + std::to_string(distinct - 1));
    }
  }
  return nullptr;
}

// Every token in at most one window; without padding in exactly one.
OrtStatus* AttentionBlockKernel::CheckIndex(bool padded) {
  bool covers_every_token = false;
  const auto count = static_cast<int64_t>(index_.size());
  const std::string fault = CheckIndexMap(index_.data(), count, attention_.tokens, padded, &covers_every_token);
  if (!fault.empty()) return Fail(fault);
  if (covers_every_token) return nullptr;
  if (!padded) return Fail("index leaves out a token; expected every token in one window");
  std::vector<bool> inside(static_cast<size_t>(attention_.tokens), false);
  for (const int64_t token : index_) {
    if (token >= 0) inside[static_cast<size_t>(token)] = true;
  }
  for (int64_t token = 0; token < attention_.tokens; ++token) {
    if (!inside[static_cast<size_t>(token)]) outside_.push_back(token);
  }
  return nullptr;
}

OrtStatus* AttentionBlockKernel::ReadAttention(const OrtKernelInfo* info, Projection qkv, Projection out,
                                               size_t bias_out) {
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &attention_.epsilon));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "scale", &attention_.scale));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "heads", &attention_.heads));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "tokens", &attention_.tokens));
  const int64_t channels = attention_.channels = qkv.in;
  if (attention_.heads < 1 || channels % attention_.heads != 0) {
    return Fail(std::to_string(channels) + " channels do not divide by " + std::to_string(attention_.heads) +
                " heads");
  }
  if (qkv.out != 3 * channels || out.in != channels || out.out != channels) {
    return Fail("weight_qkv gives " + std::to_string(qkv.out) + " columns and weight_out is [" +
                std::to_string(out.in) + "," + std::to_string(out.out) + "]; expected three times and [" +
                std::to_string(channels) + "," + std::to_string(channels) + "]");
  }
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstants(*this, info, bias_out, &inputs));
  const InputTensor& index = inputs[bias_out + 1];
  if (index.shape.rank != 2) {
    return Fail("index has shape " + ToString(index.shape) + "; expected [windows, length]");
  }
  attention_.windows = index.shape.dims[0];
  attention_.length = index.shape.dims[1];
  attention_.shape.query_len = attention_.shape.key_len = attention_.length;
  attention_.shape.head_dim = attention_.shape.value_dim = channels / attention_.heads;
  attention_.shape.cosine = FormOf(*this).cosine;
  bias_out_ = Copied<float>(inputs[bias_out]);
  attention_.index = (index_ = Copied<int64_t>(index)).data();
  ATTN_DEPLOY_RETURN_IF_ERROR(CheckIndex(FormOf(*this).padded));
  return KeepExtra(inputs, bias_out + 2);
}

OrtStatus* AttentionBlockKernel::Compute(OrtKernelContext* context) const {
  InputTensor x;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, kX, &x));
  Shape expected = x.shape;
  if (x.shape.rank == 3) {
    expected.dims[1] = attention_.tokens;
    expected.dims[2] = attention_.channels;
  }
  if (x.shape.rank != 3 || x.shape != expected) {
    return Fail("x has shape " + ToString(x.shape) + "; expected [batch," + std::to_string(attention_.tokens) + "," +
                std::to_string(attention_.channels) + "]");
  }
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, x.shape, &output));
  const int64_t batch = x.shape.dims[0];
  const int64_t sample = attention_.tokens * attention_.channels;
  // Windows of one block: enough rows for the products, unless threads would have too few blocks then.
  const int64_t wanted = (kRowsAtOnce + attention_.length - 1) / std::max<int64_t>(attention_.length, 1);
  const int64_t most = std::max<int64_t>(attention_.windows * batch / kEnoughBlocks, 1);
  const int64_t together = std::max<int64_t>(std::min({wanted, most, attention_.windows}), 1);
  const int64_t blocks = (attention_.windows + together - 1) / together;
  const auto outside = ATTN_DEPLOY_KERNEL(RunOutsideWindows);
  const AttentionBlockScratch size = ScratchOf(together);
  return ParallelBlocks(Api(), context, batch * blocks, [&](int64_t block) {
    const float* from = static_cast<const float*>(x.data) + block / blocks * sample;
    float* to = static_cast<float*>(output) + block / blocks * sample;
    const int64_t begin = block % blocks * together;
    float* const floats = ThreadScratch().Floats(size.floats + 1 + 2 * size.ints);
    auto* const ints = reinterpret_cast<int64_t*>(floats + (size.floats + 1) / 2 * 2);
    RunWindows(from, to, begin, std::min(begin + together, attention_.windows), floats, ints);
    if (begin == 0 && !outside_.empty()) {
      outside(attention_, from, to, bias_out_.data(), outside_.data(), static_cast<int64_t>(outside_.size()));
    }
  });
}

void AppendAttentionBlockForms(const OrtApi& api, const std::string& prefix, const std::vector<Operand>& inputs,
                               CpuOp::MakeKernel make, Operators* operators) {
  for (const Form& form : kForms) {
    std::vector<Operand> all = inputs;
    all.push_back({"index", ElementType::kInt64});
    if (form.padded) all.push_back({"fill"});
    if (form.cosine) all.push_back({"head_scale"});
    if (form.bias) {
      all.push_back({"windows_bias"});
      all.push_back({"bias_index", ElementType::kInt64});
    }
    operators->push_back(
        std::make_unique<CpuOp>(api, prefix + form.suffix, std::move(all), make, LikeFirstInput, &form));
  }
}

}  // namespace attn_deploy::native
