// Complete-linkage clustering of a graph with a size cap: cliques, and the order in which they grew.
//
// Again and again the two clusters whose least similar pair is most similar are joined, as long as every pair between them is an
// edge and the joint size is within the cap; ties go to the smaller first and then the smaller second cluster. A cluster is called
// by its smallest node. Nodes are numbered in the canonical order of the prompts, so the outcome depends on their set alone.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "dense_linkage.h"
#include "sparse_linkage.h"

namespace sage::grouping {

// All merges, in order. edges: row < col < n; a pair may come several times. Nodes without an edge cost next to nothing.
inline std::vector<Merge> complete_linkage(int64_t n, std::vector<Pair> edges, int64_t max_size) {
  std::vector<int32_t> number(n, 0), names;  // of the nodes that have an edge; names are ascending, so ties stay what they are
  for (const Pair& edge : edges) {
    if (edge.row < 0 || edge.row >= edge.col || edge.col >= n) throw std::invalid_argument("edges must have 0 <= row < col < n");
    number[edge.row] = number[edge.col] = 1;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!number[i]) continue;
    number[i] = static_cast<int32_t>(names.size());
    names.push_back(static_cast<int32_t>(i));
  }
  for (Pair& edge : edges) edge = {number[edge.row], number[edge.col], edge.similarity};
  const int64_t count = static_cast<int64_t>(names.size());
  std::vector<Merge> merges;
  if (DenseLinkage::suits(count, static_cast<int64_t>(edges.size()))) {
    merges = DenseLinkage(static_cast<int32_t>(count), edges, max_size).run();
  } else {
    merges = SparseLinkage(count, edges, max_size).run(edges);
  }
  for (Merge& merge : merges) merge = {names[merge.kept], names[merge.gone], merge.similarity};
  return merges;
}

}  // namespace sage::grouping
