// Codes and scores in one pass, for SAEs of any sparsity whose activation acts on each feature separately.
// Per panel of features, one GEMM computes the pre-activations, a second one D^T g, and a pass over both sums their
// products.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"

#include <algorithm>

namespace fastfg {
namespace {

constexpr int64_t PANEL_BYTES = 1 << 20;  // size of each of a panel's two arrays

using Optional = std::optional<at::Tensor>;

// A slice of a per-feature parameter, in float32 or float64. Undefined if the activation does not have it.
at::Tensor part(const Optional& parameter, at::ScalarType wide, int64_t start, int64_t n, int64_t F) {
  if (!parameter.has_value()) return {};
  const auto whole = parameter->dim() == 0 ? parameter->expand({F}) : *parameter;
  return whole.narrow(0, start, n).to(wide).contiguous();
}

// Turns pre-activations into codes, in place. Values are set to 0 where a comparison is true, so NaN stays NaN.
void activate(
    at::Tensor& pre, const std::string& kind, const at::Tensor& threshold, const at::Tensor& r_mag,
    const at::Tensor& b_gate, const at::Tensor& b_mag) {
  if (kind == "relu") {
    pre.relu_();
  } else if (kind == "tanh_relu") {
    pre.relu_().tanh_();
  } else if (kind == "jumprelu" || kind == "batch_topk") {
    pre.masked_fill_(pre.le(threshold), 0).relu_();
  } else {  // gated
    const auto closed = (pre + b_gate).le(0);
    pre.mul_(r_mag.exp()).add_(b_mag).relu_().masked_fill_(closed, 0);
  }
}

// scores[t] += f[t] . D^T g[t], over one panel.
template <typename scalar_t>
void add_products(const at::Tensor& f, const at::Tensor& dg, at::Tensor& scores) {
  using Vec = at::vec::Vectorized<scalar_t>;
  const int64_t T = f.size(0), n = f.size(1);
  const scalar_t *a = f.const_data_ptr<scalar_t>(), *b = dg.const_data_ptr<scalar_t>();
  scalar_t* sums = scores.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      sums[t] += at::vec::map2_reduce_all<scalar_t>(
          [](Vec x, Vec y) { return x * y; }, [](Vec x, Vec y) { return x + y; }, a + t * n, b + t * n, n);
    }
  });
}

// A per-feature parameter is [F], or one number for all features.
void check_parameter(const char* name, const Optional& parameter, bool needed, const std::string& kind, int64_t F) {
  if (!parameter.has_value()) {
    TORCH_CHECK_VALUE(!needed, name, ": expected [", F, "] (F) or a number for '", kind, "', got None");
    return;
  }
  check_cpu(name, *parameter);
  check_float(name, *parameter);
  const bool fits = parameter->dim() == 0 || (parameter->dim() == 1 && parameter->size(0) == F);
  TORCH_CHECK_VALUE(fits, name, ": expected [", F, "] (F) or a number, got ", parameter->sizes());
}

void check_tensors(
    const at::Tensor& x, const at::Tensor& g, const at::Tensor& W_enc, const at::Tensor& b_enc,
    const at::Tensor& W_dec) {
  Sizes sizes;
  sizes.check("W_enc", W_enc, {"d", "F"});
  sizes.check("x", x, {"T", "d"});
  sizes.check("g", g, {"T", "d"});
  sizes.check("b_enc", b_enc, {"F"});
  sizes.check("W_dec", W_dec, {"F", "d"});
  check_float("x", x);
  check_float("g", g);
  check_float("W_enc", W_enc);
  check_float("b_enc", b_enc);
  check_float("W_dec", W_dec);
}

void check_activation(
    const std::string& kind, int64_t F, const Optional& threshold, const Optional& r_mag, const Optional& b_gate,
    const Optional& b_mag) {
  const bool thresholded = kind == "jumprelu" || kind == "batch_topk", gated = kind == "gated";
  TORCH_CHECK_VALUE(
      kind == "relu" || kind == "tanh_relu" || thresholded || gated,
      "activation: expected one that acts on each feature alone, got '", kind, "'");
  check_parameter("threshold", threshold, thresholded, kind, F);
  check_parameter("r_mag", r_mag, gated, kind, F);
  check_parameter("b_gate", b_gate, gated, kind, F);
  check_parameter("b_mag", b_mag, gated, kind, F);
}

}  // namespace

at::Tensor encode_project(
    const at::Tensor& x, const at::Tensor& g, const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& W_dec,
    const std::string& activation, const Optional& threshold, const Optional& r_mag, const Optional& b_gate,
    const Optional& b_mag) {
  const BelowAutograd guard;
  check_tensors(x, g, W_enc, b_enc, W_dec);
  check_activation(activation, W_enc.size(1), threshold, r_mag, b_gate, b_mag);
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto x_ = x.to(wide).contiguous(), g_ = g.to(wide).contiguous();
  const int64_t T = x.size(0), F = W_enc.size(1);
  auto scores = at::zeros({T}, x_.options());
  if (T == 0) return scores.to(x.scalar_type());
  const int64_t panel = std::clamp<int64_t>(PANEL_BYTES / (T * x_.element_size()) / 64 * 64, 256, 4096);
  auto codes = at::empty({T * std::min(panel, F)}, x_.options()), gradients = at::empty_like(codes);
  for (int64_t start = 0; start < F; start += panel) {
    const int64_t n = std::min(panel, F - start);
    auto f = codes.narrow(0, 0, T * n).view({T, n}), dg = gradients.narrow(0, 0, T * n).view({T, n});
    const auto slice = [&](const Optional& p) { return part(p, wide, start, n, F); };
    const auto W = W_enc.narrow(1, start, n).to(wide);
    if (activation == "gated") {
      at::mm_out(f, x_, W);
    } else {
      at::addmm_out(f, slice(b_enc), x_, W);
    }
    activate(f, activation, slice(threshold), slice(r_mag), slice(b_gate), slice(b_mag));
    at::mm_out(dg, g_, W_dec.narrow(0, start, n).to(wide).t());
    AT_DISPATCH_FLOATING_TYPES(wide, "encode_project", [&] { add_products<scalar_t>(f, dg, scores); });
  }
  return scores.to(x.scalar_type());
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("encode_project", &encode_project); }

}  // namespace fastfg
