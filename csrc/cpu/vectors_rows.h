// What all CPU kernels of one instruction set share: vectors of floats in registers, rows in memory. kernels_cpu.cpp includes the
// *_rows.h files once per set, inside a namespace and a target region of its own; hence no include guards, and no includes but
// the arithmetic.
#include "../solver_math.h"

#ifndef SAGE_BYTES
#define SAGE_BYTES 16  // of a register
#endif

// Elements that go through the arithmetic together: four registers of floats, whose sums do not wait for each other.
constexpr int kLane = SAGE_BYTES / sizeof(float), kWidth = 4 * kLane;
// Elements whose noise is drawn together; a multiple of kWidth.
constexpr int kTile = 256;

struct BFloat16 {
  static constexpr bool kIeee = false;
  uint16_t bits;
};
struct Float16 {
  static constexpr bool kIeee = true;
  uint16_t bits;
};

SAGE_INLINE float widen(float f) { return f; }
SAGE_INLINE void narrow(float f, float& to) { to = f; }

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

typedef float Floats __attribute__((vector_size(SAGE_BYTES)));
typedef uint32_t Words32 __attribute__((vector_size(SAGE_BYTES)));
typedef uint16_t Words16 __attribute__((vector_size(SAGE_BYTES / 2)));

SAGE_INLINE Floats read(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof(value));
  return value;
}
SAGE_INLINE Floats read(const BFloat16* from) {
  Words16 halves;
  memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words32) << 16);
}
SAGE_INLINE Floats read(const Float16* from) {
#if SAGE_BYTES == 64
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif SAGE_BYTES == 32
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  float wide[kLane];
  for (int i = 0; i < kLane; i++) wide[i] = widen(from[i]);
  return read(wide);
#endif
}

SAGE_INLINE void write(Floats value, float* to) { memcpy(to, &value, sizeof(value)); }
SAGE_INLINE void write(Floats value, BFloat16* to) {
  const Words32 bits = (Words32)value, rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const Words32 nan = (Words32)(value != value) & 0x7FC00000u;
  const Words16 halves = __builtin_convertvector((rounded | nan) >> 16, Words16);
  memcpy(to, &halves, sizeof(halves));
}
SAGE_INLINE void write(Floats value, Float16* to) {
#if SAGE_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif SAGE_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLane; i++) narrow(value[i], to[i]);
#endif
}

// kWidth floats in registers: named, because the compiler keeps an array in memory. Nothing is fused.
struct Vec {
  Floats a, b, c, d;
};
SAGE_INLINE Vec operator+(Vec x, Vec y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
SAGE_INLINE Vec operator-(Vec x, Vec y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
SAGE_INLINE Vec operator*(float k, Vec x) { return {k * x.a, k * x.b, k * x.c, k * x.d}; }

// Elements [0, count) from `from` on; kWhole: all kWidth of them. The others are 0.
template <bool kWhole, class T>
SAGE_INLINE Vec load(const T* from, int count) {
  T some[kWidth];
  if constexpr (!kWhole) {
    memset(some, 0, sizeof(some));
    memcpy(some, from, count * sizeof(T));
    from = some;
  }
  return {read(from), read(from + kLane), read(from + 2 * kLane), read(from + 3 * kLane)};
}

template <bool kWhole, class T>
SAGE_INLINE void store(Vec value, T* to, int count) {
  T some[kWidth];
  T* const place = kWhole ? to : some;
  write(value.a, place);
  write(value.b, place + kLane);
  write(value.c, place + 2 * kLane);
  write(value.d, place + 3 * kLane);
  if constexpr (!kWhole) memcpy(to, some, count * sizeof(T));
}

// A sum in registers.
struct VecSum {
  Vec total;

  SAGE_INLINE VecSum() : total{} {}
  SAGE_INLINE void term(float k, Vec value) { total = total + k * value; }
  SAGE_INLINE Vec value() const { return total; }
};

// Classifier-free guidance.
SAGE_INLINE Vec guide(Vec cond, Vec uncond, float g) { return g * (cond - uncond) + uncond; }

// Comparisons with NaN are false, so NaN passes.
SAGE_INLINE Floats clamped(Floats value, float bound) {
  const Floats high = bound - Floats{}, low = -high;
  value = value > high ? high : value;
  return value < low ? low : value;
}

// `value` where `stored` is within its bound, else 0.
SAGE_INLINE Floats where_within(Floats stored, float bound, Floats value) {
  const Floats high = bound - Floats{}, low = -high;
  value = stored > high ? Floats{} : value;
  return stored < low ? Floats{} : value;
}

template <class T>
static const T* row_of(const RowsIn& rows, int64_t row) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[row] : row) * rows.stride;
}

// Calls run(M{}, S{}) with the model's and the state's types.
template <class Run>
static void with_types(DType model, DType state, const Run& run) {
  const bool wide = state == DType::kFloat32;
  if (model == DType::kFloat32) return run(float{}, float{});
  if (model == DType::kBFloat16) return wide ? run(BFloat16{}, float{}) : run(BFloat16{}, BFloat16{});
  return wide ? run(Float16{}, float{}) : run(Float16{}, Float16{});
}
