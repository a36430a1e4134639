// How many operations a second all threads do at once, on registers alone. The source that includes this says what one
// is: Vec, Broadcast(number), Operation(sum, a, b), which multiplies and adds `kProducts` numbers, and two factors.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;

static double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

static volatile int32_t sink;  // what is computed has to go somewhere, or the compiler leaves the work out

// 10^9 operations a second, a product and its sum being two. Ten chains: two units of latency 5 are busy with as many,
// and 16 registers hold them.
static double RunThread(double seconds) {
  constexpr int kSteps = 20000;
  // Each from a number of its own, or the compiler sees that all are one.
  Vec a = Broadcast(0), b = Broadcast(1), c = Broadcast(2), d = Broadcast(3), e = Broadcast(4);
  Vec f = Broadcast(5), g = Broadcast(6), h = Broadcast(7), i = Broadcast(8), j = Broadcast(9);
  const Vec x = Broadcast(kFirst), y = Broadcast(kSecond);
  int64_t rounds = 0;
  const auto start = Clock::now();
  while (Seconds(start) < seconds) {
    for (int step = 0; step < kSteps; ++step) {
      a = Operation(a, x, y), b = Operation(b, x, y), c = Operation(c, x, y), d = Operation(d, x, y);
      e = Operation(e, x, y), f = Operation(f, x, y), g = Operation(g, x, y), h = Operation(h, x, y);
      i = Operation(i, x, y), j = Operation(j, x, y);
    }
    ++rounds;
  }
  const double elapsed = Seconds(start);
  for (const Vec& v : {a, b, c, d, e, f, g, h, i, j}) {
    int32_t lane;
    std::memcpy(&lane, &v, sizeof lane);
    sink = lane;
  }
  return 2.0 * 10 * kProducts * kSteps * static_cast<double>(rounds) / elapsed / 1e9;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  std::vector<double> rates(threads);
  std::vector<std::thread> running;
  for (double& rate : rates) running.emplace_back([&rate, seconds] { rate = RunThread(seconds); });
  for (std::thread& thread : running) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  std::printf("%.1f\n", sum);
  return 0;
}
