// sage_kernels._grouping: NumPy arrays in and out, the GIL released while it computes. sage_kernels/grouping.py checks arguments.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <utility>

#include "complete_linkage.h"
#include "similarity.h"
#include "split_prices.h"

namespace py = pybind11;
using namespace sage::grouping;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

static_assert(sizeof(Pair) == 3 * sizeof(int32_t) && sizeof(Merge) == 3 * sizeof(int32_t));

// Triples of int32 as an array [n, 3].
template <class T>
Array<int32_t> triples(const std::vector<T>& rows) {
  Array<int32_t> out({static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(3)});
  if (!rows.empty()) std::memcpy(out.mutable_data(), rows.data(), rows.size() * sizeof(T));
  return out;
}

Grid grid_of(const Array<int32_t>& grid, const Array<int64_t>& squares) { return {grid.data(), squares.data(), grid.shape(1)}; }

Array<int32_t> py_tile_pairs(const Array<float>& tile, const Array<int32_t>& grid, const Array<int64_t>& squares,
                             const Array<int32_t>& row_numbers, const Array<int32_t>& col_numbers, float floor, int32_t least,
                             bool ordered, int64_t threads) {
  const Tile view{tile.data(), tile.shape(0), tile.shape(1), tile.shape(1), row_numbers.data(), col_numbers.data()};
  const Grid rows = grid_of(grid, squares);
  std::vector<Pair> pairs;
  {
    py::gil_scoped_release release;
    pairs = tile_pairs(view, rows, floor, least, ordered, threads);
  }
  return triples(pairs);
}

Array<int32_t> py_similarities(const Array<int32_t>& grid, const Array<int64_t>& squares, const Array<int32_t>& rows,
                               const Array<int32_t>& cols, int64_t threads) {
  const Grid given = grid_of(grid, squares);
  Array<int32_t> out(rows.size());
  int32_t* result = out.mutable_data();
  {
    py::gil_scoped_release release;
    const int32_t *a = rows.data(), *b = cols.data();
    in_threads(rows.size(), threads, [&](int64_t first, int64_t end, int64_t) {
      for (int64_t k = first; k < end; ++k) result[k] = given.similarity(a[k], b[k]);
    });
  }
  return out;
}

Array<int32_t> py_complete_linkage(int64_t num_nodes, const std::vector<Array<int32_t>>& parts, int64_t max_size) {
  std::vector<Merge> merges;
  {
    py::gil_scoped_release release;
    int64_t count = 0;
    for (const auto& part : parts) count += part.shape(0);
    std::vector<Pair> edges;
    edges.reserve(count);
    for (const auto& part : parts) {
      const Pair* given = reinterpret_cast<const Pair*>(part.data());
      edges.insert(edges.end(), given, given + part.shape(0));
    }
    merges = complete_linkage(num_nodes, std::move(edges), max_size);
  }
  return triples(merges);
}

Array<double> py_split_prices(const Array<int32_t>& parents, const Array<double>& gains) {
  Array<double> prices({gains.shape(0), gains.shape(1)});
  double* out = prices.mutable_data();
  {
    py::gil_scoped_release release;
    split_prices(parents.data(), gains.data(), gains.shape(0), gains.shape(1), out);
  }
  return prices;
}

}  // namespace

PYBIND11_MODULE(_grouping, module) {
  module.attr("interface") = 1;  // what sage_kernels/grouping.py asks for
  module.doc() = "Grouping core; see sage_kernels.grouping.";
  module.def("tile_pairs", &py_tile_pairs, py::arg("tile").noconvert(), py::arg("grid").noconvert(), py::arg("squares").noconvert(),
             py::arg("row_numbers").noconvert(), py::arg("col_numbers").noconvert(), py::arg("floor"), py::arg("least"),
             py::arg("ordered"), py::arg("threads"));
  module.def("similarities", &py_similarities, py::arg("grid").noconvert(), py::arg("squares").noconvert(), py::arg("rows").noconvert(), py::arg("cols").noconvert(),
             py::arg("threads"));
  module.def("complete_linkage", &py_complete_linkage, py::arg("num_nodes"), py::arg("parts").noconvert(), py::arg("max_size"));
  module.def("split_prices", &py_split_prices, py::arg("parents").noconvert(), py::arg("gains").noconvert());
}
