// The accuracy promise of the library, judged: a result errs at most twice as much as the peer
// (peer_oracle.h) of the same call, against the float64 recurrence. The Python tests have the same
// formula in tests/oracle.py.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <vector>

#include "oracle.h"

namespace oracle {

constexpr double kPeerFactor = 2.0;
constexpr double kBf16Eps = 0x1p-7;

// Which block element i of a result is of. Null: the whole is one.
using BlockOf = std::function<int64_t(int64_t)>;

// Blocks of 64 tokens and one head of [B, T, heads, D].
inline BlockOf token_blocks(int64_t T, int64_t heads, int64_t D) {
  return [=](int64_t i) {
    const int64_t head = i / D % heads, t = i / D / heads % T, b = i / D / heads / T;
    return (b * heads + head) * ((T + 63) / 64) + t / 64;
  };
}

// Of states: [.., K, V].
inline int64_t state_block(int64_t i) { return i / (Call::K * Call::V); }

// What fp32 cannot hold is zero: decays of a whole row leave 1e-60 of a final state.
inline double held(double x) { return std::fabs(x) < FLT_MIN ? 0.0 : x; }

struct PromiseShare {
  double share = 0.0;              // of the error allowed, in the worst block; more than 1: broken
  double error = 0.0, peer = 0.0;  // relative RMS over the whole
};

// `eps` is of the type of `got`. `sizes`, of sums over tokens: the roots of the sums of their
// summands' squares, which are what such a sum's error is relative to; `one_by_one`: each sum's to
// its own, none of which counts as less than a thousandth of the largest.
inline PromiseShare share_of_promise(const std::vector<double>& truth,
                                     const std::vector<double>& peer, const std::vector<float>& got,
                                     double eps, const BlockOf& block_of,
                                     const std::vector<double>* sizes = nullptr,
                                     bool one_by_one = false) {
  struct Sums {
    double error = 0.0, peer = 0.0, size = 0.0, largest = 0.0;
    int64_t count = 0;
    double rms(double squares) const { return std::sqrt(squares / double(count)); }
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double largest_size =
      one_by_one && !sizes->empty() ? *std::max_element(sizes->begin(), sizes->end()) : 0.0;
  Sums whole;
  std::map<int64_t, Sums> blocks;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (!std::isfinite(got[i])) return {kInfinity, kInfinity, 0.0};
    const double expected = held(truth[i]),
                 unit = largest_size > 0.0 ? std::max((*sizes)[i], 1e-3 * largest_size) : 1.0,
                 error = (held(got[i]) - expected) / unit, off = (held(peer[i]) - expected) / unit,
                 size = std::fabs(sizes != nullptr ? (*sizes)[i] : expected) / unit;
    for (Sums* sums : {&whole, &blocks[block_of ? block_of(int64_t(i)) : 0]}) {
      sums->error += error * error, sums->peer += off * off, sums->size += size * size;
      sums->largest = std::max(sums->largest, size), ++sums->count;
    }
  }
  PromiseShare result;
  if (whole.count == 0) return result;
  // Of nothing, nothing may be left.
  if (whole.largest == 0.0 && whole.error > 0.0) return {kInfinity, kInfinity, 0.0};
  for (const auto& [_, sums] : blocks) {
    if (sums.error == 0.0) continue;
    const double limit = kPeerFactor * std::max(sums.rms(sums.peer), whole.rms(whole.peer)) +
                         2.0 * eps * sums.largest;
    result.share = std::max(result.share, sums.rms(sums.error) / limit);
  }
  if (whole.size > 0.0) {
    result.error = std::sqrt(whole.error / whole.size);
    result.peer = std::sqrt(whole.peer / whole.size);
  }
  return result;
}

}  // namespace oracle
