// The segment table as the GPU builds it against its definition, entry by entry, on a poisoned
// workspace; then its time. Exit status 1 on failure.
//   segment_table_test [--untimed]
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "problem/workspace.h"
#include "sm90/launch.h"

namespace {

using namespace jax_flashkda;

int repeats = 9;

struct Expected {
  std::vector<ChunkEntry> chunks;
  std::vector<SegmentEntry> segments;  // longest first; then short runs, the last kind first
  int32_t short_runs[kShortKinds] = {};
  std::vector<int32_t> row_segments;
};

int bucket(const SegmentEntry& segment, int buckets) {
  int power = 0;
  while (power < buckets - 1 && (int64_t{kChunk} << power) < segment.length) ++power;
  return power;
}

// Padding: negative ids and 0.
Expected definition(const std::vector<int32_t>& ids, int64_t B, int64_t T, bool in_token_order,
                    bool short_apart) {
  Expected e;
  std::vector<SegmentEntry> short_runs[kShortKinds];
  for (int64_t row = 0; row < B; ++row) {
    auto key = [&](int64_t t) { return std::max(ids[row * T + t], 0); };
    int32_t ordinal = 0;
    for (int64_t start = 0, end; start < T; start = end) {
      for (end = start; end < T && key(end) == key(start); ++end) {
      }
      const int32_t segment = key(start) == 0 ? kPadding : ordinal++;
      const SegmentEntry entry = {int32_t(row), int32_t(start), int32_t(end - start), segment};
      if (short_apart && entry.length <= kShortTokens) {
        short_runs[short_kind(entry.length, segment == kPadding)].push_back(entry);
        continue;
      }
      for (int64_t at = start; at < end; at += kChunk)
        e.chunks.push_back(
            {int32_t(row), int32_t(at), int32_t(std::min(kChunk, end - at)), segment});
      if (segment != kPadding) e.segments.push_back(entry);
    }
    e.row_segments.push_back(ordinal);
  }
  const int buckets = short_apart ? kLengthBuckets - kShortKinds : kLengthBuckets;
  if (!in_token_order)
    std::stable_sort(e.segments.begin(), e.segments.end(),
                     [&](const SegmentEntry& a, const SegmentEntry& b) {
                       return bucket(a, buckets) > bucket(b, buckets);
                     });
  for (int kind = kShortKinds; kind-- > 0;) {
    e.short_runs[kind] = int32_t(short_runs[kind].size());
    e.segments.insert(e.segments.end(), short_runs[kind].begin(), short_runs[kind].end());
  }
  return e;
}

template <class Entry>
bool equal(const std::vector<Entry>& expected, const unsigned char* got) {
  return expected.empty() ||
         std::memcmp(expected.data(), got, expected.size() * sizeof(Entry)) == 0;
}

bool check(const std::string& name, int64_t B, int64_t T, const std::vector<int32_t>& ids,
           bool short_apart) {
  ForwardParams params{};
  params.shape = {B, T, 1, 1, 128, 128, 1, true};
  params.has_padding_segment_id = true;
  ForwardWorkspace w = forward_workspace(params.shape);
  w.short_runs = short_apart;
  DeviceBuffer device_ids(ids.size() * 4), workspace(w.bytes);
  device_ids.upload(ids);
  params.segment_ids = static_cast<int32_t*>(device_ids.data());
  params.workspace = workspace.data();
  bool good = true;
  Expected e;
  for (int poison : {0xFF, 0x7F, 0x00}) {
    w.overlap.processors = poison == 0x7F ? 1 : 0;  // then segments stay in the order of tokens
    e = definition(ids, B, T, w.overlap.processors > 0, short_apart);
    workspace.fill(poison);
    const Status status = sm90::launch_segment_table(params, w, nullptr);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    const auto got = workspace.download<unsigned char>();
    const auto& counts = *reinterpret_cast<const TableCounts*>(&got[w.counts]);
    int32_t listed = counts.segments;
    for (int kind = 0; short_apart && kind < kShortKinds; ++kind) {
      good &= counts.short_runs[kind] == e.short_runs[kind];
      listed += counts.short_runs[kind];
    }
    good &= status.ok() && counts.chunks == int32_t(e.chunks.size()) &&
            listed == int32_t(e.segments.size()) && equal(e.chunks, &got[w.chunk_table]) &&
            equal(e.segments, &got[w.segment_table]) && equal(e.row_segments, &got[w.row_segments]);
  }
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < 100; ++i) (void)sm90::launch_segment_table(params, w, nullptr);
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 10);
  }
  std::sort(times.begin(), times.end());
  if (times.empty()) times.push_back(NAN);
  std::printf("%-36s B %-5ld T %-7ld %7zu chunks %7zu segments%s  %7.2f us  %s\n", name.c_str(), B,
              T, e.chunks.size(), e.segments.size(), short_apart ? ", short ones apart" : "",
              times[times.size() / 2], good ? "equal" : "DIFFERENT");
  std::fflush(stdout);
  return good;
}

std::vector<int32_t> runs_of(int64_t tokens, int64_t length) {
  std::vector<int32_t> ids(tokens);
  for (int64_t t = 0; t < tokens; ++t) ids[t] = int32_t(t / length) + 1;
  return ids;
}

std::vector<int32_t> random_runs(int64_t tokens, uint32_t mean, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> ids(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    ids[t] = t > 0 && generator() % mean != 0 ? ids[t - 1] : int32_t(generator() % 9) - 2;
  return ids;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--untimed") repeats = 0;
  bool good = true;
  auto both = [&](const std::string& name, int64_t B, int64_t T, const std::vector<int32_t>& ids) {
    for (bool short_apart : {false, true}) good &= check(name, B, T, ids, short_apart);
  };
  for (int64_t length : {65536, 8192, 1024, 100, 16, 1})
    both("segments of " + std::to_string(length), 1, 65536, runs_of(65536, length));
  for (int64_t T : {1, 2, 64, 1023, 1024, 1025, 8192, 131071, 131072, 1 << 20})
    both("random runs", 1, T, random_runs(T, 300, uint32_t(T)));
  both("random runs", 5, 4001, random_runs(5 * 4001, 50, 1));
  both("random runs", 5, 4001, random_runs(5 * 4001, 4, 4));
  both("random runs", 4000, 33, random_runs(4000 * 33, 10, 2));
  both("random runs", 3, 300001, random_runs(3 * 300001, 9000, 3));
  both("all padding", 2, 5000, std::vector<int32_t>(10000, -3));
  std::printf(good ? "passed\n" : "FAILED\n");
  return good ? 0 : 1;
}
