// The arithmetic of group_mean, one source for host and device; specification: sage_kernels/reference.py. Included like
// solver_math.h, and after `widen` and `narrow` of the small dtypes (and of float) are known.

SAGE_INLINE double as_double(double v) { return v; }
template <class T>
SAGE_INLINE double as_double(T v) {
  return widen(v);
}

// A mean is rounded to float32 and then to its dtype.
SAGE_INLINE void round_to(double v, double& out) { out = v; }
template <class T>
SAGE_INLINE void round_to(double v, T& out) {
  narrow(static_cast<float>(v), out);
}

// Whether `a` is kept when `b` comes: the larger one, or a NaN.
template <class T>
SAGE_INLINE bool keeps(T a, T b) {
  if constexpr (std::is_arithmetic<T>::value) {
    return a >= b || a != a;
  } else {
    return keeps(widen(a), widen(b));
  }
}
