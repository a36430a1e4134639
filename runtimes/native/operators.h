// Every operator of the library, one function per kind: each appends its forms, and is named in register.cc.
#pragma once

#include "operator.h"

namespace attn_deploy::native {

void AppendAttention(const ort::OrtApi& api, Operators* operators);
void AppendAttentionBlock(const ort::OrtApi& api, Operators* operators);
void AppendPackedAttention(const ort::OrtApi& api, Operators* operators);
void AppendBlockedConv(const ort::OrtApi& api, Operators* operators);
void AppendBlocked(const ort::OrtApi& api, Operators* operators);
void AppendChannelPool(const ort::OrtApi& api, Operators* operators);
void AppendExcite(const ort::OrtApi& api, Operators* operators);
void AppendSpatialPool(const ort::OrtApi& api, Operators* operators);
void AppendFeedForward(const ort::OrtApi& api, Operators* operators);
void AppendQuantizedAttentionBlock(const ort::OrtApi& api, Operators* operators);
void AppendQuantizedFeedForward(const ort::OrtApi& api, Operators* operators);
void AppendLinear(const ort::OrtApi& api, Operators* operators);
void AppendQuantizedLinear(const ort::OrtApi& api, Operators* operators);
void AppendQuantizedConv(const ort::OrtApi& api, Operators* operators);
void AppendQuantizedGate(const ort::OrtApi& api, Operators* operators);
void AppendGate(const ort::OrtApi& api, Operators* operators);

}  // namespace attn_deploy::native
