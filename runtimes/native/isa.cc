#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(ATTN_DEPLOY_X86)
#include <cpuid.h>
#endif

namespace attn_deploy::native {
namespace {

#if defined(ATTN_DEPLOY_X86)

// Which registers the operating system saves: the lower half of XCR0. Only to be called where cpuid says OSXSAVE.
unsigned SavedRegisters() {
  unsigned low = 0;
  unsigned high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Isa Widest() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kNone;
  const bool fma = c & bit_FMA;
  const bool osxsave = c & bit_OSXSAVE;
  const bool avx = c & bit_AVX;
  if (!fma || !osxsave || !avx) return Isa::kNone;
  const unsigned saved = SavedRegisters();
  constexpr unsigned kYmm = 0x6;    // XMM and YMM
  constexpr unsigned kZmm = 0xe6;   // those, mask registers and ZMM
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return Isa::kNone;
  constexpr unsigned kAvx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  return (b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm ? Isa::kAvx512 : Isa::kAvx2;
}

#else

Isa Widest() { return Isa::kNeon; }  // part of every aarch64

#endif

// kNone for a name that is none of those that the widest one includes.
Isa Named(const char* name, Isa widest) {
  for (Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kNeon}) {
    const bool here = isa == widest || (isa == Isa::kAvx2 && widest == Isa::kAvx512);
    if (here && std::strcmp(name, IsaName(isa)) == 0) return isa;
  }
  return Isa::kNone;
}

struct Choice {
  Isa isa = Isa::kNone;
  std::string error;
};

Choice Choose() {
  const Isa widest = Widest();
  const char* forced = std::getenv("ATTN_DEPLOY_NATIVE_ISA");
  if (forced == nullptr || *forced == '\0') return {widest, ""};
  if (std::strcmp(forced, IsaName(Isa::kNone)) == 0) return {Isa::kNone, ""};
  const Isa isa = Named(forced, widest);
  if (isa != Isa::kNone) return {isa, ""};
  std::string error = std::string("ATTN_DEPLOY_NATIVE_ISA=") + forced + ": this CPU has ";
  error += widest == Isa::kAvx512 ? "avx512 and avx2" : IsaName(widest);
  return {Isa::kNone, error};
}

Choice& Active() {
  static auto* const choice = new Choice(Choose());  // never freed: sessions may outlive static objects
  return *choice;
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
    case Isa::kNone:
      break;
  }
  return "none";
}

Isa ActiveIsa() { return Active().isa; }

const char* IsaError() { return Active().error.c_str(); }

bool ForceIsa(const char* name) {
  const Isa isa = Named(name, Widest());
  if (isa == Isa::kNone) return false;
  Active() = {isa, ""};
  return true;
}

}  // namespace attn_deploy::native
