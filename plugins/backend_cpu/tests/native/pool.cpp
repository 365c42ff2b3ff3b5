// Thousands of small calls from contexts of 1 to 8 threads, against the bits that one thread gives.
#include "../../src/pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "data.h"

namespace {

// An FFN whose neurons and columns make several chunks, and what one thread makes of it.
struct Job {
  pi2_ffn f{};
  pi2_matrix matrix{};
  std::vector<uint8_t> bundles;
  std::vector<float> x, out, products;
  int64_t n, active;

  Job(Random& r, pi2_cpu* single) : n(1 + r.below(3)) {
    const int32_t dtype = static_cast<int32_t>(r.below(4));
    const int64_t d = 32 * (1 + r.below(10)), count = 1 + r.below(100), bytes = row_bytes(dtype, d);
    f.count = count;
    f.d_model = d;
    f.gate = PI2_NONE;
    f.up = f.down = dtype;
    f.down_offset = bytes;
    f.bias_offset = -1;
    f.stride = 2 * bytes;
    bundles.resize(static_cast<size_t>(count * f.stride));
    for (int64_t i = 0; i < 2 * count; ++i) fill_row(r, dtype, d, bundles.data() + i * bytes);
    f.bundles = bundles.data();
    matrix = {bundles.data(), 2 * count, d, bytes, dtype};
    x.resize(static_cast<size_t>(n * d));
    for (auto& value : x) value = r.normal();
    out.resize(x.size());
    products.resize(static_cast<size_t>(n * matrix.rows));
    active = run(single, out.data(), products.data());
  }
  int64_t run(pi2_cpu* cpu, float* y, float* z) const {
    pi2_cpu_linear(cpu, &matrix, x.data(), n, nullptr, matrix.rows, z);
    return pi2_cpu_ffn(cpu, &f, x.data(), n, nullptr, f.count, y);
  }
};

void pool_rounds(uint32_t seed, int64_t rounds) {
  Random r{std::mt19937(seed)};
  pi2_cpu* single = pi2_cpu_open(1, nullptr, nullptr, 1);
  std::vector<Job> jobs;
  for (int i = 0; i < 12; ++i) jobs.emplace_back(r, single);
  pi2_cpu_close(single);
  for (int64_t round = 0; round < rounds; ++round) {
    const auto threads = static_cast<int32_t>(1 + r.below(8));
    const std::vector<int32_t> cpus(static_cast<size_t>(threads), 0);
    pi2_cpu* cpu = pi2_cpu_open(threads, r.one_in(4) ? cpus.data() : nullptr, nullptr, 1);
    for (int64_t call = r.below(60); call > 0; --call) {  // none: closed before its threads have begun
      const Job& job = jobs[static_cast<size_t>(r.below(static_cast<int64_t>(jobs.size())))];
      std::vector<float> y(job.out.size()), z(job.products.size());
      const int64_t active = job.run(cpu, y.data(), z.data());
      if (active != job.active || std::memcmp(y.data(), job.out.data(), 4 * y.size()) ||
          std::memcmp(z.data(), job.products.data(), 4 * z.size()))
        fail("other bits with " + std::to_string(threads) + " threads");
      if (r.one_in(16)) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the pool falls asleep
    }
    pi2_cpu_close(cpu);
  }
}

// Jobs of ever changing sizes, one right after the other: every chunk is done once, by the end of its job.
void exactly_once(int64_t jobs) {
  Random r{std::mt19937(3)};
  pi2::Pool pool(4, nullptr);
  std::atomic<int32_t> done[64] = {};
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t chunks = 2 + r.below(r.one_in(2) ? 3 : 62);
    pool.for_each(chunks, [&](int64_t chunk) { done[chunk].fetch_add(1, std::memory_order_relaxed); });
    for (int64_t i = 0; i < 64; ++i)
      if (done[i].exchange(0) != (i < chunks)) fail("chunk " + std::to_string(i) + " was not done once");
  }
}

// A job that the others begin with while the caller runs jobs of its own: each chunk of both is done once.
void started(int64_t jobs) {
  Random r{std::mt19937(4)};
  for (const int threads : {1, 4}) {
    pi2::Pool pool(threads, nullptr);
    for (int64_t job = 0; job < jobs; ++job) {
      std::atomic<int64_t> begun{0}, alone{0};
      const bool others = pool.start(
          [](void* count, int, int64_t) {
            static_cast<std::atomic<int64_t>*>(count)->fetch_add(1, std::memory_order_relaxed);
          },
          &begun);
      if (others != (threads > 1)) fail("nobody, or somebody who is not there, has begun");
      const int64_t chunks = r.below(5);
      pool.for_each(chunks, [&](int64_t) { ++alone; });
      if (others && pool.start(nullptr, nullptr)) fail("two jobs were started at once");
      if (others) pool.join();
      if (alone != chunks || begun != (others ? threads : 0)) fail("a started job was not done once");
    }
  }
}

}  // namespace

// Two callers, each with contexts of its own: the library shares nothing between them but constants.
void stress_pool(int64_t rounds) {
  std::thread other(pool_rounds, 1, rounds);
  pool_rounds(2, rounds);
  other.join();
  exactly_once(400 * rounds);
  started(400 * rounds);
  std::printf("pool: %lld contexts opened and closed\n", static_cast<long long>(2 * rounds));
}
