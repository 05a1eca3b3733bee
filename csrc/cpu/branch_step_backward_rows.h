// branch_step_backward: one input row, in vectors, child after child.

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

// The machine of `update_backward` for kWidth elements of an input row: totals stay while its children pass by.
template <class M, class S, bool kWhole>
struct BackwardVector {
  using Value = Vec;
  int64_t at;
  int count;
  const Gradients<M, S>& to;
  Vec inputs[kFromHistory + 3]{}, cond{}, uncond{};
  const Row* k = nullptr;
  const Child<M, S>* child = nullptr;

  template <class T>
  SAGE_INLINE Vec read(const T* from) const {
    return load<kWhole>(from + at, count);
  }
  SAGE_INLINE bool has(Gradient place) const {
    return place == kAtModelInput ? child->grad_model_input != nullptr : child->grad[place] != nullptr;
  }
  SAGE_INLINE Vec grad(Gradient place) const {
    if (place != kAtModelInput) return read(child->grad[place]);
    const Vec first = read(child->grad_model_input);
    return child->grad_model_input_again ? first + read(child->grad_model_input_again) : first;
  }
  SAGE_INLINE VecSum sum(Gradient) const { return {}; }
  SAGE_INLINE Vec passed(Vec value) const {
    VecSum stored;
    if (k->p != 0.0f) stored.term(k->p, read(child->sample));
    if (k->q != 0.0f) {
      const Vec y = read(child->cond);
      stored.term(k->q, child->uncond == nullptr ? y : guide(y, read(child->uncond), child->guidance));
    }
    const Vec m0 = stored.value();
    return {where_within(m0.a, k->clip, value.a), where_within(m0.b, k->clip, value.b), where_within(m0.c, k->clip, value.c),
            where_within(m0.d, k->clip, value.d)};
  }

  SAGE_INLINE bool wants(int input) const { return to.input[input] != nullptr; }
  SAGE_INLINE bool wants_output() const { return to.model_output != nullptr || to.uncond != nullptr; }
  SAGE_INLINE void collect(int input, Vec value) { inputs[input] = inputs[input] + value; }
  SAGE_INLINE void collect_output(Vec value) {
    const Vec guided = child->uncond == nullptr ? value : child->guidance * value;
    cond = cond + guided;
    uncond = uncond + (value - guided);
  }

  SAGE_INLINE void put() const {
    for (int i = 0; i < kFromHistory + 3; i++) write(inputs[i], to.input[i]);
    write(cond, to.model_output);
    write(uncond, to.uncond);
  }
  template <class T>
  SAGE_INLINE void write(Vec value, T* to) const {
    if (to) store<kWhole>(value, to + at, count);
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

template <bool kWhole, class M, class S>
static void step_back_at(const BranchStepBackward& args, const Gradients<M, S>& gradients, int64_t row, int64_t at, int count) {
  BackwardVector<M, S, kWhole> vector{at, count, gradients};
  for (int32_t j = args.indptr[row]; j < args.indptr[row + 1]; j++) {
    const int32_t child_row = args.children[j];
    const Child<M, S> child = child_of<M, S>(args, child_row);
    const Row k = args.table[args.step[child_row]];
    vector.child = &child;
    vector.k = &k;
    update_backward(k, vector);
  }
  vector.put();
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
  int64_t at = begin;
  for (; at + kWidth <= end; at += kWidth) step_back_at<true>(args, gradients, row, at, kWidth);
  if (at < end) step_back_at<false>(args, gradients, row, at, static_cast<int>(end - at));
}

static void branch_step_backward(const BranchStepBackward& args, int64_t row, int64_t begin, int64_t end) {
  with_types(args.model, args.state, [&](auto m, auto s) { step_back<decltype(m), decltype(s)>(args, row, begin, end); });
}
