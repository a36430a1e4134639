// What the library exports: its registration with ONNX Runtime, its version and its list of operators.
#include <array>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gate_op.h"
#include "ort_adapter.h"
#include "ort_c_abi.h"

#ifdef _WIN32
#define ATTN_DEPLOY_EXPORT __declspec(dllexport)
#else
#define ATTN_DEPLOY_EXPORT __attribute__((visibility("default")))
#endif

namespace attn_deploy::native {
namespace {

using namespace ort;

constexpr const char* kDomain = "attn_deploy";

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

// The operators as one ONNX Runtime knows them.
struct Registration {
  const OrtApi* api = nullptr;
  OrtCustomOpDomain* domain = nullptr;
  GateOp gates[std::size(kGateForms)] = {};
};

// Makes the operators of `registration`, whose domain exists, and adds them to it.
OrtStatus* FillDomain(Registration* registration) {
  const OrtApi& api = *registration->api;
  for (size_t i = 0; i < std::size(kGateForms); ++i) {
    registration->gates[i] = MakeGateOp(api, kGateForms[i]);
    ATTN_DEPLOY_RETURN_IF_ERROR(api.CustomOpDomain_Add(registration->domain, &registration->gates[i].base));
  }
  return nullptr;
}

// The domain with all operators, made once for each ONNX Runtime in the process: sessions only read it. Never freed,
// since a session that is itself a static object may outlive anything destroyed at exit; the library is linked so that
// it is not unloaded either. Throws std::bad_alloc.
OrtStatus* DomainFor(const OrtApi& api, OrtCustomOpDomain** domain) {
  static std::mutex mutex;
  static auto* const registrations = new std::vector<std::unique_ptr<Registration>>();
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& known : *registrations) {
    if (known->api == &api) {
      *domain = known->domain;
      return nullptr;
    }
  }
  registrations->reserve(registrations->size() + 1);  // nothing below may throw once the domain exists
  auto registration = std::make_unique<Registration>();
  registration->api = &api;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.CreateCustomOpDomain(kDomain, &registration->domain));
  if (OrtStatus* status = FillDomain(registration.get())) {
    api.ReleaseCustomOpDomain(registration->domain);
    return status;
  }
  *domain = registration->domain;
  registrations->push_back(std::move(registration));
  return nullptr;
}

// `base` has no API of our version. Version 1 has CreateStatus in its place, as every version has.
OrtStatus* RuntimeTooOld(const OrtApiBase& base) {
  const OrtApi* oldest = base.GetApi(1);
  if (oldest == nullptr) return nullptr;  // nothing to say it with; models fall back to their function bodies
  return CatchAll(*oldest, [&] {
    const std::string message = std::string("attn_deploy native library: got ONNX Runtime ") +
                                base.GetVersionString() + "; expected 1." + std::to_string(kApiVersion) + " or later";
    return oldest->CreateStatus(ORT_FAIL, message.c_str());
  });
}

}  // namespace

extern "C" {

// Called by ONNX Runtime when a session's options name this library. Safe from several threads.
ATTN_DEPLOY_EXPORT OrtStatus* ATTN_DEPLOY_ORT_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) noexcept {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) return RuntimeTooOld(*base);
  return CatchAll(*api, [&]() -> OrtStatus* {
    OrtCustomOpDomain* domain = nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(DomainFor(*api, &domain));
    return api->AddCustomOpDomain(options, domain);
  });
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
