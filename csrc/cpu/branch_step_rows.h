// The CPU kernels for one instruction set. branch_step_cpu.cpp includes this once per set, inside a namespace and a target
// region of its own; hence no include guard, and no includes but the arithmetic. The loops are plain, for the vectoriser.
#include "../solver_math.h"

// Elements that go through `update` together: small enough that a dozen tiles of floats stay in the first cache.
constexpr int kTile = 256;

struct BFloat16 {
  static constexpr bool kIeee = false;
  uint16_t bits;
};
struct Float16 {
  static constexpr bool kIeee = true;
  uint16_t bits;
};

SAGE_INLINE float widen(BFloat16 h) { return bits_as<float>(static_cast<uint32_t>(h.bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
SAGE_INLINE void narrow(float f, BFloat16& h) {
  const uint32_t bits = bits_as<uint32_t>(f);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  h.bits = static_cast<uint16_t>((rounded | (f == f ? 0u : 0x7FC00000u)) >> 16);
}

// Subnormal halves go through a float whose last place is 2^-24, the step between them: no subnormal float appears.
SAGE_INLINE float widen(Float16 h) {
  const uint32_t word = h.bits, magnitude = word & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 224u << 23 : 112u << 23);
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude | 0x3F000000u) - 0.5f);
  return bits_as<float>((magnitude < 0x400u ? subnormal : normal) | ((word & 0x8000u) << 16));
}

SAGE_INLINE void narrow(float f, Float16& h) {
  const uint32_t bits = bits_as<uint32_t>(f), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // rounds beyond the largest half
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  h.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

template <class Half>
static void widen_all(const Half* __restrict from, float* __restrict to, int count) {
  int i = 0;
#ifdef SAGE_F16C
  if constexpr (Half::kIeee) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < count; i++) to[i] = widen(from[i]);
}

// to[i] = k * from[i], rounded to T.
template <class T>
static void scale_all(float k, const float* __restrict from, T* __restrict to, int count) {
  int i = 0;
#ifdef SAGE_F16C
  if constexpr (T::kIeee) {
    for (; i + 8 <= count; i += 8) {
      const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(k), _mm256_loadu_ps(from + i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; i++) narrow(mul(k, from[i]), to[i]);
}

static void scale_all(float k, const float* from, float* to, int count) {
  if (k == 1.0f) {
    if (from != to) memcpy(to, from, count * sizeof(float));
    return;
  }
  for (int i = 0; i < count; i++) to[i] = mul(k, from[i]);
}

template <int kTerms>
static void add_up(float* __restrict out, const float* const* values, const float* k, int count) {
  constexpr int kLast = kTerms - 1;
  const auto which = [](int t) { return t < kLast ? t : kLast; };
  const float *v0 = values[0], *v1 = values[which(1)], *v2 = values[which(2)];
  const float *v3 = values[which(3)], *v4 = values[which(4)], *v5 = values[which(5)];
  const float k0 = k[0], k1 = k[which(1)], k2 = k[which(2)], k3 = k[which(3)], k4 = k[which(4)], k5 = k[which(5)];
  for (int i = 0; i < count; i++) {
    float sum = add(0.0f, mul(k0, v0[i]));
    if constexpr (kTerms > 1) sum = add(sum, mul(k1, v1[i]));
    if constexpr (kTerms > 2) sum = add(sum, mul(k2, v2[i]));
    if constexpr (kTerms > 3) sum = add(sum, mul(k3, v3[i]));
    if constexpr (kTerms > 4) sum = add(sum, mul(k4, v4[i]));
    if constexpr (kTerms > 5) sum = add(sum, mul(k5, v5[i]));
    out[i] = sum;
  }
}

static void add_up(float* out, const float* const* values, const float* k, int terms, int count) {
  switch (terms) {
    case 0: memset(out, 0, count * sizeof(float)); break;
    case 1: add_up<1>(out, values, k, count); break;
    case 2: add_up<2>(out, values, k, count); break;
    case 3: add_up<3>(out, values, k, count); break;
    case 4: add_up<4>(out, values, k, count); break;
    case 5: add_up<5>(out, values, k, count); break;
    default: add_up<6>(out, values, k, count); break;
  }
}

// A sum computed in one pass, when all its terms are known. If nobody stores it, 0 + 1 * v may stand for itself: v has the same
// bits but for the sign of a zero, which no later sum shows.
struct TileSum {
  float* out;
  int count;
  bool stored;
  int terms = 0;
  const float* values[6];
  float k[6];

  TileSum(float* to, int elements, bool is_stored) : out(to), count(elements), stored(is_stored) {}

  SAGE_INLINE void term(float coefficient, const float* value) {
    k[terms] = coefficient;
    values[terms++] = value;
  }
  SAGE_INLINE const float* value() const {
    if (!stored && terms == 1 && k[0] == 1.0f) return values[0];
    add_up(out, values, k, terms, count);
    return out;
  }
};

#ifdef SAGE_LANES
// Counters side by side, one 32-bit word in each 64-bit lane. The upper halves may hold rubbish, which nothing reads: a product
// takes the lower halves only, and so does `draw_words` at the end.
struct Lanes {
  typedef uint64_t Vector __attribute__((vector_size(8 * SAGE_LANES)));
  typedef uint32_t Packed __attribute__((vector_size(4 * SAGE_LANES)));
  Vector v;
};
SAGE_INLINE Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
SAGE_INLINE Lanes operator^(Lanes a, uint32_t b) { return {a.v ^ b}; }
SAGE_INLINE Lanes product(uint32_t constant, Lanes word) {
  const Lanes::Vector everywhere = Lanes::Vector{} + constant;
  return {(Lanes::Vector)SAGE_MULTIPLY_EVEN((SAGE_VECTOR)word.v, (SAGE_VECTOR)everywhere)};
}
SAGE_INLINE Lanes high(Lanes product) { return {product.v >> 32}; }
SAGE_INLINE Lanes low(Lanes product) { return product; }
#endif

// The words of `blocks` counters from `first` on; a few more may be written, up to kTile / 4.
static void draw_words(uint64_t seed, uint32_t call, uint32_t tag, uint64_t first, int blocks, uint32_t words[4][kTile / 4]) {
#ifdef SAGE_LANES
  Lanes::Vector j{};
  for (int lane = 0; lane < SAGE_LANES; lane++) j[lane] = first + lane;
  for (int at = 0; at < blocks; at += SAGE_LANES, j += SAGE_LANES) {
    const Lanes calls{Lanes::Vector{} + call}, tags{Lanes::Vector{} + tag};
    const Words<Lanes> w = words_of(seed, Lanes{j}, Lanes{j >> 32}, calls, tags);
    for (int k = 0; k < 4; k++) {
      const Lanes::Packed packed = __builtin_convertvector(w.w[k].v, Lanes::Packed);
      memcpy(&words[k][at], &packed, sizeof(packed));
    }
  }
#else
  for (int at = 0; at < blocks; at++) {
    const uint64_t j = first + at;
    const Words<uint32_t> w = words_of(seed, static_cast<uint32_t>(j), static_cast<uint32_t>(j >> 32), call, tag);
    for (int k = 0; k < 4; k++) words[k][at] = w.w[k];
  }
#endif
}

// Normals of elements [begin, begin + count) of a row; begin is a multiple of 4, count at most kTile.
static void draw(uint64_t seed, uint32_t call, uint32_t tag, int64_t begin, int count, float* out) {
  uint32_t words[4][kTile / 4];
  float normals[4][kTile / 4];
  const int blocks = (count + 3) / 4, whole = count / 4;
  draw_words(seed, call, tag, static_cast<uint64_t>(begin / 4), blocks, words);
  for (int k = 0; k < 4; k += 2) {
    for (int j = 0; j < blocks; j++) box_muller(words[k][j], words[k + 1][j], normals[k][j], normals[k + 1][j]);
  }
  for (int j = 0; j < whole; j++) {
    for (int k = 0; k < 4; k++) out[4 * j + k] = normals[k][j];
  }
  for (int i = 4 * whole; i < count; i++) out[i] = normals[i % 4][whole];
}

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
    const float* const uncond = read(row.uncond, kUncond);
    float* const guided = scratch[kOutput];
    for (int i = 0; i < count; i++) guided[i] = add(mul(row.guidance, sub(cond[i], uncond[i])), uncond[i]);
    return guided;
  }
  SAGE_INLINE Value history(int i) { return read(row.history[i], kHistory + i); }
  SAGE_INLINE Value last() { return read(row.last, kLast); }
  SAGE_INLINE Value noise() {
    if (!row.seeded) return row.noise + begin;
    draw(row.seed, row.call, 0, begin, count, scratch[kDrawn]);
    return scratch[kDrawn];
  }

  SAGE_INLINE TileSum sum(Place place) {
    float* out = scratch[place];
    if constexpr (sizeof(S) == sizeof(float)) {  // a float32 state is computed where it is stored
      if (place == kDenoised) out = row.denoised + begin;
      if (place == kNext) out = row.next + begin;
    }
    return TileSum(out, count, place != kCorrected || row.corrected != nullptr);
  }
  SAGE_INLINE Value clamp(Value value, float bound) {
    if (bound == __builtin_inff()) return value;
    float* const kept = const_cast<float*>(value);
    for (int i = 0; i < count; i++) {  // comparisons with NaN are false, so NaN passes
      const float v = kept[i] > bound ? bound : kept[i];
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

template <class T>
static const T* row_of(const RowsIn& rows, int64_t row) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[row] : row) * rows.stride;
}

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
  data.denoised = static_cast<S*>(args.denoised) + place;
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

static void normals(const Normals& args, int64_t row, int64_t begin, int64_t end) {
  float* const out = args.out + row * args.elements;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = static_cast<int>(end - at < kTile ? end - at : kTile);
    draw(args.seed[row], args.call[row], args.tag, at, count, out + at);
  }
}

#undef SAGE_LANES
#undef SAGE_VECTOR
#undef SAGE_MULTIPLY_EVEN
