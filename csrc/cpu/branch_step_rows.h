// branch_step: one output row, in vectors.

// Where one output row reads and writes, at its first element; null for what is not given or not wanted.
template <class M, class S>
struct RowData {
  const S *sample, *last, *history[3];
  const M *cond, *uncond;
  const float* noise;
  S *next, *denoised, *corrected;
  M *model_input, *model_input_again;
  uint64_t seed;
  uint32_t call;
  bool seeded;
  float guidance;
};

// The machine of `update` for kWidth elements, the last few of a row fewer.
template <class M, class S, bool kWhole>
struct RowVector {
  using Value = Vec;
  const RowData<M, S>& row;
  const float* drawn;  // noise of these elements, if it comes from a seed
  int64_t at;
  int count;

  template <class T>
  SAGE_INLINE Vec read(const T* from) const {
    return load<kWhole>(from + at, count);
  }
  SAGE_INLINE Vec sample() const { return read(row.sample); }
  SAGE_INLINE Vec output() const {
    const Vec cond = read(row.cond);
    return row.uncond == nullptr ? cond : guide(cond, read(row.uncond), row.guidance);
  }
  SAGE_INLINE Vec history(int i) const { return read(row.history[i]); }
  SAGE_INLINE Vec last() const { return read(row.last); }
  SAGE_INLINE Vec noise() const { return drawn ? load<true>(drawn, kWidth) : read(row.noise); }

  SAGE_INLINE VecSum sum(Place) const { return {}; }
  SAGE_INLINE Vec clamp(Vec value, float bound) const {
    if (bound == bits_as<float>(0x7F800000u)) return value;
    return {clamped(value.a, bound), clamped(value.b, bound), clamped(value.c, bound), clamped(value.d, bound)};
  }
  SAGE_INLINE void put(Vec denoised, Vec corrected, Vec next, float s) const {
    store<kWhole>(next, row.next + at, count);
    if (row.denoised) store<kWhole>(denoised, row.denoised + at, count);
    if (row.corrected) store<kWhole>(corrected, row.corrected + at, count);
    if (row.model_input == nullptr) return;
    const Vec input = s * next;
    store<kWhole>(input, row.model_input + at, count);
    if (row.model_input_again) store<kWhole>(input, row.model_input_again + at, count);
  }
};

template <class M, class S>
static void step_row(const BranchStep& args, int64_t row, int64_t begin, int64_t end) {
  const int64_t place = row * args.elements, copy = args.rows * args.elements;
  M* const model_input = static_cast<M*>(args.model_input);
  RowData<M, S> data{};
  data.sample = row_of<S>(args.sample, row);
  data.last = row_of<S>(args.last, row);
  for (int i = 0; i < 3; i++) data.history[i] = row_of<S>(args.m[i], row);
  data.cond = row_of<M>(args.model_output, row);
  data.uncond = row_of<M>(args.uncond, row);
  data.noise = row_of<float>(args.noise, row);
  data.next = static_cast<S*>(args.next) + place;
  if (args.denoised) data.denoised = static_cast<S*>(args.denoised) + place;
  if (args.corrected) data.corrected = static_cast<S*>(args.corrected) + place;
  if (args.copies > 0) data.model_input = model_input + place;
  if (args.copies > 1) data.model_input_again = model_input + copy + place;
  data.seeded = args.seed != nullptr;
  if (data.seeded) data.seed = args.seed[row], data.call = args.call[row];
  if (data.uncond) data.guidance = args.guidance[row];

  const Row k = args.table[args.step[row]];
  const bool draws = data.seeded && k.c != 0.0f;
  float noise[kTile + kWidth];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = static_cast<int>(end - tile < kTile ? end - tile : kTile), whole = count / kWidth * kWidth;
    if (draws) draw(data.seed, data.call, 0, tile, count, noise);
    for (int i = 0; i < whole; i += kWidth) {
      RowVector<M, S, true> vector{data, draws ? noise + i : nullptr, tile + i, kWidth};
      update(k, vector);
    }
    if (whole < count) {
      RowVector<M, S, false> vector{data, draws ? noise + whole : nullptr, tile + whole, count - whole};
      update(k, vector);
    }
  }
}

static void branch_step(const BranchStep& args, int64_t row, int64_t begin, int64_t end) {
  with_types(args.model, args.state, [&](auto m, auto s) { step_row<decltype(m), decltype(s)>(args, row, begin, end); });
}
