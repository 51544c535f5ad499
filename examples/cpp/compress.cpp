// The operators in a C++ program: a quarter is kept of every partition of 128 tokens.
#include <ATen/ATen.h>
#include <lagkv/operators.h>

#include <iostream>

int main() {
  const at::NoGradGuard no_grad;
  const at::Tensor key = at::randn({1, 8, 4096, 128}), value = at::randn({1, 8, 4096, 128});  // [B, H, N, D]
  const auto [new_key, new_value, index] =
      lagkv::compress(key, value, /*start=*/16, /*lag_size=*/128, /*keep=*/32);
  std::cout << "of " << key.size(2) << " tokens " << new_key.size(2) << " stay, the last of them "
            << index.max().item<int>() << '\n';
}
