// The K largest pre-activations per token, then ReLU. Of equal values, the one with the lowest index is taken.
// The GEMM runs over panels of features that stay in cache. A token keeps only values above its K-th best so far, about
// K ln(F / K) of the F features. The [T, F] pre-activations are never stored.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fastfg {
namespace {

constexpr int64_t TOPK_PANEL_BYTES = 2 << 20;  // size of one panel of pre-activations

template <typename scalar_t>
struct Entry {
  scalar_t value;
  int64_t index;
};

// NaN ranks first, as in torch.topk, so that it appears in the result.
template <typename scalar_t>
bool before(const Entry<scalar_t>& a, const Entry<scalar_t>& b) {
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (a_nan || a.value == b.value) return a.index < b.index;
  return a.value > b.value;
}

// The best features of one token so far: a buffer of up to 2K entries, cut to K when it is full.
template <typename scalar_t>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { entries_.reserve(2 * k); }

  // Features come in ascending order, so a feature that equals the K-th best has a higher index and loses.
  // Until there are K features, there is no K-th best, and every feature is taken, even -inf.
  void scan(const scalar_t* values, int64_t n, int64_t first_index) {
    using Vec = at::vec::Vectorized<scalar_t>;
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) {
      // Comparisons with NaN are false, so NaN is never skipped.
      if (full_ && all_set(Vec::loadu(values + i) <= Vec(threshold_))) continue;
      for (int64_t j = i; j < i + Vec::size(); j++) take(values[j], first_index + j);
    }
    for (; i < n; i++) take(values[i], first_index + i);
  }

  void write(scalar_t* values, int64_t* indices) {
    cut();
    std::sort(entries_.begin(), entries_.end(), before<scalar_t>);
    for (int64_t i = 0; i < k_; i++) {
      const scalar_t value = entries_[i].value;
      values[i] = std::isnan(value) ? value : std::max(value, scalar_t(0));
      indices[i] = entries_[i].index;
    }
  }

 private:
  template <typename Vec>
  static bool all_set(const Vec& mask) {
    return mask.zero_mask() == 0;
  }

  void take(scalar_t value, int64_t index) {
    if (full_ && value <= threshold_) return;
    entries_.push_back({value, index});
    if (static_cast<int64_t>(entries_.size()) == 2 * k_) cut();
  }

  void cut() {
    if (static_cast<int64_t>(entries_.size()) > k_) {
      std::nth_element(entries_.begin(), entries_.begin() + (k_ - 1), entries_.end(), before<scalar_t>);
      entries_.resize(k_);
    }
    if (static_cast<int64_t>(entries_.size()) == k_) {
      const auto last = std::max_element(entries_.begin(), entries_.end(), before<scalar_t>);
      full_ = true;
      // If all K are NaN, nothing else can enter.
      threshold_ = std::isnan(last->value) ? std::numeric_limits<scalar_t>::infinity() : last->value;
    }
  }

  int64_t k_;
  bool full_ = false;
  scalar_t threshold_ = -std::numeric_limits<scalar_t>::infinity();
  std::vector<Entry<scalar_t>> entries_;
};

void check_encode_topk(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, const std::optional<at::Tensor>& b_dec,
    int64_t k) {
  Sizes sizes;
  sizes.check("W_enc", W_enc, {"d", "F"});
  sizes.check("x", x, {"T", "d"});
  sizes.check("b_enc", b_enc, {"F"});
  if (b_dec.has_value()) {
    sizes.check("b_dec", *b_dec, {"d"});
    check_float("b_dec", *b_dec);
  }
  check_float("x", x);
  check_float("W_enc", W_enc);
  check_float("b_enc", b_enc);
  TORCH_CHECK_VALUE(k >= 1 && k <= sizes["F"], "k: expected 1 to ", sizes["F"], ", got ", k);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> encode_topk(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, const std::optional<at::Tensor>& b_dec,
    int64_t k) {
  const BelowAutograd guard;
  check_encode_topk(x, W_enc, b_enc, b_dec, k);
  const int64_t T = x.size(0), F = W_enc.size(1);
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto centred = (b_dec.has_value() ? x - *b_dec : x).to(wide).contiguous();
  auto values = at::empty({T, k}, centred.options());
  auto indices = at::empty({T, k}, centred.options().dtype(at::kLong));
  if (T == 0) return {values.to(x.scalar_type()), indices};
  const int64_t size = static_cast<int64_t>(values.element_size());
  const int64_t panel = std::clamp<int64_t>(TOPK_PANEL_BYTES / (T * size) / 64 * 64, 512, 8192);
  auto buffer = at::empty({T * std::min(panel, F)}, centred.options());
  AT_DISPATCH_FLOATING_TYPES(wide, "encode_topk", [&] {
    std::vector<Best<scalar_t>> best(T, Best<scalar_t>(k));
    for (int64_t start = 0; start < F; start += panel) {
      const int64_t n = std::min(panel, F - start);
      auto pre = buffer.narrow(0, 0, T * n).view({T, n});
      const auto W = W_enc.narrow(1, start, n).to(wide);
      at::addmm_out(pre, b_enc.narrow(0, start, n).to(wide), centred, W);
      const scalar_t* data = pre.const_data_ptr<scalar_t>();
      at::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) best[t].scan(data + t * n, n, start);
      });
    }
    scalar_t* out = values.mutable_data_ptr<scalar_t>();
    int64_t* of = indices.mutable_data_ptr<int64_t>();
    at::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) best[t].write(out + t * k, of + t * k);
    });
  });
  return {values.to(x.scalar_type()), indices};
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("encode_topk", &encode_topk); }

}  // namespace fastfg
