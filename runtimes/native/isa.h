// Instruction sets: which of them this library was compiled for, and which one runs here.
//
// Every source in kernels/ is compiled once per instruction set, with ATTN_DEPLOY_ISA naming the namespace that its
// code goes to. ATTN_DEPLOY_DECLARE_KERNEL declares a kernel in all of them, ATTN_DEPLOY_KERNEL picks one.
#pragma once

namespace attn_deploy::native {

enum class Isa { kNone, kAvx2, kAvx512, kNeon };

// "none", "avx2", "avx512" or "neon".
const char* IsaName(Isa isa);

// What runs here: the widest that the CPU and the operating system have, or the one that the environment variable
// ATTN_DEPLOY_NATIVE_ISA names. kNone where the CPU has none of them (x86 without AVX2 and FMA), or when IsaError() is
// not empty. Settled at the first call.
Isa ActiveIsa();

// Why no kernel runs though one was forced, such as "ATTN_DEPLOY_NATIVE_ISA=avx512: this CPU has avx2"; else "".
const char* IsaError();

// For tests: `name` as in the environment variable. Whether this CPU has it; nothing changes if not. Not thread-safe.
bool ForceIsa(const char* name);

}  // namespace attn_deploy::native

#if defined(__x86_64__) || defined(_M_X64)
#define ATTN_DEPLOY_X86 1
#elif defined(__aarch64__)
#define ATTN_DEPLOY_NEON 1
#endif

// To be used in namespace attn_deploy::native.
#if defined(ATTN_DEPLOY_X86)
#define ATTN_DEPLOY_DECLARE_KERNEL(result, name, ...) \
  namespace avx2 {                                    \
  result name(__VA_ARGS__);                           \
  }                                                   \
  namespace avx512 {                                  \
  result name(__VA_ARGS__);                           \
  }
#define ATTN_DEPLOY_KERNEL(name)                                          \
  (::attn_deploy::native::ActiveIsa() == ::attn_deploy::native::Isa::kAvx512 \
       ? &::attn_deploy::native::avx512::name                             \
       : &::attn_deploy::native::avx2::name)
#else
#define ATTN_DEPLOY_DECLARE_KERNEL(result, name, ...) \
  namespace neon {                                    \
  result name(__VA_ARGS__);                           \
  }
#define ATTN_DEPLOY_KERNEL(name) (&::attn_deploy::native::neon::name)
#endif
