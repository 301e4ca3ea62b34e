// Vectors of numbers in registers.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace fastfg {

// The sum over the lanes, in order.
template <typename scalar_t>
scalar_t total(const at::vec::Vectorized<scalar_t>& sums) {
  scalar_t lanes[at::vec::Vectorized<scalar_t>::size()], sum = 0;
  sums.store(lanes);
  for (scalar_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace fastfg
