#include "registration.h"

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ort_adapter.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

constexpr const char* kDomain = "attn_deploy";

// The operators as one ONNX Runtime knows them.
struct Registration {
  const OrtApi* api = nullptr;
  OrtCustomOpDomain* domain = nullptr;
  std::shared_ptr<void> operators;
};

// The domain with all operators, made once for each ONNX Runtime in the process: sessions only read it. Never freed,
// since a session that is itself a static object may outlive anything destroyed at exit; the library is linked so that
// it is not unloaded either. Throws std::bad_alloc.
OrtStatus* DomainFor(const OrtApi& api, AddOperators add_operators, OrtCustomOpDomain** domain) {
  static std::mutex mutex;
  static auto* const registrations = new std::vector<Registration>();
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registration& known : *registrations) {
    if (known.api == &api) {
      *domain = known.domain;
      return nullptr;
    }
  }
  registrations->reserve(registrations->size() + 1);  // nothing below may throw once the operators are in the domain
  Registration registration;
  registration.api = &api;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.CreateCustomOpDomain(kDomain, &registration.domain));
  // What it throws becomes a status too, so that the domain is released.
  OrtStatus* status =
      CatchAll(api, [&] { return add_operators(api, registration.domain, &registration.operators); });
  if (status != nullptr) {
    api.ReleaseCustomOpDomain(registration.domain);
    return status;
  }
  *domain = registration.domain;
  registrations->push_back(std::move(registration));
  return nullptr;
}

// `base` has no API of our version. Version 1 has CreateStatus in its place, as every version has.
OrtStatus* RuntimeTooOld(const OrtApiBase& base, const char* library) {
  const OrtApi* oldest = base.GetApi(1);
  if (oldest == nullptr) return nullptr;  // nothing to say it with; models fall back to their function bodies
  return CatchAll(*oldest, [&] {
    const std::string message = std::string(library) + ": got ONNX Runtime " + base.GetVersionString() +
                                "; expected 1." + std::to_string(kApiVersion) + " or later";
    return oldest->CreateStatus(ORT_FAIL, message.c_str());
  });
}

}  // namespace

OrtStatus* RegisterOperators(OrtSessionOptions* options, const OrtApiBase& base, const char* library,
                             AddOperators add_operators) noexcept {
  const OrtApi* api = base.GetApi(kApiVersion);
  if (api == nullptr) return RuntimeTooOld(base, library);
  return CatchAll(*api, [&]() -> OrtStatus* {
    OrtCustomOpDomain* domain = nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(DomainFor(*api, add_operators, &domain));
    return api->AddCustomOpDomain(options, domain);
  });
}

}  // namespace attn_deploy::native
