// How a library of operators registers with ONNX Runtime.
#pragma once

#include <memory>

#include "ort_c_abi.h"

#ifdef _WIN32
#define ATTN_DEPLOY_EXPORT __declspec(dllexport)
#else
#define ATTN_DEPLOY_EXPORT __attribute__((visibility("default")))
#endif

namespace attn_deploy::native {

// Makes a library's operators for one ONNX Runtime and adds each of them to its domain. `operators` takes what has to
// live as long as the domain.
using AddOperators = ort::OrtStatus* (*)(const ort::OrtApi& api, ort::OrtCustomOpDomain* domain,
                                         std::shared_ptr<void>* operators);

// What RegisterCustomOps does in every library: adds the domain `attn_deploy` with the library's operators to the
// options. A session takes one library, since ONNX Runtime takes a domain once. `library` names it in errors. Safe from
// several threads.
ort::OrtStatus* RegisterOperators(ort::OrtSessionOptions* options, const ort::OrtApiBase& base, const char* library,
                                  AddOperators add_operators) noexcept;

}  // namespace attn_deploy::native
