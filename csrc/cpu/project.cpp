// Equations 2 and 3 on the active features: s_t = sum_k values_tk (W_dec[indices_tk] . g_t), and the terms of the sum.
// Memory traffic limits the speed. The (token, feature) pairs of a group of tokens are visited in the order of the
// features: a row of W_dec that several tokens share is read once, and rows are read in the order of their addresses.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"
#include "vectors.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace fastfg {
namespace {

constexpr int64_t AHEAD = 8;  // rows requested before they are needed
constexpr int64_t GRADIENT_BYTES = 2 << 20;  // gradients of one group of tokens; they are read many times
constexpr int64_t SORT_FROM = 4;  // sort if there is at least one pair per this many features; else few rows are shared

// While a row is multiplied, the same columns of a later row are prefetched, one cache line per line used, so that
// requests do not pile up. They go to the second-level cache, so that the first level keeps the gradients.
template <typename scalar_t>
void request(const scalar_t* later, int64_t i, int64_t n) {
  constexpr int64_t LINE = 64 / sizeof(scalar_t);
  for (int64_t j = 0; j < n; j += LINE) __builtin_prefetch(later + i + j, 0, 2);
}

// Two accumulators hide the latency of the multiply-add.
float dot(const float* a, const float* b, int64_t d, const float* later) {
  using Vec = at::vec::Vectorized<float>;
  Vec first(0), second(0);
  int64_t i = 0;
  for (; i + 2 * Vec::size() <= d; i += 2 * Vec::size()) {
    request(later, i, 2 * Vec::size());
    first = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), first);
    second = at::vec::fmadd(Vec::loadu(a + i + Vec::size()), Vec::loadu(b + i + Vec::size()), second);
  }
  float sum = total(first + second);
  for (; i < d; i++) sum += a[i] * b[i];
  return sum;
}

double dot(const double* a, const double* b, int64_t d, const double* later) {
  using Vec = at::vec::Vectorized<double>;
  Vec sums(0);
  int64_t i = 0;
  for (; i + Vec::size() <= d; i += Vec::size()) {
    request(later, i, Vec::size());
    sums = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sums);
  }
  double sum = total(sums);
  for (; i < d; i++) sum += a[i] * b[i];
  return sum;
}

// Half-precision rows are converted as they are read: that halves the bytes, and sums are in float32.
template <typename half_t>
float dot(const half_t* a, const float* b, int64_t d, const half_t* later) {
  using Vec = at::vec::Vectorized<float>;
  Vec first(0), second(0), low(0), high(0);
  int64_t i = 0;
  for (; i + 2 * Vec::size() <= d; i += 2 * Vec::size()) {
    request(later, i, 2 * Vec::size());
    at::vec::load_to_float(a + i, low, high);
    first = at::vec::fmadd(low, Vec::loadu(b + i), first);
    second = at::vec::fmadd(high, Vec::loadu(b + i + Vec::size()), second);
  }
  float sum = total(first + second);
  for (; i < d; i++) sum += static_cast<float>(a[i]) * b[i];
  return sum;
}

// The pairs from begin to end, sorted by feature: a stable counting sort.
std::vector<int64_t> by_feature(const int64_t* feature, int64_t begin, int64_t end, int64_t F) {
  std::vector<int64_t> order(end - begin);
  if ((end - begin) * SORT_FROM < F) {
    std::iota(order.begin(), order.end(), begin);
    return order;
  }
  std::vector<int32_t> place(F + 1, 0);
  for (int64_t pair = begin; pair < end; pair++) place[feature[pair] + 1]++;
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (int64_t pair = begin; pair < end; pair++) order[place[feature[pair]]++] = pair;
  return order;
}

void check_project(
    const at::Tensor& g, const at::Tensor& W_dec, const at::Tensor& values, const at::Tensor& indices) {
  Sizes sizes;
  sizes.check("g", g, {"T", "d"});
  sizes.check("W_dec", W_dec, {"F", "d"});
  sizes.check("values", values, {"T", "K"});
  sizes.check("indices", indices, {"T", "K"});
  check_float("g", g);
  check_float("W_dec", W_dec);
  check_float("values", values);
  check_index("indices", indices);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> project(
    const at::Tensor& g, const at::Tensor& W_dec, const at::Tensor& values, const at::Tensor& indices) {
  const BelowAutograd guard;
  check_project(g, W_dec, values, indices);
  const auto wide = W_dec.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto g_ = g.to(wide).contiguous(), values_ = values.to(wide).contiguous();
  const auto W = W_dec.contiguous(), index = indices.to(at::kLong).contiguous();
  const int64_t T = g.size(0), d = g.size(1), F = W.size(0), K = values.size(1);
  auto contributions = at::empty({T, K}, g_.options());
  const int64_t* feature = index.const_data_ptr<int64_t>();
  check_range("indices", feature, T * K, F);
  // by_feature counts the pairs of a group in 32 bits
  const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(1, K);
  const int64_t tokens = std::clamp<int64_t>(GRADIENT_BYTES / (d * g_.element_size() + 1), 1, std::max<int64_t>(1, most));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, W.scalar_type(), "project", [&] {
    using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* rows = W.const_data_ptr<scalar_t>();
    const wide_t* gradient = g_.const_data_ptr<wide_t>();
    const wide_t* code = values_.const_data_ptr<wide_t>();
    wide_t* out = contributions.mutable_data_ptr<wide_t>();
    for (int64_t t = 0; t < T; t += tokens) {
      const auto order = by_feature(feature, t * K, std::min(t + tokens, T) * K, F);
      const int64_t pairs = order.size();
      at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t pair = order[i], later = feature[order[std::min(i + AHEAD, pairs - 1)]];
          out[pair] = code[pair] * dot(rows + feature[pair] * d, gradient + pair / K * d, d, rows + later * d);
        }
      });
    }
  });
  return {contributions.sum(1).to(g.scalar_type()), contributions.to(g.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("project", &project); }

}  // namespace fastfg
