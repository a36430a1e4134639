// One case for kernel_runner: numbers and arrays in, arrays out. A file per kernel registers how its cases are run.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace attn_deploy::native::runner {

// Element types, as ONNX numbers them.
enum class Type : uint32_t { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBool = 9 };

int64_t TypeSize(Type type);

// An array in memory of its own that ends where the array ends, so that AddressSanitizer sees every byte read or written
// beyond it; `misalignment` elements lie before it.
class Array {
 public:
  Array(Type type, std::vector<int64_t> dims, int64_t misalignment);
  Array(Array&& other) noexcept;
  Array& operator=(Array&&) = delete;
  ~Array() { std::free(memory_); }

  int64_t size() const;  // elements
  char* bytes() const { return bytes_; }
  float* floats() const { return reinterpret_cast<float*>(bytes_); }
  const int64_t* ints() const { return reinterpret_cast<const int64_t*>(bytes_); }

  const Type type;
  const std::vector<int64_t> dims;

 private:
  void* memory_;
  char* bytes_;
};

struct Case {
  std::string kernel;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::vector<Array> inputs;
};

using Run = std::vector<Array> (*)(const Case& c);

// At namespace scope in case_*.cc: `const Registered kRegistered("attention", RunAttentionCase);`
struct Registered {
  Registered(const char* kernel, Run run);
};

// A case that asks for what the kernel does not do: prints and exits.
[[noreturn]] void Reject(const std::string& message);

}  // namespace attn_deploy::native::runner
