# CMake toolchain for 64-bit ARM on another machine. Programs are linked statically, so that an emulator finds all of them.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(CMAKE_CXX_COMPILER NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-14 aarch64-linux-gnu-g++-13
  aarch64-linux-gnu-g++-12 REQUIRED)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
