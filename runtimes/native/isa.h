// Instruction sets: which of them this library was compiled for, and which one runs here.
//
// Every source in kernels/ is compiled once per instruction set, with ATTN_DEPLOY_ISA naming the namespace that its
// code goes to. ATTN_DEPLOY_DECLARE_KERNEL declares a kernel in all of them, ATTN_DEPLOY_KERNEL picks one. Kernels on
// 8-bit integers are compiled for more sets than those on floats, to which the dot products of integers add nothing:
// they have macros of their own. Where such a kernel needs one on floats, it is in the namespace ATTN_DEPLOY_FAMILY.
#pragma once

namespace attn_deploy::native {

// kAvxVnni, kAvx512Vnni and kNeonDotprod: those without the ending, and dot products of 8-bit integers.
enum class Isa { kNone, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kNeon, kNeonDotprod };

// "none", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon" or "neon_dotprod".
const char* IsaName(Isa isa);

// Whose kernels on floats run: kAvx2, kAvx512, kNeon or kNone.
Isa IsaFamily(Isa isa);

// What runs here: the widest that the CPU and the operating system have, or the one that the environment variable
// ATTN_DEPLOY_NATIVE_ISA names. kNone where the CPU has none of them (x86 without AVX2 and FMA), or when IsaError() is
// not empty. Settled at the first call.
Isa ActiveIsa();

// Why no kernel runs though one was forced, such as "ATTN_DEPLOY_NATIVE_ISA=avx512: this CPU has avx_vnni, avx2"; else "".
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
#define ATTN_DEPLOY_KERNEL(name)                                                                                \
  (::attn_deploy::native::IsaFamily(::attn_deploy::native::ActiveIsa()) == ::attn_deploy::native::Isa::kAvx512 \
       ? &::attn_deploy::native::avx512::name                                                                  \
       : &::attn_deploy::native::avx2::name)
#define ATTN_DEPLOY_DECLARE_INT8_KERNEL(result, name, ...) \
  ATTN_DEPLOY_DECLARE_KERNEL(result, name, __VA_ARGS__)    \
  namespace avx_vnni {                                     \
  result name(__VA_ARGS__);                                \
  }                                                        \
  namespace avx512_vnni {                                  \
  result name(__VA_ARGS__);                                \
  }
#define ATTN_DEPLOY_INT8_KERNEL(name)                                                     \
  (::attn_deploy::native::ActiveIsa() == ::attn_deploy::native::Isa::kAvx512Vnni          \
       ? &::attn_deploy::native::avx512_vnni::name                                        \
       : ::attn_deploy::native::ActiveIsa() == ::attn_deploy::native::Isa::kAvxVnni       \
             ? &::attn_deploy::native::avx_vnni::name                                     \
             : ATTN_DEPLOY_KERNEL(name))
#else
#define ATTN_DEPLOY_DECLARE_KERNEL(result, name, ...) \
  namespace neon {                                    \
  result name(__VA_ARGS__);                           \
  }
#define ATTN_DEPLOY_KERNEL(name) (&::attn_deploy::native::neon::name)
#define ATTN_DEPLOY_DECLARE_INT8_KERNEL(result, name, ...) \
  ATTN_DEPLOY_DECLARE_KERNEL(result, name, __VA_ARGS__)    \
  namespace neon_dotprod {                                 \
  result name(__VA_ARGS__);                                \
  }
#define ATTN_DEPLOY_INT8_KERNEL(name)                                                \
  (::attn_deploy::native::ActiveIsa() == ::attn_deploy::native::Isa::kNeonDotprod    \
       ? &::attn_deploy::native::neon_dotprod::name                                  \
       : &::attn_deploy::native::neon::name)
#endif
