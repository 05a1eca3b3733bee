// The CPU kernels for one instruction set. Included by branch_step_cpu.cpp once per set, inside a namespace and a target
// region of its own, with SAGE_VECTOR_BYTES set; hence no include guard, and no includes but the arithmetic.
#include "../solver_math.h"

typedef float Floats __attribute__((vector_size(SAGE_VECTOR_BYTES)));
typedef uint32_t Words32 __attribute__((vector_size(SAGE_VECTOR_BYTES)));
typedef int32_t Ints32 __attribute__((vector_size(SAGE_VECTOR_BYTES)));
typedef uint16_t Words16 __attribute__((vector_size(SAGE_VECTOR_BYTES / 2)));

constexpr int kLanes = SAGE_VECTOR_BYTES / 4;
constexpr int kBlock = 32;  // elements that go through `update` together
constexpr int kVectors = kBlock / kLanes;
constexpr int64_t kTile = 1024;  // elements of noise drawn at a time: 4 KB, stays in the first cache

struct Block {
  Floats v[kVectors];
};

#define SAGE_EACH_VECTOR _Pragma("GCC unroll 8") for (int i = 0; i < kVectors; i++)

SAGE_INLINE Block mul(float k, const Block& b) {
  Block out;
  SAGE_EACH_VECTOR out.v[i] = k * b.v[i];
  return out;
}

SAGE_INLINE Block add(const Block& a, const Block& b) {
  Block out;
  SAGE_EACH_VECTOR out.v[i] = a.v[i] + b.v[i];
  return out;
}

SAGE_INLINE Block sub(const Block& a, const Block& b) {
  Block out;
  SAGE_EACH_VECTOR out.v[i] = a.v[i] - b.v[i];
  return out;
}

SAGE_INLINE Block clamp(const Block& b, float bound) {
  const Floats high = bound - Floats{}, low = -high;
  Block out;
  SAGE_EACH_VECTOR {
    out.v[i] = b.v[i] > high ? high : b.v[i];
    out.v[i] = out.v[i] < low ? low : out.v[i];
  }
  return out;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SAGE_INLINE Floats widen(Words16 h, BFloat16) { return bits_as<Floats>(__builtin_convertvector(h, Words32) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
SAGE_INLINE Words16 narrow(Floats f, BFloat16) {
  const Words32 bits = bits_as<Words32>(f);
  const Words32 rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  const Words32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Words32)(f == f ? rounded : quiet), Words16);
}

#if defined(__F16C__) || SAGE_VECTOR_BYTES > 16
SAGE_INLINE Floats widen(Words16 h, Float16) {
#if SAGE_VECTOR_BYTES == 32
  return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(h)));
#endif
}

SAGE_INLINE Words16 narrow(Floats f, Float16) {
#if SAGE_VECTOR_BYTES == 32
  return bits_as<Words16>(_mm256_cvtps_ph(bits_as<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
#else
  return bits_as<Words16>(_mm512_cvtps_ph(bits_as<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
// Subnormal halves go through a float whose last place is 2^-24, the step between them: no subnormal float appears.
SAGE_INLINE Floats widen(Words16 h, Float16) {
  const Words32 word = __builtin_convertvector(h, Words32), magnitude = word & 0x7FFFu;
  const Words32 rebias = magnitude >= 0x7C00u ? Words32{} + (224u << 23) : Words32{} + (112u << 23);
  const Words32 normal = (magnitude << 13) + rebias;
  const Words32 subnormal = bits_as<Words32>(bits_as<Floats>(magnitude | 0x3F000000u) - 0.5f);
  return bits_as<Floats>((Words32)(magnitude < 0x400u ? subnormal : normal) | ((word & 0x8000u) << 16));
}

SAGE_INLINE Words16 narrow(Floats f, Float16) {
  const Words32 bits = bits_as<Words32>(f), magnitude = bits & 0x7FFFFFFFu;
  const Words32 normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Words32 subnormal = bits_as<Words32>(bits_as<Floats>(magnitude) + 0.5f) - 0x3F000000u;
  Words32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? Words32{} + 0x7C00u : half;  // rounds beyond the largest half
  half = magnitude > 0x7F800000u ? Words32{} + 0x7E00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Words16);
}
#endif

SAGE_INLINE Block load(const float* from) {
  Block out;
  memcpy(&out, from, sizeof(out));
  return out;
}

template <class Half>
SAGE_INLINE Block load(const Half* from) {
  Block out;
  SAGE_EACH_VECTOR {
    Words16 words;
    memcpy(&words, from + i * kLanes, sizeof(words));
    out.v[i] = widen(words, Half{});
  }
  return out;
}

SAGE_INLINE void store(float* to, const Block& b) { memcpy(to, &b, sizeof(b)); }

template <class Half>
SAGE_INLINE void store(Half* to, const Block& b) {
  SAGE_EACH_VECTOR {
    const Words16 words = narrow(b.v[i], Half{});
    memcpy(to + i * kLanes, &words, sizeof(words));
  }
}

// The last elements of a row, fewer than a block, go through a padded copy.
template <class T>
SAGE_INLINE Block load_part(const T* from, int64_t count) {
  T padded[kBlock] = {};
  memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
SAGE_INLINE void store_part(T* to, const Block& b, int64_t count) {
  T padded[kBlock];
  store(padded, b);
  memcpy(to, padded, count * sizeof(T));
}

// The inputs and outputs of one output row, at its first element; `noise` at the first element of the tile.
template <class M, class S>
struct RowData {
  const S *sample, *last, *history[3];
  const M *cond, *uncond;
  const float* noise;
  S *next, *denoised, *corrected;
  M *model_input[2];
};

// What `update` reads: the block at `at`, whole or only its first `count` elements.
template <class M, class S, bool kWhole>
struct BlockInputs {
  const RowData<M, S>& row;
  int64_t at, in_tile, count;

  template <class T>
  SAGE_INLINE Block get(const T* data, int64_t offset) const {
    return kWhole ? load(data + offset) : load_part(data + offset, count);
  }
  SAGE_INLINE Block zero() const { return Block{}; }
  SAGE_INLINE Block x() const { return get(row.sample, at); }
  SAGE_INLINE Block cond() const { return get(row.cond, at); }
  SAGE_INLINE Block uncond() const { return get(row.uncond, at); }
  SAGE_INLINE Block last() const { return get(row.last, at); }
  SAGE_INLINE Block m(int i) const { return get(row.history[i], at); }
  SAGE_INLINE Block noise() const { return get(row.noise, in_tile); }

  template <class T>
  SAGE_INLINE void put(T* data, const Block& b) const {
    if (data == nullptr) return;
    kWhole ? store(data + at, b) : store_part(data + at, b, count);
  }
  SAGE_INLINE void put_all(const Updated<Block>& out) const {
    put(row.next, out.next);
    put(row.denoised, out.denoised);
    put(row.corrected, out.corrected);
    put(row.model_input[0], out.model_input);
    put(row.model_input[1], out.model_input);
  }
};

// Normals of elements [begin, begin + count) of a row; begin is a multiple of 4, count at most kTile.
static void draw(uint64_t seed, uint32_t call, uint32_t tag, int64_t begin, int64_t count, float* out) {
  float quads[4][kTile / 4];
  const int64_t first = begin / 4, blocks = (count + 3) / 4;
#pragma GCC ivdep
  for (int64_t j = 0; j < blocks; j++) {
    normal4(seed, static_cast<uint64_t>(first + j), call, tag, quads[0][j], quads[1][j], quads[2][j], quads[3][j]);
  }
  const int64_t whole = count / 4;
  for (int64_t j = 0; j < whole; j++) {
    for (int k = 0; k < 4; k++) out[4 * j + k] = quads[k][j];
  }
  for (int64_t i = 4 * whole; i < count; i++) out[i] = quads[i % 4][whole];
}

template <class T>
static const T* row_of(const RowsIn& rows, int64_t row) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[row] : row) * rows.stride;
}

template <class M, class S>
static void step_row(const BranchStep& args, int64_t row, int64_t begin, int64_t end) {
  const Row k = args.table[args.step[row]];
  const uint32_t uses = uses_of(k);
  const bool guided = args.uncond.data != nullptr;
  const bool seeded = (uses & kC) && args.seed != nullptr;
  const float guidance = guided ? args.guidance[row] : 1.0f;
  const int64_t place = row * args.elements, copy = args.rows * args.elements;
  M* const model_input = static_cast<M*>(args.model_input);

  RowData<M, S> data;
  data.sample = row_of<S>(args.sample, row);
  data.last = row_of<S>(args.last, row);
  for (int i = 0; i < 3; i++) data.history[i] = row_of<S>(args.m[i], row);
  data.cond = row_of<M>(args.model_output, row);
  data.uncond = row_of<M>(args.uncond, row);
  data.next = static_cast<S*>(args.next) + place;
  data.denoised = static_cast<S*>(args.denoised) + place;
  data.corrected = args.corrected ? static_cast<S*>(args.corrected) + place : nullptr;
  data.model_input[0] = args.copies > 0 ? model_input + place : nullptr;
  data.model_input[1] = args.copies > 1 ? model_input + copy + place : nullptr;
  const float* const given = row_of<float>(args.noise, row);

  float drawn[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t count = end - tile < kTile ? end - tile : kTile;
    if (seeded) draw(args.seed[row], args.call[row], 0, tile, count, drawn);
    data.noise = seeded ? drawn : given + tile;
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) {
      const BlockInputs<M, S, true> block{data, tile + i, i, kBlock};
      block.put_all(update<Block>(k, uses, guided, guidance, block));
    }
    if (i < count) {
      const BlockInputs<M, S, false> block{data, tile + i, i, count - i};
      block.put_all(update<Block>(k, uses, guided, guidance, block));
    }
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
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t count = end - tile < kTile ? end - tile : kTile;
    draw(args.seed[row], args.call[row], args.tag, tile, count, out + tile);
  }
}

#undef SAGE_EACH_VECTOR
#undef SAGE_VECTOR_BYTES
