// What all CPU kernels of one instruction set share: conversions and sums over tiles of floats. kernels_cpu.cpp includes the
// *_rows.h files once per set, inside a namespace and a target region of its own; hence no include guards, and no includes but
// the arithmetic. The loops are plain, for the vectoriser.
#include "../solver_math.h"

// Elements that go through the arithmetic together: small enough that a dozen tiles of floats stay in the first cache.
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

// Classifier-free guidance.
static void guide(const float* cond, const float* uncond, float guidance, float* out, int count) {
  for (int i = 0; i < count; i++) out[i] = add(mul(guidance, sub(cond[i], uncond[i])), uncond[i]);
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

template <class T>
static const T* row_of(const RowsIn& rows, int64_t row) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[row] : row) * rows.stride;
}
