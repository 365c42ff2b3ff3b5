// Reads from many threads through the C interface, for the sanitizers; a native consumer of pi2_abi.h.
// usage: stress DIRECTORY COUNT
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pi2_ufs.h"

namespace {

constexpr int64_t kSize = 3 * 1024 * 1024 + 321;

uint8_t byte_at(int64_t offset) { return static_cast<uint8_t>((offset * 2654435761u) >> 13); }

void demand(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::exit(1);
}

struct Request {
  std::vector<uint8_t> room;
  std::vector<pi2_storage_read> reads;
  int64_t ticket = 0;

  bool right() const {
    for (const auto& read : reads)
      for (int64_t i = 0; i < read.nbytes; ++i)
        if (read.into[i] != byte_at(read.offset + i)) return false;
    return true;
  }
};

Request random_request(std::mt19937& rng) {
  Request r;
  const auto pick = [&](int64_t below) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(below)); };
  int64_t total = 0;
  for (int64_t n = pick(12); n > 0; --n) {
    const int64_t offset = pick(kSize), most = std::min<int64_t>(kSize - offset, pick(4) ? 9000 : 400000);
    r.reads.push_back({offset, pick(most + 1), nullptr});
    total += r.reads.back().nbytes;
  }
  r.room.resize(static_cast<std::size_t>(total));
  uint8_t* into = r.room.data();
  for (auto& read : r.reads) {
    read.into = into;
    into += read.nbytes;
  }
  return r;
}

// Keeps up to eight requests in flight; waits for, polls or cancels any of them.
void consume(const pi2_storage_abi* abi, int64_t file, unsigned seed, int count) {
  std::mt19937 rng(seed);
  std::vector<Request> flying;
  pi2_storage_failure failure;
  for (int i = 0; i < count || !flying.empty(); ++i) {
    if (i < count && flying.size() < 8) {
      flying.push_back(random_request(rng));
      Request& r = flying.back();
      const auto n = static_cast<int64_t>(r.reads.size());
      r.ticket = abi->submit(abi->self, file, r.reads.data(), n, static_cast<int32_t>(rng() % 2), &failure);
      demand(r.ticket > 0, "a sound request was refused");
      continue;
    }
    const std::size_t which = rng() % flying.size();
    std::swap(flying[which], flying.back());
    const Request& r = flying.back();
    const bool cancelled = rng() % 4 == 0;
    if (cancelled) abi->cancel(abi->self, r.ticket);
    int32_t code = abi->wait(abi->self, r.ticket, rng() % 2 ? 0.0 : 0.001, &failure);
    if (code == PI2_STORAGE_PENDING) code = abi->wait(abi->self, r.ticket, -1, &failure);
    demand(code == 0 || (cancelled && code == ECANCELED), "a read failed");
    demand(code != 0 || r.right(), "wrong bytes");
    flying.pop_back();
  }
}

void refuse(const pi2_storage_abi* abi, int64_t file) {
  uint8_t byte = 0;
  pi2_storage_failure failure;
  for (const int64_t offset : {int64_t{-1}, kSize, INT64_MAX}) {
    const pi2_storage_read read{offset, 1, &byte};
    demand(abi->submit(abi->self, file, &read, 1, 0, &failure) == 0 && failure.code > 0,
           "took an outside read");
  }
  const pi2_storage_read longest{1, INT64_MAX, &byte};
  demand(abi->submit(abi->self, file, &longest, 1, 0, &failure) == 0 && failure.code == ENODATA, "too long");
  demand(abi->wait(abi->self, 1 << 30, 0, &failure) == EINVAL, "took an unknown ticket");
}

void run(const std::string& path, int32_t engine, const pi2_ufs_model* model, int count) {
  const pi2_ufs_options options{engine, 6, 3, 0, -1, 4096, 128 * 1024, 8192, 30.0, model};
  int32_t error = 0;
  pi2_ufs* ufs = pi2_ufs_open(&options, &error);
  if (ufs == nullptr && engine == PI2_UFS_URING) {
    std::printf("uring: skipped, %s\n", std::strerror(error));
    return;
  }
  demand(ufs != nullptr, "did not open");
  const int64_t file = pi2_ufs_open_file(ufs, path.c_str());
  demand(file >= 0, "did not open the file");
  const pi2_storage_abi* abi = pi2_ufs_abi(ufs);
  demand(abi->version == PI2_STORAGE_ABI_VERSION && abi->size == sizeof *abi, "another ABI");
  refuse(abi, file);
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 3; ++seed) threads.emplace_back(consume, abi, file, seed, count);
  for (int i = 0; i < 70; ++i) demand(pi2_ufs_open_file(ufs, path.c_str()) > 0, "did not open again");
  for (auto& thread : threads) thread.join();
  std::mt19937 rng(99);
  std::vector<Request> left;  // closing with reads in flight
  pi2_storage_failure failure;
  for (int i = 0; i < 20; ++i) {
    left.push_back(random_request(rng));
    Request& r = left.back();
    abi->submit(abi->self, file + i, r.reads.data(), static_cast<int64_t>(r.reads.size()), 1, &failure);
  }
  pi2_ufs_close(ufs);
  std::printf("engine %d%s: passed\n", engine, model ? ", throttled" : "");
}

}  // namespace

int main(int argc, char** argv) {
  demand(argc == 3, "usage: stress DIRECTORY COUNT");
  const std::string path = std::string(argv[1]) + "/stress.bin";
  std::vector<uint8_t> content(kSize);
  for (int64_t i = 0; i < kSize; ++i) content[static_cast<std::size_t>(i)] = byte_at(i);
  FILE* f = std::fopen(path.c_str(), "wb");
  demand(f != nullptr && std::fwrite(content.data(), 1, content.size(), f) == content.size(), "cannot write");
  std::fclose(f);
  const pi2_ufs_model model{450e6, 4e9, 1e9, 3.5e9, 1e8, 5e8, 0.8, 0.6, 1.0};
  const int count = std::atoi(argv[2]);
  for (const int32_t engine : {PI2_UFS_URING, PI2_UFS_THREADS, PI2_UFS_BUFFERED})
    run(path, engine, nullptr, count);
  run(path, PI2_UFS_URING, &model, count / 4);
  std::remove(path.c_str());
}
