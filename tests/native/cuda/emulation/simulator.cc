#include "simulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define START_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define FINISH_SWITCH(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define START_SWITCH(save, bottom, size)
#define FINISH_SWITCH(saved, bottom, size)
#endif

namespace emulation {

Index threadIdx;
Index blockIdx;
Index gridDim;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* target;
  const void* source;
};

struct Fiber {
  ucontext_t context = {};
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* sanitizer_stack = nullptr;
  bool done = false;
  const char* waits_at = nullptr;  // null: can run
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
};

struct Warp {
  const char* place = nullptr;
  std::array<void*, kLanes> brought = {};
  int arrived = 0;
};

// The block that runs; blocks follow one another.
struct Block {
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned at_barrier = 0;
  unsigned current = 0;
  const std::function<void()>* kernel = nullptr;
};

Block* block = nullptr;
ucontext_t scheduler;
[[maybe_unused]] void* scheduler_sanitizer_stack = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;
std::mutex one_at_a_time;
std::mt19937 random_order;
bool in_order = true;
bool all_launches_fail = false;

Fiber& CurrentFiber() { return *block->fibers[block->current]; }

// Back to the scheduler until it lets this fiber go on.
void SwitchToScheduler() {
  Fiber& fiber = CurrentFiber();
  START_SWITCH(fiber.done ? nullptr : &fiber.sanitizer_stack, scheduler_bottom, scheduler_size);
  swapcontext(&fiber.context, &scheduler);
  FINISH_SWITCH(fiber.sanitizer_stack, &scheduler_bottom, &scheduler_size);
}

void WaitAt(const char* place) {
  CurrentFiber().waits_at = place;
  SwitchToScheduler();
}

void FiberMain() {
  FINISH_SWITCH(nullptr, &scheduler_bottom, &scheduler_size);
  (*block->kernel)();
  Fiber& fiber = CurrentFiber();
  if (!fiber.groups.empty() || !fiber.open_group.empty()) Fail("a thread ended without waiting for its copies");
  fiber.done = true;
  SwitchToScheduler();
}

void Resume(unsigned thread) {
  block->current = thread;
  threadIdx.x = thread;
  Fiber& fiber = *block->fibers[thread];
  START_SWITCH(&scheduler_sanitizer_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  FINISH_SWITCH(scheduler_sanitizer_stack, nullptr, nullptr);
}

// Stacks are kept: a block has hundreds of them.
Fiber* FreshFiber(unsigned thread) {
  static std::vector<std::unique_ptr<Fiber>> pool;
  while (pool.size() <= thread) pool.push_back(std::make_unique<Fiber>());
  Fiber* fiber = pool[thread].get();
  fiber->done = false;
  fiber->waits_at = nullptr;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, FiberMain, 0);
  return fiber;
}

[[noreturn]] void FailStuck() {
  std::string message = "threads wait for each other for ever:";
  for (unsigned t = 0; t < block->fibers.size(); t += kLanes) {
    const Fiber& fiber = *block->fibers[t];
    message += " warp " + std::to_string(t / kLanes) + " ";
    message += fiber.done ? "ended" : fiber.waits_at;
  }
  Fail(message.c_str());
}

void RunBlock() {
  std::vector<unsigned> turns(block->fibers.size());
  std::iota(turns.begin(), turns.end(), 0u);
  for (size_t done = 0; done < turns.size();) {
    bool progress = false;
    if (!in_order) std::shuffle(turns.begin(), turns.end(), random_order);
    for (const unsigned thread : turns) {
      Fiber& fiber = *block->fibers[thread];
      if (fiber.done || fiber.waits_at != nullptr) continue;
      progress = true;
      Resume(thread);
      if (fiber.done) ++done;
    }
    if (!progress) FailStuck();
  }
}

std::map<const void*, int>& AllowedBytes() {
  static std::map<const void*, int> allowed;
  return allowed;
}

}  // namespace

unsigned char* SharedMemory() { return block->shared.get(); }

void SetOrder(unsigned seed) {
  in_order = seed == 0;
  random_order.seed(seed);
}

void FailLaunches(bool fail) { all_launches_fail = fail; }

void AllowSharedBytes(const void* identity, int bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  AllowedBytes()[identity] = bytes;
}

bool Run(const void* identity, const Grid& grid, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto asked = AllowedBytes().find(identity);
  const int allowed = asked == AllowedBytes().end() ? kSharedBytesWithoutAsking : asked->second;
  if (grid.blocks_x == 0 || grid.blocks_y == 0 || grid.shared_bytes > allowed || all_launches_fail) return false;
  gridDim = {grid.blocks_x, grid.blocks_y};
  for (unsigned y = 0; y < grid.blocks_y; ++y) {
    for (unsigned x = 0; x < grid.blocks_x; ++x) {
      Block running;
      blockIdx = {x, y};
      const auto shared_bytes = static_cast<size_t>(grid.shared_bytes);
      running.shared.reset(new unsigned char[shared_bytes]);
      std::memset(running.shared.get(), 0xff, shared_bytes);  // NaN in every floating-point type
      running.warps.resize((grid.threads + kLanes - 1) / kLanes);
      running.kernel = &kernel;
      for (unsigned t = 0; t < grid.threads; ++t) running.fibers.push_back(FreshFiber(t));
      block = &running;
      RunBlock();
      block = nullptr;
    }
  }
  return true;
}

void Meet(const char* place, void* mine, void (*work)(void* const (&lanes)[kLanes])) {
  const unsigned warp_number = block->current / kLanes;
  Warp& warp = block->warps[warp_number];
  if (warp.arrived == 0) warp.place = place;
  if (std::strcmp(warp.place, place) != 0) {
    Fail((std::string("lanes of a warp meet at ") + warp.place + " and " + place).c_str());
  }
  warp.brought[block->current % kLanes] = mine;
  if (++warp.arrived < kLanes) {
    WaitAt(place);
    return;
  }
  void* lanes[kLanes];
  std::copy(warp.brought.begin(), warp.brought.end(), lanes);
  work(lanes);
  warp.arrived = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) block->fibers[warp_number * kLanes + lane]->waits_at = nullptr;
}

void Barrier() {
  if (++block->at_barrier < block->fibers.size()) {
    WaitAt("the barrier");
    return;
  }
  block->at_barrier = 0;
  for (Fiber* fiber : block->fibers) fiber->waits_at = nullptr;
}

void CopyAsync(void* target, const void* source) {
  RequireAlignment(target, "the target of a copy is not aligned");
  RequireAlignment(source, "the source of a copy is not aligned");
  CurrentFiber().open_group.push_back({target, source});
}

void CommitCopies() {
  Fiber& fiber = CurrentFiber();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void WaitForCopies(int pending) {
  Fiber& fiber = CurrentFiber();
  while (fiber.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : fiber.groups.front()) std::memcpy(copy.target, copy.source, 16);
    fiber.groups.pop_front();
  }
}

const char* Provider() {
  const char* given = std::getenv("EMULATED_PROVIDER");
  return given != nullptr ? given : "CPUExecutionProvider";
}

void Fail(const char* message) {
  std::fprintf(stderr, "emulated GPU: %s\n", message);
  std::abort();
}

void RequireAlignment(const void* pointer, const char* message) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) Fail(message);
}

}  // namespace emulation
