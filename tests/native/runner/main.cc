// kernel_runner ISA CASES RESULTS: runs every case of the file CASES on one instruction set and writes their outputs to
// RESULTS. tests/native/kernel_runner.py writes and reads these files and says how they are laid out.
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "case.h"
#include "isa.h"
#include "scratch.h"

namespace attn_deploy::native::runner {
namespace {

std::map<std::string, Run>& Kernels() {
  static std::map<std::string, Run> kernels;
  return kernels;
}

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) Reject(std::string("no such file: ") + path);
  }
  ~Reader() { std::fclose(file_); }

  bool AtEnd() {
    const int c = std::fgetc(file_);
    if (c == EOF) return true;
    std::ungetc(c, file_);
    return false;
  }
  void Bytes(void* to, int64_t count) {
    if (count > 0 && std::fread(to, 1, static_cast<size_t>(count), file_) != static_cast<size_t>(count)) {
      Reject("the file of cases is cut off");
    }
  }
  template <typename T>
  T One() {
    T value;
    Bytes(&value, sizeof value);
    return value;
  }
  template <typename T>
  std::vector<T> Many() {
    std::vector<T> values(One<uint32_t>());
    Bytes(values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    return values;
  }
  Array OneArray() {
    const auto type = static_cast<Type>(One<uint32_t>());
    const int64_t misalignment = One<uint32_t>();
    Array array(type, Many<int64_t>(), misalignment);
    Bytes(array.bytes(), array.size() * TypeSize(type));
    return array;
  }
  Case OneCase() {
    Case c;
    const std::vector<char> name = Many<char>();
    c.kernel.assign(name.begin(), name.end());
    c.ints = Many<int64_t>();
    c.floats = Many<double>();
    const auto arrays = One<uint32_t>();
    for (uint32_t i = 0; i < arrays; ++i) c.inputs.push_back(OneArray());
    return c;
  }

 private:
  std::FILE* file_;
};

template <typename T>
void Write(std::FILE* file, const T* values, size_t count) {
  if (count > 0 && std::fwrite(values, sizeof(T), count, file) != count) Reject("cannot write the results");
}

void WriteResults(std::FILE* file, const std::vector<Array>& arrays) {
  const auto count = static_cast<uint32_t>(arrays.size());
  Write(file, &count, 1);
  for (const Array& array : arrays) {
    const uint32_t head[] = {static_cast<uint32_t>(array.type), static_cast<uint32_t>(array.dims.size())};
    Write(file, head, 2);
    Write(file, array.dims.data(), array.dims.size());
    Write(file, array.bytes(), static_cast<size_t>(array.size() * TypeSize(array.type)));
  }
}

}  // namespace

int64_t TypeSize(Type type) {
  switch (type) {
    case Type::kInt64:
      return 8;
    case Type::kFloat:
    case Type::kInt32:
      return 4;
    default:
      return 1;
  }
}

Array::Array(Type type_, std::vector<int64_t> dims_, int64_t misalignment) : type(type_), dims(std::move(dims_)) {
  const int64_t before = misalignment * TypeSize(type);
  const int64_t bytes = before + size() * TypeSize(type);
  memory_ = std::malloc(static_cast<size_t>(bytes > 0 ? bytes : 1));
  if (memory_ == nullptr) Reject("out of memory");
  bytes_ = static_cast<char*>(memory_) + before;
  // Outputs start as NaN (of any float type), so that an element that nobody wrote shows.
  std::memset(memory_, 0xff, static_cast<size_t>(bytes));
}

Array::Array(Array&& other) noexcept
    : type(other.type), dims(other.dims), memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_) {}

int64_t Array::size() const {
  int64_t count = 1;
  for (const int64_t dim : dims) count *= dim;
  return count;
}

Registered::Registered(const char* kernel, Run run) { Kernels()[kernel] = run; }

void Reject(const std::string& message) {
  std::fprintf(stderr, "kernel_runner: %s\n", message.c_str());
  std::exit(2);
}

int Main(int argc, char** argv) {
  if (argc != 4) Reject("expected ISA CASES RESULTS");
  if (!ForceIsa(argv[1])) {
    std::fprintf(stderr, "kernel_runner: this CPU has no %s\n", argv[1]);
    return 3;
  }
  std::FILE* results = std::fopen(argv[3], "wb");
  if (results == nullptr) Reject(std::string("cannot write ") + argv[3]);
  const FlushDenormals flush;
  for (Reader reader(argv[2]); !reader.AtEnd();) {
    const Case c = reader.OneCase();
    const auto known = Kernels().find(c.kernel);
    if (known == Kernels().end()) Reject("no kernel '" + c.kernel + "'");
    WriteResults(results, known->second(c));
  }
  return std::fclose(results) == 0 ? 0 : 2;
}

}  // namespace attn_deploy::native::runner

int main(int argc, char** argv) { return attn_deploy::native::runner::Main(argc, argv); }
