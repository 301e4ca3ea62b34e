// The (token, feature) pairs of sparse codes, sorted by feature. A row of a weight that several tokens share is then
// visited once, and rows are visited in the order of their addresses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fastfg {

template <typename scalar_t>
struct Pair {
  int32_t token;
  scalar_t value;
};

// The pairs of feature f are pairs[start[f]] to pairs[start[f + 1] - 1].
template <typename scalar_t>
struct ByFeature {
  std::vector<int64_t> start;
  std::vector<Pair<scalar_t>> pairs;

  explicit ByFeature(int64_t F) : start(F + 1, 0) {}

  // Codes of T tokens, K per token; token t is stored as first_token + t. Pairs without a gradient (value <= 0) are
  // left out; NaN is kept. Call count for every list of codes, then place for every list in the same order.
  void count(const scalar_t* values, const int64_t* indices, int64_t n) {
    for (int64_t i = 0; i < n; i++) start[indices[i] + 1] += !(values[i] <= 0);
  }

  void begin() {
    std::partial_sum(start.begin(), start.end(), start.begin());
    pairs.resize(start.back());
    next_ = start;
  }

  void place(const scalar_t* values, const int64_t* indices, int64_t T, int64_t K, int64_t first_token) {
    for (int64_t t = 0; t < T; t++) {
      for (int64_t i = t * K; i < (t + 1) * K; i++) {
        if (values[i] <= 0) continue;
        pairs[next_[indices[i]]++] = {static_cast<int32_t>(first_token + t), values[i]};
      }
    }
  }

 private:
  std::vector<int64_t> next_;
};

}  // namespace fastfg
