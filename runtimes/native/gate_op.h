// The Gate kernel as operators of ONNX Runtime: one ONNX operator name per form.
#pragma once

#include "activation.h"
#include "ort_c_abi.h"

namespace attn_deploy::native {

struct GateForm {
  const char* name;  // of the ONNX operator
  Activation activation;
  bool has_residual;
};

// What ONNX Runtime holds on to. `form` and the object itself outlive every session that uses the operator.
struct GateOp {
  ort::OrtCustomOp base;  // first, so that the callbacks find the rest behind the pointer they get
  const ort::OrtApi* api;
  const GateForm* form;
};

// Inputs x, gate and, where the form has it, residual; one output; all float32, no attributes.
// x has rank 1 to kMaxRank, gate the same rank with every dim x's or 1, residual x's shape; so has the output.
GateOp MakeGateOp(const ort::OrtApi& api, const GateForm& form);

}  // namespace attn_deploy::native
