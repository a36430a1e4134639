// Runs a CUDA grid on the host: the threads of a block are fibers that switch where CUDA's threads may wait for each
// other. What a real GPU would leave undefined ends the program: lanes of a warp that meet at different places, a
// barrier that not all threads reach, copies that nobody waits for. Shared memory is allocated to the byte, for the
// address sanitizer, and starts as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

constexpr int kLanes = 32;
constexpr int kSharedBytesWithoutAsking = 48 * 1024;
constexpr int kMostSharedBytes = 64 * 1024;

struct Grid {
  unsigned blocks_x = 1;
  unsigned blocks_y = 1;
  unsigned threads = 1;
  int shared_bytes = 0;
};

struct Index {
  unsigned x = 0;
  unsigned y = 0;
};

// Of the thread whose turn it is.
extern Index threadIdx;
extern Index blockIdx;
extern Index gridDim;

unsigned char* SharedMemory();

// Runs every block of the grid, one after the other, each thread of which calls `kernel`. The threads' turns follow
// SetOrder. Returns false, and runs nothing, where the grid is empty or `shared_bytes` more than `identity` may have.
// One grid runs at a time, whichever thread of the process asks for it.
bool Run(const void* identity, const Grid& grid, const std::function<void()>& kernel);

// Lets every Run fail as it does for too much shared memory.
void FailLaunches(bool fail);

void AllowSharedBytes(const void* identity, int bytes);

// 0: threads take turns in their order. Others: in one of as many random orders, new at every turn, so that what a
// missing barrier lets happen does happen.
void SetOrder(unsigned seed);

// Gathers the 32 lanes of a warp; the last to come runs `work` on what all of them brought. `place` names the meeting:
// lanes that come to another one are an error.
void Meet(const char* place, void* mine, void (*work)(void* const (&lanes)[kLanes]));

// Waits for all threads of the block.
void Barrier();

// An asynchronous copy of 16 bytes, made when it is waited for.
void CopyAsync(void* target, const void* source);
void CommitCopies();
void WaitForCopies(int pending);

// The execution provider that the operators are registered for: $EMULATED_PROVIDER, else the CPU's, so that any ONNX
// Runtime runs them.
const char* Provider();

// Ends the program with a message.
[[noreturn]] void Fail(const char* message);
void RequireAlignment(const void* pointer, const char* message);

}  // namespace emulation
