// Every operator of the library, one function per kind: each appends its forms, and is named in register.cc.
#pragma once

#include "operator.h"

namespace attn_deploy::native {

void AppendGate(const ort::OrtApi& api, Operators* operators);

}  // namespace attn_deploy::native
