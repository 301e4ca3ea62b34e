// The K largest pre-activations per token, then ReLU. Of equal values, the one with the lowest index is taken.
// The GEMM runs over panels of features that stay in cache. A token keeps only values above its K-th best so far, about
// K ln(F / K) of the F features. The [T, F] pre-activations are never stored.
// With AVX2, many tokens and float32, the product runs in tiles that stay in registers, where each value is compared with
// its token's K-th best. On an AMD EPYC this was measured to be faster than the library's product; wider vectors were not
// measured and use the library.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "check.h"
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace fastfg {
namespace {

constexpr int64_t TOPK_PANEL_BYTES = 2 << 20;  // size of one panel of pre-activations

#ifdef CPU_CAPABILITY_AVX2
constexpr bool IN_TILES = true;
#else
constexpr bool IN_TILES = false;
#endif
constexpr int64_t TILED_FROM = 1024;  // tokens; fewer do not pay for the packing of the encoder
constexpr int64_t TOKEN_BYTES = 384 << 10;  // packed tokens of one block, for the second-level cache
constexpr int64_t TILED_FEATURES = 1024;  // features that are packed at a time

// A feature and its pre-activation. NaN ranks first, as in torch.topk, so that it appears in the result.
template <typename scalar_t>
struct Entry {
  scalar_t number;
  int64_t feature;

  bool before(const Entry& other) const {
    const bool nan = std::isnan(number), other_nan = std::isnan(other.number);
    if (nan != other_nan) return nan;
    if (nan || number == other.number) return feature < other.feature;
    return number > other.number;
  }

  scalar_t value() const { return number; }
  int64_t index() const { return feature; }
};

// In float32 both are packed into one number: a larger one ranks first.
template <>
struct Entry<float> {
  uint64_t key;

  Entry(float value, int64_t index) {
    uint32_t bits;
    value = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value + 0.0f;  // -0 becomes 0
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t ordered = bits & SIGN ? ~bits : bits | SIGN;
    key = uint64_t{ordered} << 32 | (LAST - static_cast<uint32_t>(index));
  }

  bool before(const Entry& other) const { return key > other.key; }

  float value() const {
    const auto ordered = static_cast<uint32_t>(key >> 32), bits = ordered & SIGN ? ordered ^ SIGN : ~ordered;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }

  int64_t index() const { return LAST - static_cast<uint32_t>(key); }

  static constexpr uint32_t SIGN = 0x80000000u, LAST = 0xffffffffu;
};

template <typename Entry>
bool before(const Entry& a, const Entry& b) {
  return a.before(b);
}

template <typename Vec>
bool all_set(const Vec& mask) {
  return mask.zero_mask() == 0;
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

  void take(scalar_t value, int64_t index) {
    if (full_ && value <= threshold_) return;
    entries_.push_back(Entry<scalar_t>{value, index});
    if (static_cast<int64_t>(entries_.size()) == 2 * k_) cut();
  }

  // Values at most this one can be skipped. NaN, to which no value compares, until there are K features.
  scalar_t threshold() const { return full_ ? threshold_ : std::numeric_limits<scalar_t>::quiet_NaN(); }

  void write(scalar_t* values, int64_t* indices) {
    cut();
    std::sort(entries_.begin(), entries_.end(), before<Entry<scalar_t>>);
    for (int64_t i = 0; i < k_; i++) {
      const scalar_t value = entries_[i].value();
      values[i] = std::isnan(value) ? value : std::max(value, scalar_t(0));
      indices[i] = entries_[i].index();
    }
  }

 private:
  void cut() {
    if (static_cast<int64_t>(entries_.size()) <= k_) return;
    const auto last = entries_.begin() + (k_ - 1);
    std::nth_element(entries_.begin(), last, entries_.end(), before<Entry<scalar_t>>);
    full_ = true;
    // If all K are NaN, nothing else can enter.
    threshold_ = std::isnan(last->value()) ? std::numeric_limits<scalar_t>::infinity() : last->value();
    entries_.erase(last + 1, entries_.end());
  }

  int64_t k_;
  bool full_ = false;
  scalar_t threshold_ = -std::numeric_limits<scalar_t>::infinity();
  std::vector<Entry<scalar_t>> entries_;
};

// All features of all tokens, in panels that the library multiplies.
template <typename scalar_t>
void scan_panels(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, std::vector<Best<scalar_t>>& best) {
  const int64_t T = x.size(0), F = W_enc.size(1), size = sizeof(scalar_t);
  const int64_t panel = std::clamp<int64_t>(TOPK_PANEL_BYTES / (T * size) / 64 * 64, 512, 8192);
  auto buffer = at::empty({T * std::min(panel, F)}, x.options());
  for (int64_t start = 0; start < F; start += panel) {
    const int64_t n = std::min(panel, F - start);
    auto pre = buffer.narrow(0, 0, T * n).view({T, n});
    const auto W = W_enc.narrow(1, start, n).to(x.scalar_type());
    at::addmm_out(pre, b_enc.narrow(0, start, n).to(x.scalar_type()), x, W);
    const scalar_t* data = pre.template const_data_ptr<scalar_t>();
    at::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) best[t].scan(data + t * n, n, start);
    });
  }
}

// All features of all tokens, in tiles. For a token, features come in ascending order.
class TiledScan {
 public:
  using Vec = at::vec::Vectorized<float>;
  using Tile = Tiles<float, Vec>;

  TiledScan(const at::Tensor& x, const at::Tensor& W, const at::Tensor& b, std::vector<Best<float>>& best)
      : x_(x), W_(W), bias_(b.numel() + Tile::COLUMNS), best_(best), T_(x.size(0)), d_(x.size(1)), F_(W.size(1)) {
    std::copy_n(b.const_data_ptr<float>(), F_, bias_.begin());
    // blocks of equal size, and as many for each thread
    const int64_t most = std::max<int64_t>(1, TOKEN_BYTES / (d_ * sizeof(float) + 1)), threads = at::get_num_threads();
    const int64_t blocks = above(above(T_, most), threads) * threads;
    tokens_ = above(above(T_, blocks), Tile::ROWS) * Tile::ROWS;
    thresholds_.assign(T_, std::numeric_limits<float>::quiet_NaN());
  }

  void run() {
    const int64_t blocks = above(T_, tokens_), panels = TILED_FEATURES / Tile::COLUMNS;
    auto packed_x = at::empty({blocks * tokens_ * d_}, x_.options());
    auto packed_W = at::empty({TILED_FEATURES * d_}, x_.options());
    float *tokens = packed_x.mutable_data_ptr<float>(), *features = packed_W.mutable_data_ptr<float>();
    const float *x = x_.const_data_ptr<float>(), *W = W_.const_data_ptr<float>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t t = block * tokens_;
        Tile::pack_tokens(x + t * d_, std::min(tokens_, T_ - t), d_, tokens + t * d_);
      }
    });
    for (int64_t start = 0; start < F_; start += TILED_FEATURES) {
      const int64_t n = std::min(panels, above(F_ - start, Tile::COLUMNS));
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++) {
          const int64_t f = start + panel * Tile::COLUMNS;
          Tile::pack_features(W, f, F_, d_, W_.stride(0), W_.stride(1), features + panel * Tile::COLUMNS * d_);
        }
      });
      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) scan_block(block * tokens_, tokens, start, n, features);
      });
    }
  }

 private:
  static int64_t above(int64_t n, int64_t part) { return (n + part - 1) / part; }

  void scan_block(int64_t first, const float* tokens, int64_t start, int64_t panels, const float* features) {
    const int64_t last = std::min(first + tokens_, T_);
    Vec sums[Tile::ROWS][2];
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t f = start + panel * Tile::COLUMNS;
      const float* W = features + panel * Tile::COLUMNS * d_;
      for (int64_t t = first; t < last; t += Tile::ROWS) {
        Tile::multiply(tokens + t * d_, W, bias_.data() + f, d_, sums);
        for (int64_t r = 0; r < std::min(Tile::ROWS, last - t); r++) {
          const Vec threshold(thresholds_[t + r]);
          for (int64_t half = 0; half < 2; half++) {
            const int chosen = (sums[r][half] <= threshold).zero_mask();  // a bit per lane; also those that are NaN
            if (chosen) take(t + r, f + half * Vec::size(), sums[r][half], chosen);
          }
        }
      }
    }
  }

  void take(int64_t t, int64_t f, const Vec& values, int chosen) {
    float lanes[Vec::size()];
    values.store(lanes);
    for (; chosen; chosen &= chosen - 1) {
      const int lane = __builtin_ctz(chosen);
      if (f + lane < F_) best_[t].take(lanes[lane], f + lane);
    }
    thresholds_[t] = best_[t].threshold();
  }

  const at::Tensor x_, W_;
  std::vector<float> bias_, thresholds_;
  std::vector<Best<float>>& best_;
  int64_t T_, d_, F_, tokens_;
};

void scan(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, std::vector<Best<double>>& best) {
  scan_panels(x, W_enc, b_enc, best);
}

void scan(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, std::vector<Best<float>>& best) {
  if (IN_TILES && x.size(0) >= TILED_FROM) {
    TiledScan(x, W_enc.to(at::kFloat), b_enc.to(at::kFloat).contiguous(), best).run();
  } else {
    scan_panels(x, W_enc, b_enc, best);
  }
}

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
  const int64_t T = x.size(0);
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto centred = (b_dec.has_value() ? x - *b_dec : x).to(wide).contiguous();
  auto values = at::empty({T, k}, centred.options());
  auto indices = at::empty({T, k}, centred.options().dtype(at::kLong));
  if (T == 0) return {values.to(x.scalar_type()), indices};
  AT_DISPATCH_FLOATING_TYPES(wide, "encode_topk", [&] {
    std::vector<Best<scalar_t>> best(T, Best<scalar_t>(k));
    scan(centred, W_enc, b_enc, best);
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
