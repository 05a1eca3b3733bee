// Philox words and normals, tile by tile.
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

static void normals(const Normals& args, int64_t row, int64_t begin, int64_t end) {
  float* const out = args.out + row * args.elements;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = static_cast<int>(end - at < kTile ? end - at : kTile);
    draw(args.seed[row], args.call[row], args.tag, at, count, out + at);
  }
}

