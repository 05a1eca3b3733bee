// branch_step_backward: one input row, tile by tile, child after child.

// Where the gradients of one input row go, at its first element; null for what is not wanted.
template <class M, class S>
struct Gradients {
  S* input[kFromHistory + 3];
  M *model_output, *uncond;
};

// What one output row hands back, and what it read.
template <class M, class S>
struct Child {
  const S *grad[3];  // at x', m0 and xc; null: 0
  const M *grad_model_input, *grad_model_input_again;
  const S* sample;
  const M *cond, *uncond;
  float guidance;
};

// The machine of `update_backward`. One tile of an input row: totals stay here while the children pass by.
template <class M, class S>
struct BackwardTile {
  using Value = const float*;
  // A sum of one term may be that term, so whatever is read has a slot of its own.
  enum Slot { kGrad = kContribution + 1, kGradInput = kGrad + 3, kGradInputAgain, kX, kY, kU, kStored, kGuided, kSlots };
  const Gradients<M, S>& to;
  int64_t begin;
  int count;
  const Row* k = nullptr;
  const Child<M, S>* child = nullptr;
  alignas(64) float totals[kFromHistory + 5][kTile];  // inputs, then model output and uncond
  alignas(64) float scratch[kSlots][kTile];
  static constexpr int kCond = kFromHistory + 3, kUncond = kFromHistory + 4;

  BackwardTile(const Gradients<M, S>& gradients, int64_t at, int64_t end)
      : to(gradients), begin(at), count(static_cast<int>(end - at < kTile ? end - at : kTile)) {
    for (auto& total : totals) memset(total, 0, count * sizeof(float));
  }

  SAGE_INLINE const float* read(const float* from, int) { return from + begin; }
  template <class Half>
  SAGE_INLINE const float* read(const Half* from, int slot) {
    widen_all(from + begin, scratch[slot], count);
    return scratch[slot];
  }

  SAGE_INLINE bool has(Gradient at) const {
    return at == kAtModelInput ? child->grad_model_input != nullptr : child->grad[at] != nullptr;
  }
  SAGE_INLINE Value grad(Gradient at) {
    if (at != kAtModelInput) return read(child->grad[at], kGrad + at);
    const float* const first = read(child->grad_model_input, kGradInput);
    if (child->grad_model_input_again == nullptr) return first;
    const float* const second = read(child->grad_model_input_again, kGradInputAgain);
    float* const both = scratch[kGradInput];
    for (int i = 0; i < count; i++) both[i] = add(first[i], second[i]);
    return both;
  }
  SAGE_INLINE TileSum sum(Gradient place) { return TileSum(scratch[place], count, false); }

  SAGE_INLINE Value output() {
    const float* const cond = read(child->cond, kY);
    if (child->uncond == nullptr) return cond;
    guide(cond, read(child->uncond, kU), child->guidance, scratch[kY], count);
    return scratch[kY];
  }
  SAGE_INLINE Value passed(Value value) {
    TileSum stored(scratch[kStored], count, true);
    if (k->p != 0.0f) stored.term(k->p, read(child->sample, kX));
    if (k->q != 0.0f) stored.term(k->q, output());
    const float* const m0 = stored.value();
    float* const kept = scratch[kAtDenoised];
    const float bound = k->clip;
    for (int i = 0; i < count; i++) kept[i] = m0[i] > bound || m0[i] < -bound ? 0.0f : value[i];
    return kept;
  }

  SAGE_INLINE bool wants(int input) const { return to.input[input] != nullptr; }
  SAGE_INLINE bool wants_output() const { return to.model_output != nullptr || to.uncond != nullptr; }
  SAGE_INLINE void collect(int input, Value value) { accumulate(input, value); }
  SAGE_INLINE void collect_output(Value value) {
    if (child->uncond == nullptr) return accumulate(kCond, value);
    float* const guided = scratch[kGuided];
    for (int i = 0; i < count; i++) guided[i] = mul(child->guidance, value[i]);
    accumulate(kCond, guided);
    for (int i = 0; i < count; i++) totals[kUncond][i] = add(totals[kUncond][i], sub(value[i], guided[i]));
  }
  SAGE_INLINE void accumulate(int place, Value value) {
    float* const total = totals[place];
    for (int i = 0; i < count; i++) total[i] = add(total[i], value[i]);
  }

  SAGE_INLINE void put() {
    for (int i = 0; i < kFromHistory + 3; i++) store(totals[i], to.input[i]);
    store(totals[kCond], to.model_output);
    store(totals[kUncond], to.uncond);
  }
  template <class T>
  SAGE_INLINE void store(const float* value, T* to) {
    if (to) scale_all(1.0f, value, to + begin, count);
  }
};

template <class T>
static const T* dense_row(const void* data, int64_t row, int64_t elements) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + row * elements;
}

template <class M, class S>
static Child<M, S> child_of(const BranchStepBackward& args, int64_t row) {
  Child<M, S> child{};
  child.grad[kAtNext] = dense_row<S>(args.g_sample, row, args.elements);
  child.grad[kAtDenoised] = dense_row<S>(args.g_denoised, row, args.elements);
  child.grad[kAtCorrected] = dense_row<S>(args.g_corrected, row, args.elements);
  child.grad_model_input = dense_row<M>(args.g_model_input, row, args.elements);
  if (args.copies > 1) child.grad_model_input_again = dense_row<M>(args.g_model_input, args.rows_out + row, args.elements);
  child.sample = row_of<S>(args.sample, row);
  child.cond = row_of<M>(args.model_output, row);
  child.uncond = row_of<M>(args.uncond, row);
  if (child.uncond) child.guidance = args.guidance[row];
  return child;
}

template <class M, class S>
static void step_back(const BranchStepBackward& args, int64_t row, int64_t begin, int64_t end) {
  const int64_t place = row * args.elements;
  const auto to = [place](auto* data) { return data == nullptr ? nullptr : data + place; };
  const Gradients<M, S> gradients{
      {to(static_cast<S*>(args.d_sample)), to(static_cast<S*>(args.d_last)), to(static_cast<S*>(args.d_m[0])),
       to(static_cast<S*>(args.d_m[1])), to(static_cast<S*>(args.d_m[2]))},
      to(static_cast<M*>(args.d_model_output)),
      to(static_cast<M*>(args.d_uncond))};
  for (int64_t at = begin; at < end; at += kTile) {
    BackwardTile<M, S> tile(gradients, at, end);
    for (int32_t j = args.indptr[row]; j < args.indptr[row + 1]; j++) {
      const int32_t child_row = args.children[j];
      const Child<M, S> child = child_of<M, S>(args, child_row);
      const Row k = args.table[args.step[child_row]];
      tile.child = &child;
      tile.k = &k;
      update_backward(k, tile);
    }
    tile.put();
  }
}

static void branch_step_backward(const BranchStepBackward& args, int64_t row, int64_t begin, int64_t end) {
  if (args.model == DType::kFloat32) return step_back<float, float>(args, row, begin, end);
  const bool wide = args.state == DType::kFloat32;
  if (args.model == DType::kBFloat16) {
    return wide ? step_back<BFloat16, float>(args, row, begin, end) : step_back<BFloat16, BFloat16>(args, row, begin, end);
  }
  return wide ? step_back<Float16, float>(args, row, begin, end) : step_back<Float16, Float16>(args, row, begin, end);
}
