// What the library exports: its registration with ONNX Runtime, its version, its instruction set and its operators.
#include <memory>
#include <string>

#include "isa.h"
#include "operators.h"
#include "ort_c_abi.h"
#include "registration.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

// None where no instruction set of ours is: the function bodies run then.
Operators MakeOperators(const OrtApi& api) {
  Operators operators;
  if (ActiveIsa() == Isa::kNone) return operators;
  AppendAttention(api, &operators);
  AppendAttentionBlock(api, &operators);
  AppendPackedAttention(api, &operators);
  AppendFeedForward(api, &operators);
  AppendLinear(api, &operators);
  AppendQuantizedAttentionBlock(api, &operators);
  AppendQuantizedFeedForward(api, &operators);
  AppendQuantizedLinear(api, &operators);
  AppendQuantizedConv(api, &operators);
  AppendQuantizedGate(api, &operators);
  AppendGate(api, &operators);
  AppendChannelPool(api, &operators);
  AppendSpatialPool(api, &operators);
  AppendBlocked(api, &operators);
  AppendBlockedConv(api, &operators);
  AppendExcite(api, &operators);
  return operators;
}

OrtStatus* AddAll(const OrtApi& api, OrtCustomOpDomain* domain, std::shared_ptr<void>* owner) {
  if (*IsaError() != '\0') {
    return api.CreateStatus(ORT_FAIL, (std::string("attn_deploy native library: ") + IsaError()).c_str());
  }
  const auto operators = std::make_shared<Operators>(MakeOperators(api));
  for (const auto& op : *operators) ATTN_DEPLOY_RETURN_IF_ERROR(api.CustomOpDomain_Add(domain, op.get()));
  *owner = operators;
  return nullptr;
}

// The names with commas between them. Making the operators only to be named calls nothing of ONNX Runtime.
std::string* MakeOperatorList() {
  static const OrtApi no_api = {};
  auto* const list = new std::string();
  for (const auto& op : MakeOperators(no_api)) *list += (list->empty() ? "" : ",") + op->name;
  return list;
}

}  // namespace

extern "C" {

// Called by ONNX Runtime when a session's options name this library. Safe from several threads.
ATTN_DEPLOY_EXPORT OrtStatus* ATTN_DEPLOY_ORT_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) noexcept {
  return RegisterOperators(options, *base, "attn_deploy native library", AddAll);
}

// The version of the package this library was built from, such as "0.1.0".
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_version() noexcept { return ATTN_DEPLOY_VERSION; }

// The instruction set that kernels run with here, as IsaName() has it.
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_instruction_set() noexcept { return IsaName(ActiveIsa()); }

// Why there is no kernel though one was asked for by ATTN_DEPLOY_NATIVE_ISA; "" when all is well.
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_error() noexcept { return IsaError(); }

// The ONNX operator names of domain `attn_deploy` that RegisterCustomOps registers, separated by commas.
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_operators() noexcept {
  static const std::string* const list = MakeOperatorList();
  return list->c_str();
}

}  // extern "C"

}  // namespace attn_deploy::native
