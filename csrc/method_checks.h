// Checks of how an operator scores and chooses: the numbers and names of a Method, and scores that go with
// the rows.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "argument_checks.h"
#include "params.h"

namespace lagkv {

/// The arguments of a method as an operator takes them.
struct MethodArguments {
  double value_weight;
  std::string score;
  int64_t smooth;
  std::string budget = "partition";
};

inline Score check_score(const char* op, const std::string& score) {
  if (score == "std") return Score::kStd;
  if (score == "cosine") return Score::kCosine;
  check(score == "blend", op, "score must be 'std', 'cosine' or 'blend', got '", score, "'");
  return Score::kBlend;
}

inline Budget check_budget(const char* op, const std::string& budget) {
  if (budget == "partition") return Budget::kPartition;
  check(budget == "head", op, "budget must be 'partition' or 'head', got '", budget, "'");
  return Budget::kHead;
}

inline Method check_scoring(const char* op, const MethodArguments& method) {
  check(std::isfinite(method.value_weight), op, "value_weight must be finite, got ", method.value_weight);
  const Score score = check_score(op, method.score);
  check(method.smooth >= 1 && method.smooth % 2 == 1, op, "smooth must be odd and at least 1, got ",
        method.smooth);
  return {method.value_weight, score, method.smooth, check_budget(op, method.budget)};
}

inline Method check_method(const char* op, int64_t lag_size, int64_t keep, const MethodArguments& method,
                           int64_t least_keep = 1) {
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size, least_keep);
  return check_scoring(op, method);
}

inline void check_score_dtype(const char* op, const char* name, const Tensor& scores, const char* of,
                              const Tensor& rows) {
  const bool is_double = rows.scalar_type() == ScalarType::Double;
  check(scores.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op, name, " must be ",
        is_double ? "float64" : "float32", " where ", of, " is ", DtypeText{rows}, ", got ",
        DtypeText{scores});
}

/// `scores` of an operator in place: one number for every row of every head, in whatever order `key` has
/// them.
inline void check_scores(const char* op, const RowsLayout& layout, const Tensor& key,
                         const std::optional<Tensor>& scores, int64_t sink_size, const Method& method) {
  check(sink_size >= 0, op, "sink_size must be at least 0, got ", sink_size);
  if (!scores) {
    check(sink_size == 0, op, "sink_size must be 0 where no scores are given, got ", sink_size);
    return;
  }
  check(method.budget == Budget::kHead, op,
        "scores must not be given with budget='partition', which carries none, got shape ",
        ShapeText{*scores});
  check(scores->dim() == 3, op, "scores must have 3 dimensions, got shape ", ShapeText{*scores});
  check_score_dtype(op, "scores", *scores, layout.key, key);
  check_device(op, "scores", *scores, layout.key, key);
  for (int64_t dim = 0; dim < 3; ++dim) {
    check(scores->size(dim) == key.size(dim), op, "scores must agree with ", layout.key, " in ",
          layout.dims[dim], " ", ShapeText{key}, ", got shape ", ShapeText{*scores});
  }
  check_aligned(op, "scores", *scores);
}

/// `carried [B, H, C]` of compress_carried.
inline void check_carried(const char* op, const Tensor& key, const Tensor& carried, int64_t start) {
  check(carried.dim() == 3, op, "carried must have 3 dimensions [B, H, C], got shape ", ShapeText{carried});
  check_score_dtype(op, "carried", carried, "key", key);
  check_device(op, "carried", carried, "key", key);
  check(carried.size(0) == key.size(0) && carried.size(1) == key.size(1), op,
        "carried must agree with key in batch and heads ", ShapeText{key}, ", got shape ",
        ShapeText{carried});
  check(carried.size(2) <= start, op, "carried must have at most start (", start, ") columns, got ",
        carried.size(2));
  check_aligned(op, "carried", carried);
}

}  // namespace lagkv
