// `SparseLinkage` for graphs with so many edges that a matrix of all pairs is smaller than lists of neighbours: the same merges, in
// O(n^2) memory and, unless most rows lose their best again and again, O(n^2) time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "sparse_linkage.h"

namespace sage::grouping {

class DenseLinkage {
 public:
  // Whether a matrix takes less memory than the lists and their queue.
  static bool suits(int64_t n, int64_t num_edges) { return n * n <= 8 * num_edges; }

  // edges: row < col < n; a pair may come several times.
  DenseLinkage(int32_t n, const std::vector<Pair>& edges, int64_t max_size)
      : n_(n), max_size_(max_size), size_(n, 1), nearest_(n, 0), best_(n, DEAD), alike_(static_cast<int64_t>(n) * n, DEAD) {
    for (const Pair& edge : edges) {
      if (at(edge.row, edge.col) != DEAD && at(edge.row, edge.col) != edge.similarity)
        throw std::invalid_argument("a pair must have one similarity");
      at(edge.row, edge.col) = at(edge.col, edge.row) = edge.similarity;
    }
    for (int32_t i = 0; i < n; ++i) look(i);
  }

  std::vector<Merge> run() {
    std::vector<Merge> merges;
    while (n_ > 0) {
      const int32_t kept = static_cast<int32_t>(std::max_element(best_.begin(), best_.end()) - best_.begin());
      if (best_[kept] == DEAD) break;
      const int32_t gone = nearest_[kept];
      if (size_[kept] + size_[gone] > max_size_) {  // only before the first merge of either: later ones are dead by then
        at(kept, gone) = at(gone, kept) = DEAD;
        look(kept);
        look(gone);
        continue;
      }
      merges.push_back({kept, gone, best_[kept]});
      join(kept, gone);
    }
    return merges;
  }

 private:
  static constexpr int32_t DEAD = INT32_MIN;

  int32_t& at(int32_t i, int32_t j) { return alike_[static_cast<int64_t>(i) * n_ + j]; }

  // The most similar cluster of i, the first among equals.
  void look(int32_t i) {
    const int32_t* row = &at(i, 0);
    if (best_[i] != DEAD) {  // similarities only fall: those before the former one are lower still, those after may be equal
      const int32_t* next = std::find(row + nearest_[i], row + n_, best_[i]);
      if (next != row + n_) {
        nearest_[i] = static_cast<int32_t>(next - row);
        return;
      }
    }
    nearest_[i] = static_cast<int32_t>(std::max_element(row, row + n_) - row);
    best_[i] = row[nearest_[i]];
  }

  void join(int32_t kept, int32_t gone) {
    size_[kept] += size_[gone];
    for (int32_t k = 0; k < n_; ++k) {
      const int32_t joint = size_[kept] + size_[k] <= max_size_ ? std::min(at(kept, k), at(gone, k)) : DEAD;
      at(kept, k) = at(k, kept) = joint;
      at(gone, k) = at(k, gone) = DEAD;
    }
    at(kept, kept) = DEAD;
    look(kept);
    best_[gone] = DEAD;
    for (int32_t k = 0; k < n_; ++k) {  // similarities only fall: a row has another best only if it was one of these two and fell
      const bool touched = nearest_[k] == kept || nearest_[k] == gone;
      if (k != kept && best_[k] != DEAD && touched && at(k, nearest_[k]) != best_[k]) look(k);
    }
  }

  int32_t n_;
  int64_t max_size_;
  std::vector<int64_t> size_;
  std::vector<int32_t> nearest_, best_;  // of each cluster; DEAD: none
  std::vector<int32_t> alike_;           // [n, n]
};

}  // namespace sage::grouping
