// The arithmetic of branch_step and of its noise, one source for host and device. Specification: sage_kernels/reference.py
// and sage_kernels/philox.py; the same bits come out because every product and every sum is rounded on its own, in the same
// order (host: -ffp-contract=off; device: the _rn intrinsics).
//
// No include guard: a translation unit includes this once per instruction set, inside a namespace of its own. kernels.h must be
// included before, at global scope.

SAGE_INLINE float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SAGE_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SAGE_INLINE float sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

SAGE_INLINE float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

template <class To, class From>
SAGE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// One update. `Machine` holds the inputs of one place in one output row and computes with values V: one element on a device,
// a tile of elements on the CPU.
//   V sample(), output(), last(), history(i), noise()    the inputs; output() has guidance applied
//   Sum sum(place)                                       an empty sum, +0, to be kept at `place`
//   Sum::term(float k, V value), V Sum::value()          adds the rounded product; the result
//   V clamp(V, float bound)
//   void put(V denoised, V corrected, V next, float s)   the outputs; the model input is s * next
// A term whose coefficient is 0 is skipped, and its input is never asked for.
enum Place { kDenoised, kCorrected, kNext };

template <class Machine>
SAGE_INLINE void update(const Row& k, Machine& at) {
  using V = typename Machine::Value;
  const V x = at.sample(), y = at.output();

  auto stored = at.sum(kDenoised);
  if (k.p != 0.0f) stored.term(k.p, x);
  if (k.q != 0.0f) stored.term(k.q, y);
  const V m0 = at.clamp(stored.value(), k.clip);

  const V m1 = k.u[3] != 0.0f || k.b[1] != 0.0f ? at.history(0) : V{};
  const V m2 = k.u[4] != 0.0f || k.b[2] != 0.0f ? at.history(1) : V{};

  auto corrected = at.sum(kCorrected);
  if (k.u[0] != 0.0f) corrected.term(k.u[0], x);
  if (k.u[1] != 0.0f) corrected.term(k.u[1], at.last());
  if (k.u[2] != 0.0f) corrected.term(k.u[2], m0);
  if (k.u[3] != 0.0f) corrected.term(k.u[3], m1);
  if (k.u[4] != 0.0f) corrected.term(k.u[4], m2);
  if (k.u[5] != 0.0f) corrected.term(k.u[5], at.history(2));
  const V xc = corrected.value();

  auto next = at.sum(kNext);
  if (k.a != 0.0f) next.term(k.a, xc);
  if (k.b[0] != 0.0f) next.term(k.b[0], m0);
  if (k.b[1] != 0.0f) next.term(k.b[1], m1);
  if (k.b[2] != 0.0f) next.term(k.b[2], m2);
  if (k.e != 0.0f) next.term(k.e, y);
  if (k.c != 0.0f) next.term(k.c, at.noise());
  at.put(m0, xc, next.value(), k.s);
}

// What one output row adds to the gradients of the input rows it read: the transpose of `update`. `Machine` holds the gradients
// that arrive at one place in that row, null or 0 where there are none.
//   bool has(Gradient), V grad(Gradient)                 what arrives at x', m0, xc and at the model input (both halves added)
//   Sum sum(Gradient)                                    an empty sum
//   V passed(V)                                          0 where the forward direction clamped m0
//   bool wants(int input), void collect(int input, V)    the gradients to be made: adds to one of them
//   bool wants_output(), void collect_output(V)          the same for the two model outputs, which guidance mixed
enum Gradient { kAtNext, kAtDenoised, kAtCorrected, kAtModelInput, kAtOutput, kContribution };
enum Input { kFromSample, kFromLast, kFromHistory };  // kFromHistory + 0, 1, 2

template <class Machine>
SAGE_INLINE void update_backward(const Row& k, Machine& at) {
  using V = typename Machine::Value;
  auto next = at.sum(kAtNext);
  if (at.has(kAtNext)) next.term(1.0f, at.grad(kAtNext));
  if (k.s != 0.0f && at.has(kAtModelInput)) next.term(k.s, at.grad(kAtModelInput));
  const V n = next.value();

  auto corrected = at.sum(kAtCorrected);
  if (at.has(kAtCorrected)) corrected.term(1.0f, at.grad(kAtCorrected));
  if (k.a != 0.0f) corrected.term(k.a, n);
  const V c = corrected.value();

  auto denoised = at.sum(kAtDenoised);
  if (at.has(kAtDenoised)) denoised.term(1.0f, at.grad(kAtDenoised));
  if (k.b[0] != 0.0f) denoised.term(k.b[0], n);
  if (k.u[2] != 0.0f) denoised.term(k.u[2], c);
  const V m = k.clip == bits_as<float>(0x7F800000u) ? denoised.value() : at.passed(denoised.value());

  if (at.wants_output()) {
    auto output = at.sum(kAtOutput);
    if (k.q != 0.0f) output.term(k.q, m);
    if (k.e != 0.0f) output.term(k.e, n);
    at.collect_output(output.value());
  }
  const auto collect = [&](int input, float on_first, const V& first, float on_second, const V& second) {
    if (!at.wants(input) || (on_first == 0.0f && on_second == 0.0f)) return;
    auto contribution = at.sum(kContribution);
    if (on_first != 0.0f) contribution.term(on_first, first);
    if (on_second != 0.0f) contribution.term(on_second, second);
    at.collect(input, contribution.value());
  };
  collect(kFromSample, k.p, m, k.u[0], c);
  collect(kFromLast, k.u[1], c, 0.0f, c);
  collect(kFromHistory, k.u[3], c, k.b[1], n);
  collect(kFromHistory + 1, k.u[4], c, k.b[2], n);
  collect(kFromHistory + 2, k.u[5], c, 0.0f, c);
}

// A 32-bit word times a constant, and the two halves of the product.
SAGE_INLINE uint64_t product(uint32_t constant, uint32_t word) { return static_cast<uint64_t>(constant) * word; }
SAGE_INLINE uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
SAGE_INLINE uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }

template <class Word>
struct Words {
  Word w[4];
};

// Philox4x32-10. Word is one 32-bit word, or several side by side with `product`, `high` and `low` of their own.
template <class Word>
SAGE_INLINE Words<Word> philox(uint32_t k0, uint32_t k1, Words<Word> c) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; round++) {
    const auto first = product(0xD2511F53u, c.w[0]), second = product(0xCD9E8D57u, c.w[2]);
    c = Words<Word>{{high(second) ^ c.w[1] ^ k0, low(second), high(first) ^ c.w[3] ^ k1, low(first)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// value * x + next: one step of Horner's rule, unfused.
SAGE_INLINE float horner(float value, float x, float next) { return add(mul(value, x), next); }

// sqrt(-2 ln u), u = (float(word) + 1) * 2^-32
SAGE_INLINE float radius(uint32_t word) {
  constexpr int32_t kWindow = 0x3F330000;  // bits of 0.69921875, where the mantissa window starts
  const float u = mul(add(static_cast<float>(word), 1.0f), 0x1p-32f);
  const int32_t bits = bits_as<int32_t>(u) - kWindow;
  const float exponent = static_cast<float>(bits >> 23);
  const float f = sub(bits_as<float>((bits & 0x7FFFFF) + kWindow), 1.0f);
  const float z = mul(f, f);
  float y = 7.0376836292e-2f;
  y = horner(y, f, -1.1514610310e-1f);
  y = horner(y, f, 1.1676998740e-1f);
  y = horner(y, f, -1.2420140846e-1f);
  y = horner(y, f, 1.4249322787e-1f);
  y = horner(y, f, -1.6668057665e-1f);
  y = horner(y, f, 2.0000714765e-1f);
  y = horner(y, f, -2.4999993993e-1f);
  y = horner(y, f, 3.3333331174e-1f);
  y = mul(mul(y, f), z);
  y = add(mul(exponent, -2.12194440e-4f), y);
  y = add(mul(z, -0.5f), y);
  const float log_u = add(mul(exponent, 0.693359375f), add(f, y));
  const float square = mul(log_u, -2.0f);
  return sqrt_rn(square > 0.0f ? square : 0.0f);
}

// Cosine and sine of 2 pi word / 2^32: the quadrant comes from the top bits, the rest is an exact signed integer.
SAGE_INLINE void cos_sin(uint32_t word, float& cosine, float& sine) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const float x = mul(static_cast<float>(static_cast<int32_t>(word << 2)), 3.6572952e-10f);  // (pi / 2) * 2^-32
  const float z = mul(x, x);
  float s = horner(horner(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f);
  s = add(mul(mul(s, z), x), x);
  float c = horner(horner(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
  c = add(add(mul(mul(c, z), z), mul(z, -0.5f)), 1.0f);
  const bool swap = quadrant & 1u;
  const uint32_t sign_c = ((quadrant + 1u) & 2u) << 30, sign_s = (quadrant & 2u) << 30;
  cosine = bits_as<float>(bits_as<uint32_t>(swap ? s : c) ^ sign_c);
  sine = bits_as<float>(bits_as<uint32_t>(swap ? c : s) ^ sign_s);
}

// Two normals from two words.
SAGE_INLINE void box_muller(uint32_t word, uint32_t angle_word, float& n0, float& n1) {
  float c, s;
  cos_sin(angle_word, c, s);
  const float r = radius(word);
  n0 = mul(r, c);
  n1 = mul(r, s);
}

// The normals of elements 4j .. 4j+3 in the row of a seed are box_muller(w[0], w[1]) and box_muller(w[2], w[3]) of these words.
template <class Word>
SAGE_INLINE Words<Word> words_of(uint64_t seed, Word j_low, Word j_high, Word call, Word tag) {
  return philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), Words<Word>{{j_low, j_high, call, tag}});
}
