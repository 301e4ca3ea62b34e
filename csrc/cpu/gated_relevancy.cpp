// Equations 2 to 6 for one gated block in one call: project, gate, relevancy.
// On a CPU there is nothing to fuse: what passes between the three is one number a patch, and stays in cache.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace fastfg {

std::tuple<at::Tensor, at::Tensor> project(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&);
at::Tensor gate(const at::Tensor&, const at::Tensor&, const at::Tensor&);
at::Tensor relevancy(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
    const std::optional<at::Tensor>&, bool);

// kappa, c_max: [C]; a row whose c_max is 1 is not gated.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_relevancy(
    const at::Tensor& rows, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dO,
    double scale, const at::Tensor& g, const at::Tensor& W_dec, const at::Tensor& values, const at::Tensor& indices,
    const at::Tensor& kappa, const at::Tensor& c_max, bool paper) {
  const int64_t C = rows.size(0), B = g.size(0), P = g.size(1), N = rows.size(2);
  const auto s = std::get<0>(project(g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1)));
  const auto scores = s.to(rows.scalar_type()).view({B, P});
  const auto a_row = [&](const at::Tensor& of) { return of.to(rows.scalar_type()).repeat_interleave(B); };
  auto gates = gate(scores.repeat({C, 1}), a_row(kappa), a_row(c_max)).view({C, B, P});
  gates = gates.masked_fill(c_max.view({C, 1, 1}) == 1, 1);  // whatever the scores, NaN too
  const auto w = at::cat({at::ones({C, B, N - P}, gates.options()), gates}, -1);
  return {relevancy(rows, q, k, v, dO, scale, w, paper), scores, gates};
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("gated_relevancy", &gated_relevancy); }

}  // namespace fastfg
