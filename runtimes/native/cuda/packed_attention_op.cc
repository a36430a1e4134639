// The PackedAttention kernels as operators of ONNX Runtime, with the inputs and shapes of
// attn_deploy/ops/packed_attention.py and scores.py.
#include <optional>
#include <string>
#include <utility>

#include "index_map.h"
#include "operator.h"
#include "packed_attention.h"

namespace attn_deploy::cuda {
namespace {

using namespace ort;
using native::InputTensor;
using native::kMaxRank;
using native::Shape;

// Which inputs a form has; its name says the same.
struct Flags {
  bool indexed = false;
  bool padded = false;
  bool cosine = false;
  bool softcap = false;
  bool causal = false;
  bool bias = false;
  bool mask = false;
};

std::string NameOf(const Flags& f) {
  std::string name = "PackedAttention";
  const std::pair<bool, const char*> parts[] = {{f.indexed, "Indexed"}, {f.padded, "Padded"}, {f.cosine, "Cosine"},
                                                {f.softcap, "Softcap"}, {f.causal, "Causal"}, {f.bias, "Bias"},
                                                {f.mask, "Mask"}};
  for (const auto& [has, part] : parts) {
    if (has) name += part;
  }
  return name;
}

std::vector<Operand> InputsOf(const Flags& f) {
  std::vector<Operand> inputs = {{"qkv"}};
  if (f.indexed) inputs.push_back({"index", Kind::kInt64});
  if (f.padded) inputs.push_back({"fill"});
  if (f.cosine) inputs.push_back({"head_scale"});
  if (f.bias) inputs.push_back({f.indexed ? "windows_bias" : "bias"});
  if (f.bias && f.indexed) inputs.push_back({"bias_index", Kind::kInt64});
  if (f.mask) inputs.push_back({"mask", Kind::kBool});
  return inputs;
}

struct PackedAttentionOp : CudaOp {
  PackedAttentionOp(const OrtApi& api, const Flags& flags_, Element element);

  const Flags flags;
};

Shape MakeShape(std::initializer_list<int64_t> dims) {
  Shape shape;
  for (const int64_t dim : dims) shape.dims[shape.rank++] = dim;
  return shape;
}

// The strides of a dense [item, head, query, key] tensor, 0 where it has one value for all.
void BroadcastStrides(const Shape& shape, int64_t (&strides)[4]) {
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    strides[d] = shape.dims[d] == 1 ? 0 : stride;
    stride *= shape.dims[d];
  }
}

struct PackedAttentionKernel : Kernel {
  using Kernel::Kernel;

  const Flags& flags() const { return static_cast<const PackedAttentionOp&>(op).flags; }

  OrtStatus* Initialize(const OrtKernelInfo* info) {
    ATTN_DEPLOY_RETURN_IF_ERROR(Api().KernelInfoGetAttribute_float(info, "scale", &scale));
    if (flags().softcap) ATTN_DEPLOY_RETURN_IF_ERROR(Api().KernelInfoGetAttribute_float(info, "softcap", &softcap));
    if (!flags().indexed) return nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(Api().KernelInfoGetAttribute_int64(info, "tokens", &tokens));
    return CheckConstantIndex(*this, info, tokens, flags().padded, &covers_every_token);
  }

  OrtStatus* Expect(const char* name, const Shape& got, const Shape& expected) const {
    if (got == expected) return nullptr;
    return Fail(std::string(name) + " has shape " + ToString(got) + "; expected " + ToString(expected));
  }

  OrtStatus* ExpectBroadcast(const char* name, const Shape& got, const Shape& full) const {
    bool fits = got.rank == 4;
    for (int d = 0; fits && d < 4; ++d) fits = got.dims[d] == 1 || got.dims[d] == full.dims[d];
    if (fits) return nullptr;
    return Fail(std::string(name) + " has shape " + ToString(got) + "; expected one that broadcasts to " +
                ToString(full));
  }

  OrtStatus* ReadQkv(const InputTensor& qkv, PackedAttentionArguments* a) const;
  OrtStatus* ReadIndex(const InputTensor& index, const InputTensor* fill, PackedAttentionArguments* a) const;
  OrtStatus* ReadBias(const InputTensor& bias, const InputTensor* bias_index, PackedAttentionArguments* a) const;
  OrtStatus* ReadInputs(const std::vector<InputTensor>& inputs, PackedAttentionArguments* a) const;
  OrtStatus* Compute(OrtKernelContext* context) const override;

  float scale = 1.0f;
  float softcap = 0.0f;
  int64_t tokens = 0;
  bool covers_every_token = false;  // known of the index map: the output needs no zeros first
};

OrtStatus* PackedAttentionKernel::ReadQkv(const InputTensor& qkv, PackedAttentionArguments* a) const {
  const Shape& shape = qkv.shape;
  if (shape.rank != 5 || shape.dims[2] != 3) {
    return Fail("qkv has shape " + ToString(shape) + "; expected [batch, tokens, 3, heads, head_dim]");
  }
  if (shape.dims[4] < 1 || shape.dims[4] > kMaxHeadDim) {
    return Fail("qkv has shape " + ToString(shape) + "; expected a head_dim of 1 to " + std::to_string(kMaxHeadDim));
  }
  a->qkv = qkv.data;
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "batch", shape.dims[0], &a->batch));
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "tokens", shape.dims[1], &a->tokens));
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "heads", shape.dims[3], &a->heads));
  a->head_dim = static_cast<int>(shape.dims[4]);
  a->length = a->tokens;
  return nullptr;
}

OrtStatus* PackedAttentionKernel::ReadIndex(const InputTensor& index, const InputTensor* fill,
                                            PackedAttentionArguments* a) const {
  const Shape& shape = index.shape;
  if (tokens != a->tokens) {
    return Fail("qkv has " + std::to_string(a->tokens) + " tokens; expected " + std::to_string(tokens));
  }
  if (shape.rank != 2 || (fill == nullptr && shape.dims[0] * shape.dims[1] != tokens)) {
    return Fail("index has shape " + ToString(shape) + "; expected [windows, length]" +
                (fill == nullptr ? " of " + std::to_string(tokens) + " tokens" : ""));
  }
  a->index = static_cast<const int64_t*>(index.data);
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "windows", shape.dims[0], &a->windows));
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "length", shape.dims[1], &a->length));
  if (fill == nullptr) return nullptr;
  a->fill = fill->data;
  return Expect("fill", fill->shape, MakeShape({3, a->heads, a->head_dim}));
}

OrtStatus* PackedAttentionKernel::ReadBias(const InputTensor& bias, const InputTensor* bias_index,
                                           PackedAttentionArguments* a) const {
  a->bias = bias.data;
  if (bias_index == nullptr) {
    ATTN_DEPLOY_RETURN_IF_ERROR(
        ExpectBroadcast("bias", bias.shape, MakeShape({a->batch, a->heads, a->length, a->length})));
    BroadcastStrides(bias.shape, a->bias_strides);
    return nullptr;
  }
  const int64_t items = bias.shape.rank == 4 ? bias.shape.dims[0] : 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      Expect("windows_bias", bias.shape, MakeShape({items > 0 ? items : 1, a->heads, a->length, a->length})));
  ATTN_DEPLOY_RETURN_IF_ERROR(Expect("bias_index", bias_index->shape, MakeShape({a->windows})));
  ATTN_DEPLOY_RETURN_IF_ERROR(ToInt(*this, "windows_bias", items, &a->bias_items));
  a->bias_index = static_cast<const int64_t*>(bias_index->data);
  const int64_t square = static_cast<int64_t>(a->length) * a->length;
  a->bias_strides[0] = a->heads * square;
  a->bias_strides[1] = square;
  a->bias_strides[2] = a->length;
  a->bias_strides[3] = 1;
  return nullptr;
}

OrtStatus* PackedAttentionKernel::ReadInputs(const std::vector<InputTensor>& inputs,
                                             PackedAttentionArguments* a) const {
  a->scale = scale;
  a->softcap = softcap;
  a->causal = flags().causal;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadQkv(inputs[0], a));
  size_t next = 1;
  if (flags().indexed) {
    const InputTensor& index = inputs[next++];
    const InputTensor* fill = flags().padded ? &inputs[next++] : nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadIndex(index, fill, a));
  }
  if (flags().cosine) {
    const InputTensor& head_scale = inputs[next++];
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("head_scale", head_scale.shape, MakeShape({a->heads})));
    a->head_scale = head_scale.data;
  }
  if (flags().bias) {
    const InputTensor& bias = inputs[next++];
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadBias(bias, flags().indexed ? &inputs[next++] : nullptr, a));
  }
  if (!flags().mask) return nullptr;
  const InputTensor& mask = inputs[next];
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ExpectBroadcast("mask", mask.shape, MakeShape({a->batch, a->heads, a->length, a->length})));
  a->mask = static_cast<const bool*>(mask.data);
  BroadcastStrides(mask.shape, a->mask_strides);
  return nullptr;
}

OrtStatus* PackedAttentionKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  PackedAttentionArguments arguments;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadInputs(inputs, &arguments));
  const int64_t channels = static_cast<int64_t>(arguments.heads) * arguments.head_dim;
  ATTN_DEPLOY_RETURN_IF_ERROR(native::MakeOutput(
      Api(), context, 0, MakeShape({arguments.batch, arguments.tokens, channels}), &arguments.output));
  cudaStream_t stream = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetStream(Api(), context, &stream));
  if (flags().padded && !covers_every_token) {
    const size_t element_bytes = op.element == Element::kFloat32 ? 4 : 2;
    const size_t bytes = static_cast<size_t>(arguments.batch) * static_cast<size_t>(arguments.tokens) *
                         static_cast<size_t>(channels) * element_bytes;
    ATTN_DEPLOY_RETURN_IF_ERROR(
        CheckCuda(cudaMemsetAsync(arguments.output, 0, bytes, stream), "the output was not cleared"));
  }
  return CheckCuda(LaunchPackedAttention(arguments, op.element, device, stream), "the kernel did not start");
}

OrtStatus* Create(const CudaOp& op, const OrtKernelInfo* info, std::string node_name, const Device& device,
                  std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<PackedAttentionKernel>(op, std::move(node_name), device);
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Initialize(info));
  *kernel = std::move(made);
  return nullptr;
}

bool Infer(const Shape& first, Shape* output, int (&from)[kMaxRank]) {
  if (first.rank != 5 || first.dims[3] < 0 || first.dims[4] < 0) return false;
  *output = MakeShape({first.dims[0], first.dims[1], first.dims[3] * first.dims[4]});
  for (int d = 0; d < kMaxRank; ++d) from[d] = d;
  return true;
}

PackedAttentionOp::PackedAttentionOp(const OrtApi& api_, const Flags& flags_, Element element_)
    : CudaOp(api_, NameOf(flags_), InputsOf(flags_), 1, element_, Create, Infer), flags(flags_) {}

// The forms of attn_deploy/ops/packed_attention.py.
std::vector<Flags> AllFlags() {
  std::vector<Flags> all;
  for (const bool bias : {false, true}) {
    for (const bool mask : {false, true}) {
      for (const bool causal : {false, true}) {
        for (const bool softcap : {false, true}) all.push_back({false, false, false, softcap, causal, bias, mask});
      }
      all.push_back({false, false, true, false, false, bias, mask});
    }
    for (const bool padded : {false, true}) {
      for (const bool cosine : {false, true}) all.push_back({true, padded, cosine, false, false, bias, false});
    }
  }
  return all;
}

}  // namespace

void AppendPackedAttention(const OrtApi& api, Element element, Operators* operators) {
  for (const Flags& flags : AllFlags()) operators->push_back(std::make_unique<PackedAttentionOp>(api, flags, element));
}

}  // namespace attn_deploy::cuda
