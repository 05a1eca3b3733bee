// branch_step: one output row, tile by tile.

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

// Scratch tiles: three sums, then the inputs. Uncond is used up before m1 is read, and L before noise is drawn.
enum Slot { kSample = kNext + 1, kOutput, kHistory, kLast = kHistory + 3, kSlots, kUncond = kHistory, kDrawn = kLast };

// The machine of `update`: a value is a tile of floats, the input itself if that is float32 and else a widened copy.
template <class M, class S>
struct Tile {
  using Value = const float*;
  const RowData<M, S>& row;
  int64_t begin;
  int count;
  alignas(64) float scratch[kSlots][kTile];

  Tile(const RowData<M, S>& data, int64_t at, int64_t end)
      : row(data), begin(at), count(static_cast<int>(end - at < kTile ? end - at : kTile)) {}  // scratch stays unset

  SAGE_INLINE const float* read(const float* from, int) { return from + begin; }
  template <class Half>
  SAGE_INLINE const float* read(const Half* from, int slot) {
    widen_all(from + begin, scratch[slot], count);
    return scratch[slot];
  }

  SAGE_INLINE Value sample() { return read(row.sample, kSample); }
  SAGE_INLINE Value output() {
    const float* const cond = read(row.cond, kOutput);
    if (row.uncond == nullptr) return cond;
    guide(cond, read(row.uncond, kUncond), row.guidance, scratch[kOutput], count);
    return scratch[kOutput];
  }
  SAGE_INLINE Value history(int i) { return read(row.history[i], kHistory + i); }
  SAGE_INLINE Value last() { return read(row.last, kLast); }
  SAGE_INLINE Value noise() {
    if (!row.seeded) return row.noise + begin;
    draw(row.seed, row.call, 0, begin, count, scratch[kDrawn]);
    return scratch[kDrawn];
  }

  // Where a sum is computed: where it is stored if the state is float32.
  SAGE_INLINE float* target(Place place) {
    if constexpr (sizeof(S) == sizeof(float)) {
      if (place == kDenoised && row.denoised) return row.denoised + begin;
      if (place == kNext) return row.next + begin;
    }
    return scratch[place];
  }
  SAGE_INLINE TileSum sum(Place place) {
    const bool stored = place == kNext || (place == kDenoised ? row.denoised : row.corrected) != nullptr;
    return TileSum(target(place), count, stored);
  }
  SAGE_INLINE Value clamp(Value value, float bound) {
    if (bound == __builtin_inff()) return value;
    float* const kept = target(kDenoised);  // the value may be an input
    for (int i = 0; i < count; i++) {       // comparisons with NaN are false, so NaN passes
      const float v = value[i] > bound ? bound : value[i];
      kept[i] = v < -bound ? -bound : v;
    }
    return kept;
  }
  SAGE_INLINE void put(Value denoised, Value corrected, Value next, float s) {
    store(1.0f, denoised, row.denoised);
    store(1.0f, corrected, row.corrected);
    store(1.0f, next, row.next);
    store(s, next, row.model_input);
    if (row.model_input_again) memcpy(row.model_input_again + begin, row.model_input + begin, count * sizeof(M));
  }
  template <class T>
  SAGE_INLINE void store(float k, Value value, T* to) {
    if (to) scale_all(k, value, to + begin, count);
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
  for (int64_t at = begin; at < end; at += kTile) {
    Tile<M, S> tile(data, at, end);
    update(k, tile);
  }
}

static void branch_step(const BranchStep& args, int64_t row, int64_t begin, int64_t end) {
  if (args.model == DType::kFloat32) return step_row<float, float>(args, row, begin, end);
  const bool wide = args.state == DType::kFloat32;
  if (args.model == DType::kBFloat16) {
    return wide ? step_row<BFloat16, float>(args, row, begin, end) : step_row<BFloat16, BFloat16>(args, row, begin, end);
  }
  return wide ? step_row<Float16, float>(args, row, begin, end) : step_row<Float16, Float16>(args, row, begin, end);
}
