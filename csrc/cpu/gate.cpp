// Equations 4 and 5, with exact lower medians.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fastfg {
namespace {

constexpr double MAD_EPS = 1e-8, MAD_TO_STD = 1.4826;

// NaN if any value is NaN, as in torch.median. nth_element must not be called with NaN.
template <typename scalar_t>
scalar_t lower_median(std::vector<scalar_t>& values) {
  if (std::any_of(values.begin(), values.end(), [](scalar_t x) { return std::isnan(x); })) {
    return std::numeric_limits<scalar_t>::quiet_NaN();
  }
  auto middle = values.begin() + (values.size() - 1) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

template <typename scalar_t>
void gate_row(const scalar_t* s, scalar_t kappa, scalar_t log_c_max, scalar_t* w, std::vector<scalar_t>& work) {
  const int64_t P = work.size();
  std::copy(s, s + P, work.begin());
  const scalar_t m = lower_median(work);
  for (int64_t i = 0; i < P; i++) work[i] = std::abs(s[i] - m);
  const scalar_t mad = lower_median(work) + scalar_t(MAD_EPS);
  for (int64_t i = 0; i < P; i++) {
    const scalar_t z = (s[i] - m) / (scalar_t(MAD_TO_STD) * mad);
    w[i] = std::exp(log_c_max * std::tanh(kappa * z));
  }
}

}  // namespace

// scores: [rows, P]. kappa and c_max: [rows].
at::Tensor gate(const at::Tensor& scores, const at::Tensor& kappa, const at::Tensor& c_max) {
  const BelowAutograd guard;
  Sizes sizes;
  sizes.check("scores", scores, {"rows", "P"});
  sizes.check("kappa", kappa, {"rows"});
  sizes.check("c_max", c_max, {"rows"});
  check_wide("scores", scores);
  const auto type = scores.scalar_type();
  TORCH_CHECK_VALUE(kappa.scalar_type() == type, "kappa: expected ", type, ", as scores, got ", kappa.scalar_type());
  TORCH_CHECK_VALUE(c_max.scalar_type() == type, "c_max: expected ", type, ", as scores, got ", c_max.scalar_type());
  TORCH_CHECK_VALUE(sizes["P"] > 0, "scores: expected [rows, P] with at least one patch, got ", scores.sizes());
  const auto s = scores.contiguous(), kappas = kappa.contiguous(), limits = c_max.log().contiguous();
  auto gates = at::empty_like(s);
  const int64_t rows = s.size(0), P = s.size(1);
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "gate", [&] {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> work(P);
      for (int64_t r = begin; r < end; r++) {
        gate_row(
            s.const_data_ptr<scalar_t>() + r * P, kappas.const_data_ptr<scalar_t>()[r],
            limits.const_data_ptr<scalar_t>()[r], gates.mutable_data_ptr<scalar_t>() + r * P, work);
      }
    });
  });
  return gates;
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("gate", &gate); }

}  // namespace fastfg
