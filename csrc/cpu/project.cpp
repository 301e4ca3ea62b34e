// Equations 2 and 3 on the active features: s_t = sum_k values_tk (W_dec[indices_tk] . g_t).
// Bytes decide: K rows of W_dec a token, read once, each as soon as the ones before it are being multiplied.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>

namespace fastfg {
namespace {

constexpr int64_t AHEAD = 8;  // rows requested before they are needed

// While a row is multiplied, the same places of a later row are requested: one line for each line used, so that the
// requests never pile up.
template <typename scalar_t>
void request(const scalar_t* later, int64_t i, int64_t n) {
  constexpr int64_t LINE = 64 / sizeof(scalar_t);
  for (int64_t j = 0; j < n; j += LINE) __builtin_prefetch(later + i + j);
}

template <typename scalar_t>
scalar_t total(const at::vec::Vectorized<scalar_t>& sums) {
  scalar_t lanes[at::vec::Vectorized<scalar_t>::size()], sum = 0;
  sums.store(lanes);
  for (scalar_t lane : lanes) sum += lane;
  return sum;
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

// Rows in half precision are widened as they are read: half the bytes, sums in float.
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

}  // namespace

at::Tensor project(const at::Tensor& g, const at::Tensor& W_dec, const at::Tensor& values, const at::Tensor& indices) {
  const auto wide = W_dec.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto g_ = g.to(wide).contiguous(), values_ = values.to(wide).contiguous();
  const auto W = W_dec.contiguous(), index = indices.to(at::kLong).contiguous();
  const int64_t T = g.size(0), d = g.size(1), F = W.size(0), K = values.size(1);
  auto scores = at::empty({T}, g_.options());
  const int64_t* of = index.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, W.scalar_type(), "project", [&] {
    using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* rows = W.const_data_ptr<scalar_t>();
    const wide_t* gradient = g_.const_data_ptr<wide_t>();
    const wide_t* code = values_.const_data_ptr<wide_t>();
    wide_t* out = scores.mutable_data_ptr<wide_t>();
    at::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        wide_t sum = 0;
        for (int64_t k = 0; k < K; k++) {
          const int64_t row = of[t * K + k];
          TORCH_CHECK_INDEX(row >= 0 && row < F, "indices: expected features from 0 to ", F - 1, ", got ", row);
          const int64_t next = of[std::min(t * K + k + AHEAD, T * K - 1)];
          const scalar_t* later = rows + std::clamp<int64_t>(next, 0, F - 1) * d;
          sum += code[t * K + k] * dot(rows + row * d, gradient + t * d, d, later);
        }
        out[t] = sum;
      }
    });
  });
  return scores.to(g.scalar_type());
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("project", &project); }

}  // namespace fastfg
