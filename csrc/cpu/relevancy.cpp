// Equations 1 and 6, one block: r <- r + (r @ E) * w with E = mean_h max(A * dA, 0). A and dA are computed in tiles.
// A tile is a group of queries of one head: two GEMMs give its logits and dA, and one pass over both adds
// max(A * dA, 0) to the sum over the heads. Each thread takes tiles of queries.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"

#include <algorithm>
#include <cmath>

namespace fastfg {
namespace {

constexpr int64_t TILE_BYTES = 512 << 10;  // size of one array of a tile; it stays in a core's own cache

// e += max(softmax(scale * logits) * dA, 0), the row of one query, with scale >= 0. Overwrites logits.
template <typename scalar_t>
void add_row(scalar_t* logits, const scalar_t* dA, scalar_t scale, int64_t n, scalar_t* e) {
  using Vec = at::vec::Vectorized<scalar_t>;
  const scalar_t largest = at::vec::reduce_all<scalar_t>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, logits, n);
  at::vec::map<scalar_t>([=](Vec x) { return ((x - Vec(largest)) * Vec(scale)).exp(); }, logits, logits, n);
  const scalar_t sum = at::vec::reduce_all<scalar_t>([](Vec& a, Vec& b) { return a + b; }, logits, n);
  const Vec inverse(scalar_t(1) / sum);
  at::vec::map3<scalar_t>(
      [=](Vec so_far, Vec p, Vec g) { return so_far + at::vec::maximum(p * inverse * g, Vec(0)); }, e, e, logits, dA, n);
}

void check_relevancy(
    const at::Tensor& rows, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dO,
    const std::optional<at::Tensor>& gates) {
  Sizes sizes;
  sizes.check("rows", rows, {"C", "B", "N"});
  check_wide("rows", rows);
  const std::pair<const char*, const at::Tensor&> attention[] = {{"q", q}, {"k", k}, {"v", v}, {"dO", dO}};
  for (const auto& [name, tensor] : attention) {
    sizes.check(name, tensor, {"B", "H", "N", "dh"});
    check_float(name, tensor);
  }
  if (!gates.has_value()) return;
  sizes.check("gates", *gates, {"C", "B", "N"});
  check_float("gates", *gates);
}

}  // namespace

at::Tensor relevancy(
    const at::Tensor& rows, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& dO_in, double scale, const std::optional<at::Tensor>& gates, bool paper) {
  const BelowAutograd guard;
  check_relevancy(rows, q_in, k_in, v_in, dO_in, gates);
  if (rows.numel() == 0) return at::empty(rows.sizes(), rows.options());
  // The result has the precision of rows, not the model's. A negative scale moves to q: add_row needs scale >= 0.
  const auto q = (scale < 0 ? -q_in : q_in).to(rows.scalar_type()), k = k_in.to(rows.scalar_type()), v = v_in.to(rows.scalar_type()),
             dO = dO_in.to(rows.scalar_type());
  const int64_t C = rows.size(0), B = q.size(0), H = q.size(1), N = q.size(2);
  const auto options = q.options();
  const int64_t tile = std::clamp<int64_t>(TILE_BYTES / (N * q.element_size()), 1, N);
  const int64_t tiles = (N + tile - 1) / tile;
  scale = std::abs(scale);
  // Each tile writes its own part of r @ E. The parts are added in a fixed order, so threads do not change the sum.
  auto parts = at::empty({B, tiles, C, N}, options);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "relevancy", [&] {
    at::parallel_for(0, B * tiles, 1, [&](int64_t begin, int64_t end) {
      const BelowAutograd thread_guard;
      auto logits = at::empty({tile, N}, options), dA = at::empty({tile, N}, options);
      for (int64_t job = begin; job < end; job++) {
        const int64_t b = job / tiles, start = job % tiles * tile, n = std::min(tile, N - start);
        auto E = at::zeros({n, N}, options);
        auto logits_n = logits.narrow(0, 0, n), dA_n = dA.narrow(0, 0, n);
        for (int64_t h = 0; h < H; h++) {
          at::mm_out(logits_n, q[b][h].narrow(0, start, n), k[b][h].t());
          at::mm_out(dA_n, dO[b][h].narrow(0, start, n), v[b][h].t());
          for (int64_t i = 0; i < n; i++) {
            add_row(
                logits_n.mutable_data_ptr<scalar_t>() + i * N, dA_n.const_data_ptr<scalar_t>() + i * N,
                static_cast<scalar_t>(scale), N, E.mutable_data_ptr<scalar_t>() + i * N);
          }
        }
        auto part = parts[b][job % tiles];
        at::mm_out(part, rows.select(1, b).narrow(1, start, n), E);
      }
    });
  });
  auto flow = parts.sum(1).transpose(0, 1) / static_cast<double>(H);  // [C, B, N]
  if (paper) flow = flow + rows;
  const auto result = gates.has_value() ? rows + flow * *gates : rows + flow;
  return result.to(rows.scalar_type()).contiguous();
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("relevancy", &relevancy); }

}  // namespace fastfg
