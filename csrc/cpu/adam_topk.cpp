// One Adam step of a TopK SAE from its sparse codes. Each feature is visited once: its gradients are summed from its
// (token, feature) pairs and used while they are in the first-level cache, so no gradient [F, d] is stored.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"
#include "pairs.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace fastfg {
namespace {

constexpr int64_t AHEAD = 3;  // pairs whose rows are requested before they are needed
constexpr int64_t PARTS = 64;  // parts of the features; fixed, so that sums do not depend on the number of threads
constexpr int64_t ROW_COST = 8;  // the work of a feature's update, in pairs

template <typename scalar_t>
struct Adam {
  scalar_t beta1, beta2, step_size, root_correction, eps;

  Adam(double lr, double beta1, double beta2, double eps, int64_t step)
      : beta1(beta1),
        beta2(beta2),
        step_size(lr / (1 - std::pow(beta1, step))),
        root_correction(std::sqrt(1 - std::pow(beta2, step))),
        eps(eps) {}

  template <typename T>  // a number or a vector of them
  T update(T w, T gradient, T& m, T& v) const {
    m = T(beta1) * m + T(1 - beta1) * gradient;
    v = T(beta2) * v + T(1 - beta2) * gradient * gradient;
    return w - T(step_size) * m / (root(v) / T(root_correction) + T(eps));
  }

 private:
  static scalar_t root(scalar_t v) { return std::sqrt(v); }
  static at::vec::Vectorized<scalar_t> root(const at::vec::Vectorized<scalar_t>& v) { return v.sqrt(); }
};

template <typename scalar_t>
struct Rows {  // of one feature
  scalar_t *w, *m, *v;

  // Returns the square of the norm after the step.
  scalar_t step(const Adam<scalar_t>& adam, const scalar_t* gradient, int64_t d) const {
    using Vec = at::vec::Vectorized<scalar_t>;
    Vec squares(0);
    int64_t i = 0;
    for (; i + Vec::size() <= d; i += Vec::size()) {
      Vec first = Vec::loadu(m + i), second = Vec::loadu(v + i);
      const Vec stepped = adam.update(Vec::loadu(w + i), Vec::loadu(gradient + i), first, second);
      first.store(m + i);
      second.store(v + i);
      stepped.store(w + i);
      squares = at::vec::fmadd(stepped, stepped, squares);
    }
    scalar_t sum = total(squares);
    for (; i < d; i++) {
      w[i] = adam.update(w[i], gradient[i], m[i], v[i]);
      sum += w[i] * w[i];
    }
    return sum;
  }
};

// The functions below request one cache line of a later row per line that they use, so that requests do not pile up.
template <typename scalar_t>
constexpr int64_t LINE = 64 / sizeof(scalar_t);

// sum += factor * row
template <typename scalar_t>
void add(scalar_t* sum, scalar_t factor, const scalar_t* row, int64_t d, const scalar_t* later) {
  using Vec = at::vec::Vectorized<scalar_t>;
  int64_t i = 0;
  for (; i + LINE<scalar_t> <= d; i += LINE<scalar_t>) {
    __builtin_prefetch(later + i, 0, 2);
    for (int64_t j = i; j < i + LINE<scalar_t>; j += Vec::size()) {
      at::vec::fmadd(Vec(factor), Vec::loadu(row + j), Vec::loadu(sum + j)).store(sum + j);
    }
  }
  for (; i < d; i++) sum[i] += factor * row[i];
}

// sum += factor * row; returns the product of row and other.
template <typename scalar_t>
scalar_t add_and_multiply(
    scalar_t* sum, scalar_t factor, const scalar_t* row, const scalar_t* other, int64_t d, const scalar_t* later) {
  using Vec = at::vec::Vectorized<scalar_t>;
  Vec products(0);
  int64_t i = 0;
  for (; i + LINE<scalar_t> <= d; i += LINE<scalar_t>) {
    __builtin_prefetch(later + i, 0, 2);
    for (int64_t j = i; j < i + LINE<scalar_t>; j += Vec::size()) {
      const Vec r = Vec::loadu(row + j);
      products = at::vec::fmadd(r, Vec::loadu(other + j), products);
      at::vec::fmadd(Vec(factor), r, Vec::loadu(sum + j)).store(sum + j);
    }
  }
  scalar_t product = total(products);
  for (; i < d; i++) {
    product += row[i] * other[i];
    sum[i] += factor * row[i];
  }
  return product;
}

template <typename scalar_t>
struct Step {
  const ByFeature<scalar_t>& codes;
  const scalar_t *x, *g, *aux_g;  // [T, d]
  Rows<scalar_t> enc, dec, bias;
  Adam<scalar_t> adam;
  int64_t T, d;
  bool unit_norm;

  const scalar_t* gradient_of(int64_t token) const { return token < T ? g + token * d : aux_g + (token - T) * d; }
  const scalar_t* input_of(int64_t token) const { return x + (token < T ? token : token - T) * d; }

  // The gradients of the loss for one feature's rows, summed over its pairs. Returns that of its bias.
  scalar_t gradients(int64_t f, const scalar_t* w, scalar_t* of_enc, scalar_t* of_dec) const {
    const int64_t begin = codes.start[f], end = codes.start[f + 1];
    const int64_t last = static_cast<int64_t>(codes.pairs.size()) - 1;
    std::fill(of_enc, of_enc + d, scalar_t(0));
    std::fill(of_dec, of_dec + d, scalar_t(0));
    scalar_t of_bias = 0;
    for (int64_t i = begin; i < end; i++) {
      const auto later = codes.pairs[std::min(i + AHEAD, last)].token;
      const auto [token, value] = codes.pairs[i];
      const scalar_t of_code = add_and_multiply(of_dec, value, gradient_of(token), w, d, gradient_of(later));
      add(of_enc, of_code, input_of(token), d, input_of(later));
      of_bias += of_code;
    }
    return of_bias;
  }

  void visit(int64_t f, scalar_t* of_enc, scalar_t* of_dec, scalar_t* of_input) const {
    const Rows<scalar_t> e{enc.w + f * d, enc.m + f * d, enc.v + f * d};
    const Rows<scalar_t> w{dec.w + f * d, dec.m + f * d, dec.v + f * d};
    const scalar_t of_bias = gradients(f, w.w, of_enc, of_dec);
    add(of_input, of_bias, e.w, d, e.m);
    if (unit_norm) {
      const auto product = [](const auto& a, const auto& b) { return a * b; };
      const auto sum = [](const auto& a, const auto& b) { return a + b; };
      add(of_dec, -at::vec::map2_reduce_all<scalar_t>(product, sum, of_dec, w.w, d), w.w, d, w.m);
    }
    e.step(adam, of_enc, d);
    const scalar_t square = w.step(adam, of_dec, d);
    if (unit_norm) {
      const scalar_t norm = std::sqrt(square);
      at::vec::map([norm](auto x) { return x / decltype(x)(norm); }, w.w, w.w, d);
    }
    bias.w[f] = adam.update(bias.w[f], of_bias, bias.m[f], bias.v[f]);
  }
};

// The first feature of each part, so that parts are about equal in work.
template <typename scalar_t>
std::vector<int64_t> parts_of(const ByFeature<scalar_t>& codes, int64_t F) {
  std::vector<int64_t> first(PARTS + 1, F);
  const int64_t total = codes.start[F] + F * ROW_COST;
  int64_t f = 0;
  for (int64_t part = 0; part < PARTS; part++) {
    while (f < F && (codes.start[f] + f * ROW_COST) * PARTS < part * total) f++;
    first[part] = f;
  }
  return first;
}

// The lists hold W_enc [d, F] with contiguous columns, b_enc [F] and W_dec [F, d].
void check_state(Sizes& sizes, const char* name, at::TensorList list, at::ScalarType type) {
  TORCH_CHECK_VALUE(list.size() == 3, name, ": expected W_enc, b_enc and W_dec, got ", list.size(), " tensors");
  sizes.check(name, list[0], {"d", "F"});
  sizes.check(name, list[1], {"F"});
  sizes.check(name, list[2], {"F", "d"});
  for (const auto& tensor : list) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, ": expected ", type, ", as x, got ", tensor.scalar_type());
  }
  TORCH_CHECK_VALUE(
      list[0].mT().is_contiguous() && list[1].is_contiguous() && list[2].is_contiguous(), name,
      ": expected W_enc with contiguous columns, and contiguous b_enc and W_dec, got strides ", list[0].strides(), ", ",
      list[1].strides(), " and ", list[2].strides());
}

// Codes as the op reads them; an empty list for the optional one that is not given.
struct Codes {
  at::Tensor g, values, indices;

  Codes(Sizes& sizes, const std::string& prefix, const char* letter, const at::Tensor& x,
        const std::optional<at::Tensor>& g_, const std::optional<at::Tensor>& values_,
        const std::optional<at::Tensor>& indices_) {
    const std::string names[] = {prefix + "g", prefix + "values", prefix + "indices"};
    const bool given = g_.has_value();
    TORCH_CHECK_VALUE(
        values_.has_value() == given && indices_.has_value() == given, names[0], ": expected ", names[0], ", ",
        names[1], " and ", names[2], ", or none of them");
    if (!given) {
      g = x, values = at::empty({x.size(0), 0}, x.options()), indices = at::empty({x.size(0), 0}, at::kLong);
      return;
    }
    sizes.check(names[0].c_str(), *g_, {"T", "d"});
    sizes.check(names[1].c_str(), *values_, {"T", letter});
    sizes.check(names[2].c_str(), *indices_, {"T", letter});
    check_float(names[0].c_str(), *g_);
    check_float(names[1].c_str(), *values_);
    check_index(names[2].c_str(), *indices_);
    g = g_->to(x.scalar_type()).contiguous();
    values = values_->to(x.scalar_type()).contiguous();
    indices = indices_->to(at::kLong).contiguous();
    check_range(names[2].c_str(), indices.const_data_ptr<int64_t>(), indices.numel(), sizes["F"]);
  }

  int64_t K() const { return values.size(1); }
};

template <typename scalar_t>
ByFeature<scalar_t> by_feature(const Codes& main, const Codes& aux, int64_t T, int64_t F, int32_t* counts) {
  ByFeature<scalar_t> codes(F);
  const auto count = [&](const Codes& list) {
    codes.count(list.values.const_data_ptr<scalar_t>(), list.indices.const_data_ptr<int64_t>(), T * list.K());
  };
  const auto place = [&](const Codes& list, int64_t first_token) {
    const auto* values = list.values.const_data_ptr<scalar_t>();
    codes.place(values, list.indices.const_data_ptr<int64_t>(), T, list.K(), first_token);
  };
  count(main);
  std::copy(codes.start.begin() + 1, codes.start.end(), counts);
  count(aux);
  codes.begin();
  place(main, 0);
  place(aux, T);
  return codes;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> adam_topk(
    const at::Tensor& x, const at::Tensor& g, const at::Tensor& values, const at::Tensor& indices,
    const std::optional<at::Tensor>& aux_g, const std::optional<at::Tensor>& aux_values,
    const std::optional<at::Tensor>& aux_indices, at::TensorList weights, at::TensorList m, at::TensorList v,
    double lr, double beta1, double beta2, double eps, int64_t step, bool unit_norm) {
  const BelowAutograd guard;
  Sizes sizes;
  check_wide("x", x);
  sizes.check("x", x, {"T", "d"});
  check_state(sizes, "weights", weights, x.scalar_type());
  check_state(sizes, "m", m, x.scalar_type());
  check_state(sizes, "v", v, x.scalar_type());
  const auto x_ = x.contiguous();
  const Codes main(sizes, "", "K", x_, g, values, indices), aux(sizes, "aux_", "J", x_, aux_g, aux_values, aux_indices);
  const int64_t T = sizes["T"], d = sizes["d"], F = sizes["F"];
  TORCH_CHECK_VALUE(T <= std::numeric_limits<int32_t>::max() / 2, "x: expected fewer tokens, got ", T);
  TORCH_CHECK_VALUE(step >= 1, "step: expected at least 1, got ", step);
  auto partial = at::zeros({PARTS, d}, x_.options());
  auto counts = at::empty({F}, x_.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "adam_topk", [&] {
    const auto codes = by_feature<scalar_t>(main, aux, T, F, counts.mutable_data_ptr<int32_t>());
    const auto rows = [&](int i) {
      return Rows<scalar_t>{
          weights[i].mutable_data_ptr<scalar_t>(), m[i].mutable_data_ptr<scalar_t>(), v[i].mutable_data_ptr<scalar_t>()};
    };
    const Step<scalar_t> visitor{
        codes, x_.const_data_ptr<scalar_t>(), main.g.const_data_ptr<scalar_t>(), aux.g.const_data_ptr<scalar_t>(),
        rows(0), rows(2), rows(1), Adam<scalar_t>(lr, beta1, beta2, eps, step), T, d, unit_norm};
    const auto first = parts_of(codes, F);
    scalar_t* of_input = partial.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, PARTS, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> of_enc(d), of_dec(d);
      for (int64_t part = begin; part < end; part++) {
        for (int64_t f = first[part]; f < first[part + 1]; f++) {
          visitor.visit(f, of_enc.data(), of_dec.data(), of_input + part * d);
        }
      }
    });
  });
  return {partial.sum(0), counts};
}

TORCH_LIBRARY_IMPL(fastfg, CPU, m) { m.impl("adam_topk", &adam_topk); }

}  // namespace fastfg
