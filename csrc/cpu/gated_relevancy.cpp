// Equations 2 to 6 for one gated block in one call: project, gate, relevancy.
// On a CPU there is nothing to fuse: only one number per patch passes between the three, and it stays in cache.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "check.h"

namespace fastfg {

std::tuple<at::Tensor, at::Tensor> project(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&);
at::Tensor gate(const at::Tensor&, const at::Tensor&, const at::Tensor&);
at::Tensor relevancy(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
    const std::optional<at::Tensor>&, bool);

namespace {

// The checks that the three ops can't do themselves, because they get flattened tensors.
void check_gated_relevancy(
    const at::Tensor& rows, const at::Tensor& q, const at::Tensor& g, const at::Tensor& W_dec,
    const at::Tensor& values, const at::Tensor& indices, const at::Tensor& kappa, const at::Tensor& c_max) {
  Sizes sizes;
  sizes.check("rows", rows, {"C", "B", "N"});
  sizes.check("q", q, {"B", "H", "N", "dh"});
  sizes.check("g", g, {"B", "P", "d"});
  sizes.check("W_dec", W_dec, {"F", "d"});
  sizes.check("values", values, {"B", "P", "K"});
  sizes.check("indices", indices, {"B", "P", "K"});
  sizes.check("kappa", kappa, {"C"});
  sizes.check("c_max", c_max, {"C"});
  check_wide("rows", rows);
  check_float("kappa", kappa);
  check_float("c_max", c_max);
  const int64_t P = sizes["P"], N = sizes["N"];
  TORCH_CHECK_VALUE(P >= 1 && P <= N, "g: expected 1 to ", N, " patches, the last of rows' tokens, got ", P);
}

}  // namespace

// kappa, c_max: [C]. A configuration whose c_max is 1 is not gated.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_relevancy(
    const at::Tensor& rows, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dO,
    double scale, const at::Tensor& g, const at::Tensor& W_dec, const at::Tensor& values, const at::Tensor& indices,
    const at::Tensor& kappa, const at::Tensor& c_max, bool paper) {
  const BelowAutograd guard;
  check_gated_relevancy(rows, q, g, W_dec, values, indices, kappa, c_max);
  const int64_t C = rows.size(0), B = g.size(0), P = g.size(1), N = rows.size(2);
  const auto s = std::get<0>(project(g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1)));
  const auto scores = s.to(rows.scalar_type()).view({B, P});
  const auto a_row = [&](const at::Tensor& of) { return of.to(rows.scalar_type()).repeat_interleave(B); };
  auto gates = gate(scores.repeat({C, 1}), a_row(kappa), a_row(c_max)).view({C, B, P});
  gates = gates.masked_fill(c_max.view({C, 1, 1}) == 1, 1);  // even if the scores are NaN
  const auto w = at::cat({at::ones({C, B, N - P}, gates.options()), gates}, -1);
  return {relevancy(rows, q, k, v, dO, scale, w, paper), scores, gates};
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("gated_relevancy", &gated_relevancy); }

}  // namespace fastfg
