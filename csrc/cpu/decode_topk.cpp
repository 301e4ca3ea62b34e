// x_hat_t = sum_k values_tk W_dec[indices_tk] + b_dec, from the active features only.
// Memory traffic limits the speed. A token's sum stays in the first-level cache while its rows are added, and later rows
// are prefetched.
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

template <typename scalar_t>
void add_row(scalar_t* sum, scalar_t value, const scalar_t* row, int64_t d, const scalar_t* later) {
  using Vec = at::vec::Vectorized<scalar_t>;
  constexpr int64_t LINE = 64 / sizeof(scalar_t);
  const Vec factor(value);
  int64_t i = 0;
  for (; i + LINE <= d; i += LINE) {
    __builtin_prefetch(later + i, 0, 2);
    for (int64_t j = i; j < i + LINE; j += Vec::size()) {
      at::vec::fmadd(factor, Vec::loadu(row + j), Vec::loadu(sum + j)).store(sum + j);
    }
  }
  for (; i < d; i++) sum[i] += value * row[i];
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
        for (int64_t i = t * K; i < (t + 1) * K; i++) {
          const int64_t later = feature[std::min(i + AHEAD, T * K - 1)];
          add_row(out + t * d, value[i], rows + feature[i] * d, d, rows + later * d);
        }
      }
    });
  });
  return result.to(W_dec.scalar_type());
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("decode_topk", &decode_topk); }

}  // namespace fastfg
