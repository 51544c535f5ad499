// Calls every operator and writes what it returned or changed to a file, tensor after tensor, as
// tests/ops/test_cpp.py does.
#include <ATen/ATen.h>
#include <lagkv/operators.h>

#include <exception>
#include <fstream>
#include <initializer_list>
#include <iostream>

namespace {

/// Numbers that Python makes the same way.
at::Tensor numbers(at::IntArrayRef shape, double step) {
  const int64_t count = c10::multiply_integers(shape);
  return at::arange(count, at::kFloat).mul(step).remainder(1.0).reshape(shape);
}

at::Tensor int32(std::initializer_list<int> values) { return at::tensor(values, at::kInt); }

void run(std::ofstream& out) {
  const auto write = [&](std::initializer_list<at::Tensor> tensors) {
    for (const at::Tensor& tensor : tensors) {
      const at::Tensor x = tensor.contiguous();
      out.write(static_cast<const char*>(x.const_data_ptr()), static_cast<std::streamsize>(x.nbytes()));
    }
  };
  const at::Tensor key = numbers({2, 3, 70, 16}, 0.37), value = numbers({2, 3, 70, 24}, 0.71);
  for (const char* score : {"std", "cosine"}) {
    const auto [new_key, new_value, index] = lagkv::compress(key, value, 4, 16, 5, 0.5, score);
    write({new_key, new_value, index, lagkv::lag_score(key, value, 4, 16, 0.5, score)});
  }
  const at::Tensor score = lagkv::lag_score(key, value, 4, 16);
  const at::Tensor best = lagkv::topk_index(score, 3);
  write({lagkv::partition_bounds(key, 4, 16), best, lagkv::compact(key, best.select(2, 0).contiguous())});

  const at::Tensor k = key.clone(), v = value.clone();
  write({lagkv::compress_(k, v, 4, 16, 5), k, v});

  const at::Tensor slot_key = key.clone(), slot_value = value.clone(), start = int32({4, 0}),
                   length = int32({70, 50});
  write({lagkv::compress_ragged_(slot_key, slot_value, start, length, 16, 5), slot_key, slot_value, start,
         length});

  const at::Tensor rows_key = numbers({70, 3, 16}, 0.37), rows_value = numbers({70, 3, 24}, 0.71);
  const auto [packed_key, packed_value, packed_index, cu_seqlens, new_start] =
      lagkv::compress_varlen(rows_key, rows_value, int32({0, 70}), int32({4}), 16, 5);
  const int64_t valid = cu_seqlens[-1].item<int>();
  write({packed_key.narrow(0, 0, valid), packed_value.narrow(0, 0, valid), packed_index, cu_seqlens,
         new_start});

  const at::Tensor pool_key = numbers({5, 16, 3, 16}, 0.37), pool_value = numbers({5, 16, 3, 24}, 0.71);
  const at::Tensor table = int32({3, 1, 4, 0, 2}).reshape({1, 5}), page_start = int32({4}),
                   page_length = int32({70});
  write({lagkv::compress_paged_(pool_key, pool_value, table, page_start, page_length, 16, 5), pool_key,
         pool_value, page_start, page_length});

  write({lagkv::lag_score(key, value, 4, 16, 1.0, "blend", 3)});
  const auto [head_key, head_value, head_index] =
      lagkv::compress(key, value, 4, 16, 5, 1.0, "blend", 3, "head");
  write({head_key, head_value, head_index});
  const auto [next_key, next_value, next_index, carried] =
      lagkv::compress_carried(key, value, numbers({2, 3, 2}, 0.3), 6, 16, 5, 1.0, "blend", 3);
  write({next_key, next_value, next_index, carried});
  const at::Tensor scores = numbers({2, 3, 70}, 0.3);
  write({lagkv::compress_(key.clone(), value.clone(), 6, 16, 5, 1.0, "blend", 3, "head", scores, 4), scores});

  const at::Tensor key_blocks = numbers({9, 16, 3, 16}, 0.37), value_blocks = numbers({9, 16, 3, 24}, 0.71);
  const at::Tensor target = int32({5, 7, 8}).reshape({1, 3});
  write({lagkv::compress_blocks(key_blocks, value_blocks, table, target, int32({0}), int32({1}), 4, 32, 16,
                                1.0, "blend", 3),
         key_blocks, value_blocks});
}

}  // namespace

int main(int count, char** arguments) {
  const at::NoGradGuard no_grad;
  try {
    if (count == 2) {
      std::ofstream out(arguments[1], std::ios::binary);
      run(out);
    } else {
      const at::Tensor x = numbers({1, 1, 8, 16}, 0.5);
      lagkv::compress(x, x, 0, 2, 3);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
