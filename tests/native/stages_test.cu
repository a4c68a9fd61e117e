// Each thing that chunk_prepare leaves in the workspace against its formula in float64, chunk by
// chunk and element by element:
//
//   k exp(G), q exp(G), k exp(G_C - G), exp(G_C), A_qk, (I + A_kk)^-1
//
// The limits are what one rounding to bf16 of each factor and of the result can do, carried through
// the formula: they grow with the data, never with the error. Prints a line a case with the largest
// share of its limit that each took; exit status 1 above 1.
#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "launch.h"
#include "problem/numerics.cuh"
#include "problem/workspace.h"
#include "sm90/launch.h"

namespace {

using namespace jax_flashkda;

constexpr double kRounding = 1.0 / 256;  // of one value to bf16, relative
// What may underflow beside inputs of order one: of a decayed operand 2^-76, of a score, whose
// factors meet at references, 2^-40.
constexpr double kTiny = 1e-23, kTinyScore = 1e-12;
constexpr int K = 128;

using Matrix = std::vector<double>;  // row by row

// What the stage computes of one chunk, and how far off each element may be.
struct Expected {
  Matrix k_decayed, q_decayed, k_restored, chunk_decay, A_qk, A_kk_inv;
  Matrix k_decayed_limit, q_decayed_limit, k_restored_limit, chunk_decay_limit, A_qk_limit,
      A_kk_inv_limit;
};

// Sums of log decays in fp32 with fast exponentials: relative error of exp of such a sum.
double decay_error(double G) { return 3e-6 * (1.0 + std::fabs(G)); }

Matrix product(const Matrix& a, const Matrix& b, int n) {
  Matrix c(n * n, 0.0);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      for (int m = 0; m < n; ++m) c[i * n + j] += a[i * n + m] * b[m * n + j];
  return c;
}

Expected formula(const Call& call, int64_t row, int64_t start, int n, int64_t head) {
  const int64_t qk_head = head / (call.HV / call.H);
  Matrix k(n * K), q(n * K), G(n * K), beta(n);
  for (int t = 0; t < n; ++t) {
    const int64_t token = row * call.T + start + t;
    const float* k_row = &call.k[(token * call.H + qk_head) * K];
    const float* q_row = &call.q[(token * call.H + qk_head) * K];
    const double k_factor = oracle::norm_factor(k_row, call.qk_l2norm),
                 q_factor = oracle::norm_factor(q_row, call.qk_l2norm);
    for (int c = 0; c < K; ++c) {
      const double g = oracle::log_decay(
          call, call.g[(token * call.HV + head) * K + c],
          call.A_log.empty() ? 0.0 : call.A_log[row * call.HV + head],
          call.dt_bias.empty() ? 0.0 : call.dt_bias[(row * call.HV + head) * K + c]);
      k[t * K + c] = k_row[c] * k_factor;
      q[t * K + c] = q_row[c] * q_factor;
      G[t * K + c] = std::max(g, -110.0) + (t > 0 ? G[(t - 1) * K + c] : 0.0);
    }
    beta[t] = call.beta[token * call.HV + head];
    if (call.beta_is_logits)
      beta[t] = (call.allow_neg_eigval ? 2.0 : 1.0) / (1.0 + std::exp(-beta[t]));
  }

  Expected e;
  auto decayed = [&](Matrix& value, Matrix& limit, const Matrix& x, auto exponent) {
    value.resize(n * K), limit.resize(n * K);
    for (int i = 0; i < n * K; ++i) {
      value[i] = x[i] * std::exp(exponent(i));
      limit[i] = std::fabs(value[i]) * (1.05 * kRounding + decay_error(exponent(i))) + kTiny;
    }
  };
  auto at_end = [&](int i) { return G[(n - 1) * K + i % K] - G[i]; };
  decayed(e.k_decayed, e.k_decayed_limit, k, [&](int i) { return G[i]; });
  decayed(e.q_decayed, e.q_decayed_limit, q, [&](int i) { return G[i]; });
  decayed(e.k_restored, e.k_restored_limit, k, at_end);
  for (int c = 0; c < K; ++c) {
    const double sum = G[(n - 1) * K + c];
    e.chunk_decay.push_back(std::exp(sum));
    e.chunk_decay_limit.push_back(std::exp(sum) * decay_error(sum) + kTiny);
  }

  // Scores: two rounded factors a product. `sizes` sums the products' magnitudes, each with the
  // error of its decay.
  auto scores = [&](const Matrix& rows, int i, int j, double& limit) {
    double score = 0.0, sizes = 0.0;
    for (int c = 0; c < K; ++c) {
      const double exponent = G[i * K + c] - G[j * K + c];
      const double term = rows[i * K + c] * k[j * K + c] * std::exp(exponent);
      score += term;
      sizes += std::fabs(term) * (2.1 * kRounding + decay_error(exponent) + 1e-5);
    }
    limit = sizes + kTinyScore;
    return score;
  };
  e.A_qk.assign(n * n, 0.0), e.A_qk_limit.assign(n * n, 0.0);
  Matrix A_kk(n * n, 0.0), A_kk_limit(n * n, 0.0);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j) {
      e.A_qk[i * n + j] = scores(q, i, j, e.A_qk_limit[i * n + j]);
      e.A_qk_limit[i * n + j] += 1.05 * kRounding * std::fabs(e.A_qk[i * n + j]);
      if (j == i) continue;
      A_kk[i * n + j] = beta[i] * scores(k, i, j, A_kk_limit[i * n + j]);
      A_kk_limit[i * n + j] *= beta[i];
    }
  Matrix inverse(n * n, 0.0), sizes(n * n);
  for (int i = 0; i < n; ++i) {
    inverse[i * n + i] = 1.0;
    for (int j = 0; j < i; ++j)
      for (int m = j; m < i; ++m) inverse[i * n + j] -= A_kk[i * n + m] * inverse[m * n + j];
  }
  // To first order an error d of A_kk moves the inverse X by -X d X; half as much again for the
  // orders behind it.
  std::transform(inverse.begin(), inverse.end(), sizes.begin(), [](double x) { return fabs(x); });
  const Matrix moved = product(product(sizes, A_kk_limit, n), sizes, n);
  e.A_kk_inv.resize(n * n), e.A_kk_inv_limit.resize(n * n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      e.A_kk_inv[i * n + j] = inverse[i * n + j];
      e.A_kk_inv_limit[i * n + j] =
          j > i ? 0.0
                : 1.5 * moved[i * n + j] + 1.05 * kRounding * sizes[i * n + j] + 1e-6;
    }
  return e;
}

struct ChunkOf {
  int64_t row, start, slot;  // slot: of its decay, or -1
  int length;
  int segment;
};

// The chunks that are not padding, by the definition of segments.
std::vector<ChunkOf> chunks_of(const Call& c) {
  std::vector<ChunkOf> chunks;
  for (int64_t row = 0; row < c.B; ++row) {
    auto key = [&](int64_t t) -> int64_t {
      if (!c.has_segment_ids) return 1;
      const int32_t id = c.segment_ids[row * c.T + t];
      return id < 0 || (c.has_padding_segment_id && id == c.padding_segment_id) ? -1 : id;
    };
    int segment = 0;
    for (int64_t start = 0, end; start < c.T; start = end) {
      for (end = start; end < c.T && key(end) == key(start); ++end) {
      }
      if (key(start) < 0) continue;
      for (int64_t at = start; at < end; at += kChunk) {
        const int length = int(std::min(kChunk, end - at));
        const int64_t slot = length == kChunk ? at / kChunk
                             : segment < c.N  ? (c.T + kChunk - 1) / kChunk + segment
                                              : -1;
        chunks.push_back({row, at, slot, length, segment});
      }
      ++segment;
    }
  }
  return chunks;
}

// The workspace behind the stage.
struct Stage {
  explicit Stage(const Case& c) : call(c.call), inputs(c) {
    o = DeviceBuffer(call.v.size() * 2);
    inputs.params.o = o.data();
    w = forward_workspace(inputs.params.shape);
    DeviceBuffer workspace(w.bytes);
    workspace.fill(0xFF);
    inputs.params.workspace = workspace.data();
    auto require = [](const Status& status) {
      if (!status.ok()) std::printf("%s\n", status.message.c_str()), std::exit(1);
    };
    if (call.has_segment_ids) require(sm90::launch_segment_table(inputs.params, w, nullptr));
    require(sm90::launch_chunk_prepare(inputs.params, w, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    bytes = workspace.download<unsigned char>();
  }

  // Row `row`, 16-bit element `column` of a tile of the chunk.
  uint16_t element(const ChunkOf& chunk, int64_t head, int tile, int row, int column) const {
    const int64_t first = (chunk.row * call.HV + head) * call.T + chunk.start;
    uint16_t bits;
    std::memcpy(&bits,
                &bytes[w.operands + first * kOperandBytes + tile * chunk.length * kTileRowBytes +
                       swizzle128(row, column / 8) + column % 8 * 2],
                2);
    return bits;
  }
  float decay(const ChunkOf& chunk, int64_t head, int channel) const {
    const int64_t at = ((chunk.row * call.HV + head) * w.decay_slots + chunk.slot) * K + channel;
    float value;
    std::memcpy(&value, &bytes[w.chunk_decay + at * 4], 4);
    return value;
  }

  const Call& call;
  Inputs inputs;
  DeviceBuffer o;
  ForwardWorkspace w;
  std::vector<unsigned char> bytes;
};

constexpr std::array<const char*, 6> kNames = {"k exp(G)", "q exp(G)", "k restored",
                                               "exp(G_C)", "A_qk",     "inverse"};

bool check(const Case& c) {
  const Stage stage(c);
  bool finite = true;
  double lost = 0.0;              // the largest error that is granted to underflow alone
  std::array<double, 6> share{};  // of the limit, the largest
  auto hold = [&](int which, double got, double truth, double limit) {
    const double error = std::fabs(got - truth);
    const double part = error == 0.0 ? 0.0 : error / limit;  // infinite where zero is exact
    if (which < 5 && error > limit - (which < 4 ? kTiny : kTinyScore)) lost = std::max(lost, error);
    share[which] = part > share[which] || std::isnan(part) ? part : share[which];
  };
  for (const ChunkOf& chunk : chunks_of(c.call))
    for (int64_t head = 0; head < c.call.HV; head += c.call.HV > 8 ? 13 : 1) {
      const int n = chunk.length;
      const Expected e = formula(c.call, chunk.row, chunk.start, n, head);
      auto hold_tiles = [&](int which, int tile, const Matrix& truth, const Matrix& limit,
                            int columns) {
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < columns; ++j)
            hold(which, bf16_value(stage.element(chunk, head, tile + j / 64, i, j % 64)),
                 truth[i * columns + j], limit[i * columns + j]);
      };
      hold_tiles(0, kTileKDecayed, e.k_decayed, e.k_decayed_limit, K);
      hold_tiles(1, kTileQDecayed, e.q_decayed, e.q_decayed_limit, K);
      hold_tiles(2, kTileKRestored, e.k_restored, e.k_restored_limit, K);
      if (chunk.slot >= 0)
        for (int channel = 0; channel < K; ++channel)
          hold(3, stage.decay(chunk, head, channel), e.chunk_decay[channel],
               e.chunk_decay_limit[channel]);
      for (int tile : {kTileAqk, kTileAkkInv})  // they meet rows that do not exist, which are zeros
        for (int i = 0; i < n; ++i)
          for (int j = n; j < 64; ++j)
            finite &= std::isfinite(bf16_value(stage.element(chunk, head, tile, i, j)));
      hold_tiles(4, kTileAqk, e.A_qk, e.A_qk_limit, n);
      hold_tiles(5, kTileAkkInv, e.A_kk_inv, e.A_kk_inv_limit, n);
    }
  bool good = finite;
  std::printf("%-44s", c.name.c_str());
  for (size_t i = 0; i < share.size(); ++i) {
    std::printf("  %s %.2f", kNames[i], share[i]);
    good &= share[i] <= 1.0;  // false for NaN
  }
  std::printf("  lost %.0e%s\n", lost, good ? "" : "  WRONG");
  std::fflush(stdout);
  return good;
}

// A segment's tiles and decays with all other segments and the padding NaN: equal bits.
bool check_neighbours() {
  const Case clean = packed_case("NaN neighbours", 1, 2, 8,
                                 ids_from_lengths({{1, 70}, {0, 5}, {2, 64}, {3, 1}, {4, 129}}));
  const Stage expected(clean);
  bool good = true;
  for (int kept = 0; kept < 4; ++kept) {
    Case poisoned = clean;
    std::vector<bool> own(clean.call.T, false);
    for (const ChunkOf& chunk : chunks_of(clean.call))
      if (chunk.segment == kept) std::fill_n(own.begin() + chunk.start, chunk.length, true);
    for (auto* x : {&poisoned.call.q, &poisoned.call.k, &poisoned.call.g, &poisoned.call.beta}) {
      const int64_t width = int64_t(x->size()) / clean.call.T;
      for (int64_t t = 0; t < clean.call.T; ++t)
        if (!own[t]) std::fill_n(x->begin() + t * width, width, NAN);
    }
    const Stage got(poisoned);
    for (const ChunkOf& chunk : chunks_of(clean.call)) {
      if (chunk.segment != kept) continue;
      for (int64_t head = 0; head < 2; ++head) {
        for (int tile = 0; tile < kOperandTiles; ++tile)
          for (int i = 0; i < chunk.length; ++i)
            for (int j = 0; j < 64; ++j)
              good &=
                  got.element(chunk, head, tile, i, j) == expected.element(chunk, head, tile, i, j);
        for (int channel = 0; channel < K; ++channel)
          good &= got.decay(chunk, head, channel) == expected.decay(chunk, head, channel);
      }
    }
  }
  std::printf("%-44s  %s\n", "neighbours and padding NaN", good ? "equal bits" : "DIFFERENT");
  return good;
}

}  // namespace

int main() {
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  int failures = 0, count = 0;
  for (const Case& c : cases(true)) {
    if (c.call.T == 0) continue;
    ++count, failures += check(c) ? 0 : 1;
  }
  ++count, failures += check_neighbours() ? 0 : 1;
  std::printf("%d of %d passed\n", count - failures, count);
  return failures == 0 ? 0 : 1;
}
