#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(ATTN_DEPLOY_X86)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
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

// Those of this CPU and operating system, the first being the best.
std::vector<Isa> Available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool fma = c & bit_FMA;
  const bool osxsave = c & bit_OSXSAVE;
  const bool avx = c & bit_AVX;
  if (!fma || !osxsave || !avx) return {};
  const unsigned saved = SavedRegisters();
  constexpr unsigned kYmm = 0x6;    // XMM and YMM
  constexpr unsigned kZmm = 0xe6;   // those, mask registers and ZMM
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return {};
  constexpr unsigned kAvx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  const bool avx512 = (b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm;
  const bool avx512_vnni = avx512 && (c & (1u << 11)) != 0;
  const bool avx_vnni = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4)) != 0;
  std::vector<Isa> available;
  if (avx512_vnni) available.push_back(Isa::kAvx512Vnni);
  if (avx512) available.push_back(Isa::kAvx512);
  if (avx_vnni) available.push_back(Isa::kAvxVnni);
  available.push_back(Isa::kAvx2);
  return available;
}

#else

bool HasDotprod() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}

// NEON is part of every aarch64.
std::vector<Isa> Available() {
  if (HasDotprod()) return {Isa::kNeonDotprod, Isa::kNeon};
  return {Isa::kNeon};
}

#endif

// kNone for a name that is none of those.
Isa Named(const char* name, const std::vector<Isa>& available) {
  for (const Isa isa : available) {
    if (std::strcmp(name, IsaName(isa)) == 0) return isa;
  }
  return Isa::kNone;
}

// "avx512, avx2", or "none".
std::string Names(const std::vector<Isa>& available) {
  std::string names;
  for (const Isa isa : available) names += (names.empty() ? "" : ", ") + std::string(IsaName(isa));
  return names.empty() ? IsaName(Isa::kNone) : names;
}

struct Choice {
  Isa isa = Isa::kNone;
  std::string error;
};

Choice Choose() {
  const std::vector<Isa> available = Available();
  const char* forced = std::getenv("ATTN_DEPLOY_NATIVE_ISA");
  if (forced == nullptr || *forced == '\0') return {available.empty() ? Isa::kNone : available.front(), ""};
  if (std::strcmp(forced, IsaName(Isa::kNone)) == 0) return {Isa::kNone, ""};
  const Isa isa = Named(forced, available);
  if (isa != Isa::kNone) return {isa, ""};
  return {Isa::kNone, std::string("ATTN_DEPLOY_NATIVE_ISA=") + forced + ": this CPU has " + Names(available)};
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
    case Isa::kAvxVnni:
      return "avx_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kNeon:
      return "neon";
    case Isa::kNeonDotprod:
      return "neon_dotprod";
    case Isa::kNone:
      break;
  }
  return "none";
}

Isa IsaFamily(Isa isa) {
  switch (isa) {
    case Isa::kAvxVnni:
      return Isa::kAvx2;
    case Isa::kAvx512Vnni:
      return Isa::kAvx512;
    case Isa::kNeonDotprod:
      return Isa::kNeon;
    default:
      return isa;
  }
}

Isa ActiveIsa() { return Active().isa; }

const char* IsaError() { return Active().error.c_str(); }

bool ForceIsa(const char* name) {
  const Isa isa = Named(name, Available());
  if (isa == Isa::kNone) return false;
  Active() = {isa, ""};
  return true;
}

}  // namespace attn_deploy::native
