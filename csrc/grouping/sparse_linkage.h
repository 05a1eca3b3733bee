// Complete linkage (complete_linkage.h) with lists of neighbours.
//
// Two clusters are adjacent if all pairs between them are edges. What the joint cluster is adjacent to are those that both parts
// were: lists only ever shrink. Every edge dies at most once, so all merges together cost O(E log E) time and O(n + E) memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <stdexcept>
#include <vector>

#include "similarity.h"

namespace sage::grouping {

struct Merge {
  int32_t kept, gone, similarity;  // kept < gone; similarity: of the least similar pair of the joint cluster, in millionths
};

class SparseLinkage {
 public:
  // edges: row < col < n; a pair may come several times. Sorted, and each is kept once.
  SparseLinkage(int64_t n, std::vector<Pair>& edges, int64_t max_size) : max_size_(max_size), size_(n, 1), first_(n + 1, 0) {
    std::sort(edges.begin(), edges.end(), sooner);
    const auto same = [](const Pair& a, const Pair& b) { return !sooner(a, b) && !sooner(b, a); };
    edges.erase(std::unique(edges.begin(), edges.end(), same), edges.end());
    for (const Pair& edge : edges) {
      ++first_[edge.row + 1];
      ++first_[edge.col + 1];
    }
    for (int64_t i = 0; i < n; ++i) first_[i + 1] += first_[i];
    count_.assign(n, 0);
    neighbours_.resize(2 * edges.size());
    for (const Pair& edge : edges) {
      neighbours_[first_[edge.row] + count_[edge.row]++] = {edge.col, edge.similarity};
      neighbours_[first_[edge.col] + count_[edge.col]++] = {edge.row, edge.similarity};
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto begin = neighbours_.begin() + first_[i];
      std::sort(begin, begin + count_[i], [](const Neighbour& a, const Neighbour& b) { return a.node < b.node; });
      if (std::adjacent_find(begin, begin + count_[i], [](auto& a, auto& b) { return a.node == b.node; }) != begin + count_[i])
        throw std::invalid_argument("a pair must have one similarity");
    }
  }

  // All merges, in order. `edges` are those of the constructor.
  std::vector<Merge> run(const std::vector<Pair>& edges) {
    std::vector<Merge> merges;
    size_t next = 0;
    while (next < edges.size() || !lowered_.empty()) {
      Pair pair;
      if (lowered_.empty() || (next < edges.size() && sooner(edges[next], lowered_.top()))) {
        pair = edges[next++];
      } else {
        pair = lowered_.top();
        lowered_.pop();
      }
      if (is_current(pair)) {
        merges.push_back({pair.row, pair.col, pair.similarity});
        join(pair.row, pair.col);
      }
    }
    return merges;
  }

 private:
  static constexpr int32_t DEAD = INT32_MIN;
  struct Neighbour {
    int32_t node, similarity;  // DEAD: no longer adjacent
  };

  static bool sooner(const Pair& a, const Pair& b) {
    if (a.similarity != b.similarity) return a.similarity > b.similarity;
    return a.row != b.row ? a.row < b.row : a.col < b.col;
  }
  struct Later {
    bool operator()(const Pair& a, const Pair& b) const { return sooner(b, a); }
  };

  Neighbour* find(int32_t of, int32_t node) {
    Neighbour* begin = neighbours_.data() + first_[of];
    Neighbour* end = begin + count_[of];
    Neighbour* found = std::lower_bound(begin, end, node, [](const Neighbour& a, int32_t b) { return a.node < b; });
    return found != end && found->node == node ? found : nullptr;
  }

  // Whether two clusters are still adjacent at this very similarity and may be joined. A cluster that is gone has no neighbours.
  bool is_current(const Pair& pair) {
    const Neighbour* entry = find(pair.row, pair.col);
    return entry && entry->similarity == pair.similarity && size_[pair.row] + size_[pair.col] <= max_size_;
  }

  void join(int32_t kept, int32_t gone) {
    size_[kept] += size_[gone];
    Neighbour* out = neighbours_.data() + first_[kept];
    const Neighbour *a = out, *a_end = out + count_[kept];
    const Neighbour *b = neighbours_.data() + first_[gone], *b_end = b + count_[gone];
    int64_t live = 0;
    while (a != a_end || b != b_end) {
      const int32_t node = b == b_end || (a != a_end && a->node < b->node) ? a->node : b->node;
      const int32_t left = a != a_end && a->node == node ? (a++)->similarity : DEAD;
      const int32_t right = b != b_end && b->node == node ? (b++)->similarity : DEAD;
      if (node == kept || node == gone || (left == DEAD && right == DEAD)) continue;
      if (right != DEAD) find(node, gone)->similarity = DEAD;
      if (left == DEAD) continue;
      const int32_t joint = size_[kept] + size_[node] <= max_size_ ? std::min(left, right) : DEAD;
      find(node, kept)->similarity = joint;
      if (joint == DEAD) continue;
      out[live++] = {node, joint};
      if (joint != left) lowered_.push({std::min(node, kept), std::max(node, kept), joint});
    }
    count_[kept] = live;
    count_[gone] = 0;
  }

  int64_t max_size_;
  std::vector<int64_t> size_, first_, count_;
  std::vector<Neighbour> neighbours_;  // of node i: count_[i] from first_[i] on, ascending
  std::priority_queue<Pair, std::vector<Pair>, Later> lowered_;  // pairs whose similarity fell when a cluster grew
};

}  // namespace sage::grouping
