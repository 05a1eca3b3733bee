// Exact cosine similarities of vectors on a grid, and the pairs of a tile that reach a threshold.
//
// A vector is a row of int32, a unit vector in multiples of 2^-25. The product of two rows is an integer below 2^51, summed exactly in
// 64 bits. A similarity is that product over the root of the product of both rows' squares, in millionths, ties to even: three
// operations in double, so equal rows have a similarity of a million. It depends on the two rows alone: not on the tile they were found
// in, not on threads, not on the instructions that the compiler chose.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define SAGE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SAGE_CLONES
#endif

namespace sage::grouping {

struct Pair {
  int32_t row, col, similarity;  // similarity in millionths
};

SAGE_CLONES static inline int64_t product(const int32_t* a, const int32_t* b, int64_t width) {
  int64_t sum = 0;
  for (int64_t k = 0; k < width; ++k) sum += static_cast<int64_t>(a[k]) * b[k];
  return sum;
}

// Rows of a grid, [n, width], and the product of each with itself.
struct Grid {
  const int32_t* values;
  const int64_t* squares;
  int64_t width;

  int32_t similarity(int64_t a, int64_t b) const {  // in millionths
    const double both = static_cast<double>(product(values + a * width, values + b * width, width));
    return static_cast<int32_t>(std::nearbyint(both * 1e6 / std::sqrt(static_cast<double>(squares[a]) * static_cast<double>(squares[b]))));
  }
};

// Whether any of `count` values reaches `floor`. Written for the vectoriser: most stretches of a tile hold no pair.
SAGE_CLONES static inline bool any_reaches(const float* values, int64_t count, float floor) {
  int found = 0;
  for (int64_t k = 0; k < count; ++k) found |= values[k] >= floor;
  return found != 0;
}

// Calls part(first, end, number) on stretches of [0, count), one thread each if the system has as many; returns when all have ended,
// and throws what a part threw.
template <class Part>
void in_threads(int64_t count, int64_t threads, const Part& part) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::vector<std::exception_ptr> errors(threads);
  const auto run = [&](int64_t t) {
    try {
      part(count * t / threads, count * (t + 1) / threads, t);
    } catch (...) {
      errors[t] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  for (int64_t t = 1; t < threads; ++t) {
    try {
      others.emplace_back(run, t);
    } catch (const std::system_error&) {
      run(t);
    }
  }
  run(0);
  for (auto& other : others) other.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

// Where a tile of approximate products lies among all rows.
struct Tile {
  const float* values;  // [rows, cols], a row `stride` values apart
  int64_t rows, cols, stride;
  const int32_t* row_numbers;  // [rows], into the grid
  const int32_t* col_numbers;  // [cols]
};

// The pairs of a tile that reach `least`, row by row; in each the smaller number is `row`.
//
// floor: a value below it stands for a similarity below `least` for sure. What is above is computed again, exactly.
// A tile may hold a row against itself, which is no pair.
// ordered: take pairs whose col number is above their row number only (where another tile, or this one, has them the other way).
inline std::vector<Pair> tile_pairs(const Tile& tile, const Grid& grid, float floor, int32_t least, bool ordered, int64_t threads) {
  constexpr int64_t STRETCH = 64;
  std::vector<std::vector<Pair>> found(std::max<int64_t>(1, threads));
  in_threads(tile.rows, threads, [&](int64_t first, int64_t end, int64_t thread) {
    auto& pairs = found[thread];
    for (int64_t r = first; r < end; ++r) {
      const float* values = tile.values + r * tile.stride;
      const int32_t row = tile.row_numbers[r];
      for (int64_t begin = 0; begin < tile.cols; begin += STRETCH) {
        const int64_t stop = std::min(begin + STRETCH, tile.cols);
        if (!any_reaches(values + begin, stop - begin, floor)) continue;
        for (int64_t c = begin; c < stop; ++c) {
          const int32_t col = tile.col_numbers[c];
          if (!(values[c] >= floor) || col == row || (ordered && col < row)) continue;
          const int32_t similarity = grid.similarity(row, col);
          if (similarity >= least) pairs.push_back({std::min(row, col), std::max(row, col), similarity});
        }
      }
    }
  });
  for (size_t thread = 1; thread < found.size(); ++thread)
    found[0].insert(found[0].end(), found[thread].begin(), found[thread].end());
  return std::move(found[0]);
}

}  // namespace sage::grouping
