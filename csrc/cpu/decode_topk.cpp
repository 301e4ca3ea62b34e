// x_hat_t = sum_k values_tk W_dec[indices_tk] + b_dec, from the active features only.
// Memory traffic limits the speed. A part of a token's sum stays in registers while its rows are added, and later rows are
// prefetched.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"

#include <algorithm>

namespace fastfg {
namespace {

constexpr int64_t AHEAD = 6;  // rows requested before they are needed
constexpr int64_t VECTORS = 8;  // of a token's sum, in registers

// sum += value_k row_k for N vectors of columns; features are those of the token and of the next ones, up to end.
template <int64_t N, typename scalar_t>
void add_columns(
    scalar_t* sum, const scalar_t* values, const int64_t* features, const int64_t* end, int64_t K, const scalar_t* W,
    int64_t d) {
  using Vec = at::vec::Vectorized<scalar_t>;
  constexpr int64_t LINE = 64 / sizeof(scalar_t);
  Vec sums[N];
  for (int64_t n = 0; n < N; n++) sums[n] = Vec::loadu(sum + n * Vec::size());
  for (int64_t k = 0; k < K; k++) {
    const scalar_t *row = W + features[k] * d, *later = W + *std::min(features + k + AHEAD, end - 1) * d;
    for (int64_t i = 0; i < N * Vec::size(); i += LINE) __builtin_prefetch(later + i, 0, 3);
    const Vec value(values[k]);
    for (int64_t n = 0; n < N; n++) sums[n] = at::vec::fmadd(value, Vec::loadu(row + n * Vec::size()), sums[n]);
  }
  for (int64_t n = 0; n < N; n++) sums[n].store(sum + n * Vec::size());
}

template <typename scalar_t>
void add_rows(
    scalar_t* sum, const scalar_t* values, const int64_t* features, const int64_t* end, int64_t K, const scalar_t* W,
    int64_t d) {
  constexpr int64_t SIZE = at::vec::Vectorized<scalar_t>::size();
  int64_t i = 0;
  for (; i + VECTORS * SIZE <= d; i += VECTORS * SIZE) {
    add_columns<VECTORS>(sum + i, values, features, end, K, W + i, d);
  }
  for (; i + SIZE <= d; i += SIZE) add_columns<1>(sum + i, values, features, end, K, W + i, d);
  for (; i < d; i++) {
    for (int64_t k = 0; k < K; k++) sum[i] += values[k] * W[features[k] * d + i];
  }
}

}  // namespace

at::Tensor decode_topk(
    const at::Tensor& values, const at::Tensor& indices, const at::Tensor& W_dec,
    const std::optional<at::Tensor>& b_dec) {
  const BelowAutograd guard;
  Sizes sizes;
  sizes.check("W_dec", W_dec, {"F", "d"});
  sizes.check("values", values, {"T", "K"});
  sizes.check("indices", indices, {"T", "K"});
  check_float("W_dec", W_dec);
  check_float("values", values);
  check_index("indices", indices);
  if (b_dec.has_value()) {
    sizes.check("b_dec", *b_dec, {"d"});
    check_float("b_dec", *b_dec);
  }
  const auto wide = W_dec.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto W = W_dec.to(wide).contiguous(), code = values.to(wide).contiguous();
  const auto index = indices.to(at::kLong).contiguous();
  const int64_t T = sizes["T"], d = sizes["d"], K = sizes["K"];
  const int64_t* feature = index.const_data_ptr<int64_t>();
  check_range("indices", feature, T * K, sizes["F"]);
  auto result = b_dec.has_value() ? b_dec->to(wide).expand({T, d}).clone(at::MemoryFormat::Contiguous)
                                  : at::zeros({T, d}, W.options());
  AT_DISPATCH_FLOATING_TYPES(wide, "decode_topk", [&] {
    const scalar_t* rows = W.const_data_ptr<scalar_t>();
    const scalar_t* value = code.const_data_ptr<scalar_t>();
    scalar_t* out = result.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        add_rows(out + t * d, value + t * K, feature + t * K, feature + T * K, K, rows, d);
      }
    });
  });
  return result.to(W_dec.scalar_type());
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("decode_topk", &decode_topk); }

}  // namespace fastfg
