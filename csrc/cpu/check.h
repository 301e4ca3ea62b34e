// Checks of every op before it touches memory. A message names the argument, the expected and the given value.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

namespace fastfg {

// Nothing inside an op is recorded for autograd. Worker threads do not inherit the caller's grad mode or inference
// mode, so each worker thread that calls ATen needs this guard too.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

inline void check_cpu(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu() && tensor.layout() == at::kStrided, name, ": expected a dense tensor on the CPU, got ",
      tensor.layout(), " on ", tensor.device());
}

// float32 or float64.
inline void check_wide(const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, name, ": expected float32 or float64, got ", type);
}

inline void check_float(const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      ": expected float16, bfloat16, float32 or float64, got ", type);
}

inline void check_index(const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kLong || type == at::kInt, name, ": expected int64 or int32, got ", type);
}

// Features 0 to F - 1. The loop has no branch, so it is compiled to vector instructions.
inline void check_range(const char* name, const int64_t* features, int64_t n, int64_t F) {
  bool outside = false;
  for (int64_t i = 0; i < n; i++) outside |= features[i] < 0 || features[i] >= F;
  if (!outside) return;
  const auto wrong = *std::find_if(features, features + n, [F](int64_t f) { return f < 0 || f >= F; });
  TORCH_CHECK_INDEX(false, name, ": expected features from 0 to ", F - 1, ", got ", wrong);
}

// The sizes known so far, by letter. The first tensor with a letter sets its size, and the others must agree.
class Sizes {
 public:
  using Letters = std::initializer_list<std::string_view>;

  void check(const char* name, const at::Tensor& tensor, Letters letters) {
    check_cpu(name, tensor);
    TORCH_CHECK_VALUE(fits(tensor, letters), name, ": expected ", describe(letters), ", got ", tensor.sizes());
    for (int64_t i = 0; i < tensor.dim(); i++) {
      if (!find(letters.begin()[i])) sizes_.emplace_back(letters.begin()[i], tensor.size(i));
    }
  }

  int64_t operator[](std::string_view letter) const { return *find(letter); }

 private:
  const int64_t* find(std::string_view letter) const {
    for (const auto& [known, size] : sizes_) {
      if (known == letter) return &size;
    }
    return nullptr;
  }

  bool fits(const at::Tensor& tensor, Letters letters) const {
    if (tensor.dim() != static_cast<int64_t>(letters.size())) return false;
    for (int64_t i = 0; i < tensor.dim(); i++) {
      const int64_t* known = find(letters.begin()[i]);
      if (known && *known != tensor.size(i)) return false;
    }
    return true;
  }

  // As in "[49, K] (T K)": a number where the size is known.
  std::string describe(Letters letters) const {
    std::ostringstream expected, names;
    const char *comma = "", *space = "";
    for (const auto letter : letters) {
      expected << comma;
      if (const int64_t* known = find(letter)) {
        expected << *known;
      } else {
        expected << letter;
      }
      names << space << letter;
      comma = ", ", space = " ";
    }
    return "[" + expected.str() + "] (" + names.str() + ")";
  }

  std::vector<std::pair<std::string_view, int64_t>> sizes_;
};

}  // namespace fastfg
