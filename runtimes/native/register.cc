// What the library exports: its registration with ONNX Runtime, its version and its list of operators.
#include <array>
#include <iterator>
#include <memory>
#include <string_view>

#include "gate_op.h"
#include "ort_adapter.h"
#include "ort_c_abi.h"
#include "registration.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

// Every operator of the library: an ONNX operator name and the form it computes.
constexpr GateForm kGateForms[] = {
    {"Gate", Activation::kNone, false},
    {"GateRelu", Activation::kRelu, false},
    {"GateSilu", Activation::kSilu, false},
    {"GateResidual", Activation::kNone, true},
    {"GateResidualRelu", Activation::kRelu, true},
    {"GateResidualSilu", Activation::kSilu, true},
};

constexpr size_t OperatorListSize() {
  size_t size = 0;
  for (const GateForm& form : kGateForms) size += std::string_view(form.name).size() + 1;
  return size;
}

// The names with commas between them and a NUL at the end.
constexpr std::array<char, OperatorListSize()> OperatorList() {
  std::array<char, OperatorListSize()> list = {};
  size_t at = 0;
  for (const GateForm& form : kGateForms) {
    for (char c : std::string_view(form.name)) list[at++] = c;
    list[at++] = ',';
  }
  list[at - 1] = '\0';
  return list;
}

using GateOps = std::array<GateOp, std::size(kGateForms)>;

OrtStatus* AddGates(const OrtApi& api, OrtCustomOpDomain* domain, std::shared_ptr<void>* operators) {
  const auto gates = std::make_shared<GateOps>();
  for (size_t i = 0; i < std::size(kGateForms); ++i) {
    (*gates)[i] = MakeGateOp(api, kGateForms[i]);
    ATTN_DEPLOY_RETURN_IF_ERROR(api.CustomOpDomain_Add(domain, &(*gates)[i].base));
  }
  *operators = gates;
  return nullptr;
}

}  // namespace

extern "C" {

// Called by ONNX Runtime when a session's options name this library. Safe from several threads.
ATTN_DEPLOY_EXPORT OrtStatus* ATTN_DEPLOY_ORT_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) noexcept {
  return RegisterOperators(options, *base, "attn_deploy native library", AddGates);
}

// The version of the package this library was built from, such as "0.1.0".
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_version() noexcept { return ATTN_DEPLOY_VERSION; }

// The ONNX operator names of domain `attn_deploy` that RegisterCustomOps registers, separated by commas.
ATTN_DEPLOY_EXPORT const char* attn_deploy_native_operators() noexcept {
  static constexpr auto kList = OperatorList();
  return kList.data();
}

}  // extern "C"

}  // namespace attn_deploy::native
