// What the library exports: its registration with ONNX Runtime, its version, its operators and its architectures.
#include "../registration.h"

#include <memory>
#include <set>
#include <string>

#include "operator.h"

namespace attn_deploy::cuda {
namespace {

using namespace ort;

Operators MakeOperators(const OrtApi& api) {
  Operators operators;
  for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16}) {
    AppendPackedAttention(api, element, &operators);
    AppendGate(api, element, &operators);
    AppendChannelPool(api, element, &operators);
  }
  return operators;
}

OrtStatus* AddOperators(const OrtApi& api, OrtCustomOpDomain* domain, std::shared_ptr<void>* owner) {
  const auto operators = std::make_shared<Operators>(MakeOperators(api));
  for (const auto& op : *operators) ATTN_DEPLOY_RETURN_IF_ERROR(api.CustomOpDomain_Add(domain, op.get()));
  *owner = operators;
  return nullptr;
}

}  // namespace

extern "C" {

// Called by ONNX Runtime when a session's options name this library. Safe from several threads.
ATTN_DEPLOY_EXPORT OrtStatus* ATTN_DEPLOY_ORT_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) noexcept {
  return native::RegisterOperators(options, *base, "attn_deploy CUDA library", AddOperators);
}

// The version of the package this library was built from, such as "0.1.0".
ATTN_DEPLOY_EXPORT const char* attn_deploy_cuda_version() noexcept { return ATTN_DEPLOY_VERSION; }

// The architectures it was compiled for, separated by commas, such as "75-real,90": CMake's names.
ATTN_DEPLOY_EXPORT const char* attn_deploy_cuda_architectures() noexcept { return ATTN_DEPLOY_CUDA_ARCHITECTURES; }

// The ONNX operator names of domain `attn_deploy` that RegisterCustomOps registers, separated by commas.
ATTN_DEPLOY_EXPORT const char* attn_deploy_cuda_operators() {
  static const auto* const list = [] {
    const OrtApi unused = {};
    std::set<std::string> names;
    for (const auto& op : MakeOperators(unused)) names.insert(op->name);
    auto* joined = new std::string();
    for (const std::string& name : names) *joined += (joined->empty() ? "" : ",") + name;
    return joined;
  }();
  return list->c_str();
}

}  // extern "C"

}  // namespace attn_deploy::cuda
