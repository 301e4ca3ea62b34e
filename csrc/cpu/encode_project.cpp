// Codes and scores in one go for SAEs whose activation acts on each feature alone, at any sparsity.
// Panels of features: one GEMM gives the pre-activations, another D^T g, one pass over both their sum of products.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>

namespace fastfg {
namespace {

constexpr int64_t PANEL_BYTES = 1 << 20;  // of each of a panel's two arrays

using Optional = std::optional<at::Tensor>;

// A slice of a feature's parameter as wide floats; nothing where the activation has no such parameter.
at::Tensor part(const Optional& parameter, at::ScalarType wide, int64_t start, int64_t n, int64_t F) {
  if (!parameter.has_value()) return {};
  const auto whole = parameter->dim() == 0 ? parameter->expand({F}) : *parameter;
  return whole.narrow(0, start, n).to(wide).contiguous();
}

// The codes of pre-activations, in place. A comparison that NaN fails must not turn it into 0.
void activate(
    at::Tensor& pre, const std::string& kind, const at::Tensor& threshold, const at::Tensor& r_mag,
    const at::Tensor& b_gate, const at::Tensor& b_mag) {
  if (kind == "relu") {
    pre.relu_();
  } else if (kind == "tanh_relu") {
    pre.relu_().tanh_();
  } else if (kind == "jumprelu" || kind == "batch_topk") {
    pre.masked_fill_(pre.le(threshold), 0).relu_();
  } else if (kind == "gated") {
    const auto closed = (pre + b_gate).le(0);
    pre.mul_(r_mag.exp()).add_(b_mag).relu_().masked_fill_(closed, 0);
  } else {
    TORCH_CHECK_VALUE(false, "activation: expected one that acts on each feature alone, got '", kind, "'");
  }
}

// scores[t] += f[t] . D^T g[t] over one panel.
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

}  // namespace

at::Tensor encode_project(
    const at::Tensor& x, const at::Tensor& g, const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& W_dec,
    const std::string& activation, const Optional& threshold, const Optional& r_mag, const Optional& b_gate,
    const Optional& b_mag) {
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
