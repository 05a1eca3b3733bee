// What a denoiser row must be worth for a node to be split at a call: the isotonic regression of gains on a forest.
//
// The prices are nearest to the gains in the mean square among those which no node has a higher one of than its parent. Cut at any
// price, they give the set of splits that gains most after paying this price for each, where a node is split only if its parent is.
// From the leaves up each node pools with the blocks below it, the one of greatest mean first, while that mean is above its own
// (the parametric closure of Gallo, Grigoriadis and Tarjan, on a forest). O(n log n) a call, by melding skew heaps.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace sage::grouping {

class BlockPool {
 public:
  explicit BlockPool(int64_t n) : total_(n), mean_(n), count_(n), into_(n), below_(n), left_(n), right_(n) {}

  // One call: gains[v * stride] of every node in, prices[v * stride] out; parents as for split_prices.
  void run(const int32_t* parents, const double* gains, double* prices, int64_t stride) {
    const int32_t n = static_cast<int32_t>(count_.size());
    for (int32_t v = 0; v < n; ++v) {
      total_[v] = gains[v * stride];
      count_[v] = 1;
      into_[v] = v;
      below_[v] = left_[v] = right_[v] = NONE;
    }
    for (int32_t v = 0; v < n; ++v) {
      mean_[v] = total_[v];
      while (below_[v] != NONE && mean_[below_[v]] > mean_[v]) absorb(v);
      if (parents[v] != NONE) below_[parents[v]] = meld(below_[parents[v]], v);
    }
    for (int32_t v = n - 1; v >= 0; --v) {
      if (into_[v] != v) mean_[v] = mean_[into_[v]];
      prices[v * stride] = mean_[v];
    }
  }

 private:
  static constexpr int32_t NONE = -1;

  // The block of v takes in the greatest block below it, and what is below that.
  void absorb(int32_t v) {
    const int32_t block = below_[v];
    into_[block] = v;
    total_[v] += total_[block];
    count_[v] += count_[block];
    mean_[v] = total_[v] / count_[v];
    below_[v] = meld(meld(left_[block], right_[block]), below_[block]);
  }

  bool before(int32_t a, int32_t b) const { return mean_[a] != mean_[b] ? mean_[a] > mean_[b] : a < b; }

  // One heap of two; a heap is called by its greatest block, the first among equals.
  int32_t meld(int32_t a, int32_t b) {
    int32_t root = NONE, *slot = &root;
    while (a != NONE && b != NONE) {
      if (before(b, a)) std::swap(a, b);
      *slot = a;
      const int32_t right = right_[a];
      right_[a] = left_[a];
      slot = &left_[a];
      a = right;
    }
    *slot = a != NONE ? a : b;
    return root;
  }

  std::vector<double> total_, mean_;                        // of the block that a node is the top of
  std::vector<int32_t> count_, into_, below_, left_, right_;  // into_: itself, or the top of the block that took it in
};

// parents: int32 [n], the parent's number, greater than the node's own, or -1. gains, prices: float64 [n, calls], row-major.
inline void split_prices(const int32_t* parents, const double* gains, int64_t n, int64_t calls, double* prices) {
  BlockPool pool(n);
  for (int64_t call = 0; call < calls; ++call) pool.run(parents, gains + call, prices + call, calls);
}

}  // namespace sage::grouping
