"""The C++ text in front of every translation unit: types, conversions, and math that vectorises.  No headers of torch.

Functions named `fc_…` take and give float or double.  Where glibc's libmvec has a vector version it is declared by hand;
NaN, Inf and signed zeros behave as in eager torch everywhere, so there is no -ffast-math.
"""

from __future__ import annotations

_HEAD = r"""
#include <stdint.h>
#include <stdlib.h>
#define FC_INLINE static inline __attribute__((always_inline))
typedef unsigned char fc_b1;
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#define FC_INF __builtin_inff()
#define FC_NAN __builtin_nanf("")
template <class T, class S> FC_INLINE T fc_bits(S s) {
  static_assert(sizeof(T) == sizeof(S), "same size");
  T t; __builtin_memcpy(&t, &s, sizeof(T)); return t;
}
FC_INLINE int64_t fc_least(int64_t a, int64_t b) { return a < b ? a : b; }
/* this thread's share of n units */
FC_INLINE void fc_share(int64_t n, int64_t* lo, int64_t* hi) {
  const int64_t t = omp_get_thread_num(), k = omp_get_num_threads();
  const int64_t q = n / k, r = n % k;
  *lo = t * q + fc_least(t, r); *hi = *lo + q + (t < r ? 1 : 0);
}

/* scratch of a thread for one row; data is null where memory is out */
template <class T> struct fc_row {
  T* data;
  explicit fc_row(int64_t n) : data((T*)malloc((n > 0 ? n : 1) * sizeof(T))) {}
  fc_row(const fc_row&) = delete;
  ~fc_row() { free(data); }
};

/* Copy to memory past the caches: a line that is written as a whole is not read first.  The lines at both ends may be partly
   another's and take the usual way (memmove, for GCC makes a slow `rep movs` of memcpy).  fc_fence before other threads may
   look.  Builtins, as <immintrin.h> takes the compiler longer than a kernel. */
#if defined(__x86_64__)
#if defined(__AVX512F__)
typedef float fc_wide __attribute__((vector_size(64)));
#define FC_STREAM __builtin_ia32_movntps512
#elif defined(__AVX__)
typedef float fc_wide __attribute__((vector_size(32)));
#define FC_STREAM __builtin_ia32_movntps256
#else
typedef float fc_wide __attribute__((vector_size(16)));
#define FC_STREAM __builtin_ia32_movntps
#endif
#if defined(__clang__)
#undef FC_STREAM
#define FC_STREAM(to, v) __builtin_nontemporal_store(v, (fc_wide*)(to))
#endif
FC_INLINE void fc_fence() { __builtin_ia32_sfence(); }
template <class T> static void fc_stream(T* to, const T* from, int64_t n) {
  const int64_t bytes = n * (int64_t)sizeof(T), head = fc_least(-(int64_t)to & 63, bytes), tail = (bytes - head) & 63;
  char* d = (char*)to;
  const char* s = (const char*)from;
  if (head) __builtin_memmove(d, s, head);
  for (int64_t i = head; i < bytes - tail; i += sizeof(fc_wide)) {
    fc_wide v;
    __builtin_memcpy(&v, s + i, sizeof(v));
    FC_STREAM((float*)(d + i), v);
  }
  if (tail) __builtin_memmove(d + bytes - tail, s + bytes - tail, tail);
}
#else
FC_INLINE void fc_fence() {}
template <class T> static void fc_stream(T* to, const T* from, int64_t n) { __builtin_memcpy(to, from, n * sizeof(T)); }
#endif

/* bfloat16 and float16 live in memory only */
FC_INLINE float fc_from_bf16(uint16_t h) { return fc_bits<float>((uint32_t)h << 16); }
FC_INLINE uint16_t fc_to_bf16(float x) {
  const uint32_t u = fc_bits<uint32_t>(x);
  const uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0u : r);
}
FC_INLINE float fc_round_bf16(float x) { return fc_from_bf16(fc_to_bf16(x)); }
FC_INLINE float fc_from_f16(uint16_t h) {
  const uint32_t e = (uint32_t)(h & 0x7fffu) << 13;
  uint32_t u = fc_bits<uint32_t>(fc_bits<float>(e) * 0x1p112f); /* subnormals come out normal */
  u = (h & 0x7c00u) == 0x7c00u ? (e | 0x7f800000u) : u;
  return fc_bits<float>(u | ((uint32_t)(h & 0x8000u) << 16));
}
FC_INLINE uint16_t fc_to_f16(float x) {
  const uint32_t u = fc_bits<uint32_t>(x), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t tiny = fc_bits<uint32_t>(fc_bits<float>(a) + 0.5f) - 0x3f000000u;
  uint32_t r = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  r = a < 0x38800000u ? tiny : r;
  r = a >= 0x477ff000u ? 0x7c00u : r;
  r = a > 0x7f800000u ? 0x7e00u : r;
  return (uint16_t)(r | sign);
}
FC_INLINE float fc_round_f16(float x) { return fc_from_f16(fc_to_f16(x)); }

/* integers: no trap, no undefined overflow */
template <class T> FC_INLINE T fc_div_safe(T b) {
  return b == 0 || ((T)-1 < (T)0 && b == (T)-1) ? (T)1 : b;
}
template <class T> FC_INLINE T fc_itrunc(T a, T b) {
  const T q = (T)(a / fc_div_safe(b));
  return b == (T)-1 && (T)-1 < (T)0 ? (T)(0 - (uint64_t)a) : (b == 0 ? (T)0 : q);
}
template <class T> FC_INLINE T fc_ifmod(T a, T b) { return (T)(a % fc_div_safe(b)); }
template <class T> FC_INLINE T fc_imod(T a, T b) {
  const T m = fc_ifmod(a, b);
  return (T)(m != 0 && ((m < 0) != (b < 0)) ? m + b : m);
}
template <class T> FC_INLINE T fc_ifloor(T a, T b) {
  const T q = fc_itrunc(a, b), m = fc_ifmod(a, b);
  return (T)(m != 0 && ((m < 0) != (b < 0)) ? q - 1 : q);
}
FC_INLINE int64_t fc_floordiv(int64_t a, int64_t d) { const int64_t q = a / d; return q - (a % d < 0 ? 1 : 0); }
FC_INLINE int64_t fc_mod(int64_t a, int64_t d) { const int64_t m = a % d; return m < 0 ? m + d : m; }
template <class T> FC_INLINE T fc_shl(T a, T b) {
  return b < 0 || b >= (T)(8 * sizeof(T)) ? (T)0 : (T)((uint64_t)a << (b & (T)(8 * sizeof(T) - 1)));
}
template <class T> FC_INLINE T fc_shr(T a, T b) {
  const T top = (T)(8 * sizeof(T) - 1);
  return b < 0 || b > top ? (a < 0 ? (T)-1 : (T)0) : (T)(a >> (b & top));
}
template <class T> FC_INLINE T fc_iabs(T a) { return a < 0 ? (T)(0 - (uint64_t)a) : a; }

/* order, NaN wins (fc_max, fc_min) or loses (fc_fmax, fc_fmin) */
template <class T> FC_INLINE T fc_max(T a, T b) { return (a > b) | (a != a) ? a : b; }
template <class T> FC_INLINE T fc_min(T a, T b) { return (a < b) | (a != a) ? a : b; }
template <class T> FC_INLINE T fc_fmax(T a, T b) { return (a > b) | (b != b) ? a : b; }
template <class T> FC_INLINE T fc_fmin(T a, T b) { return (a < b) | (b != b) ? a : b; }
template <class T> FC_INLINE T fc_sign(T a) { return a != a ? a : (T)((a > (T)0) - (a < (T)0)); }
"""

# name -> has libmvec (since glibc 2.22 or 2.35)
_OLD = "exp log sin cos".split()
_NEW = "exp2 expm1 log1p log2 log10 tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc".split()


def _math() -> str:
    out = [
        "#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)",
        '#define FC_VEC __attribute__((simd("notinbranch")))',
        "#if __GLIBC_MINOR__ >= 35",
        "#define FC_VEC35 FC_VEC",
        "#else",
        "#define FC_VEC35",
        "#endif",
        "#else",
        "#define FC_VEC",
        "#define FC_VEC35",
        "#endif",
        'extern "C" {',
    ]
    for names, vec in ((_OLD, "FC_VEC"), (_NEW, "FC_VEC35")):
        for n in names:
            out.append(f"{vec} float {n}f(float) noexcept; {vec} double {n}(double) noexcept;")
    out.append("FC_VEC float powf(float, float) noexcept; FC_VEC double pow(double, double) noexcept;")
    out.append("FC_VEC35 float atan2f(float, float) noexcept; FC_VEC35 double atan2(double, double) noexcept;")
    out.append("float fmodf(float, float) noexcept; double fmod(double, double) noexcept;")
    out.append("float lgammaf(float) noexcept; double lgamma(double) noexcept;")
    out.append("}")
    for n in [*_OLD, *_NEW, "lgamma"]:
        if n != "exp":
            out.append(f"FC_INLINE float fc_{n}(float x) {{ return {n}f(x); }}")
        out.append(f"FC_INLINE double fc_{n}(double x) {{ return {n}(x); }}")
    for n in ("pow", "atan2", "fmod"):
        out.append(f"FC_INLINE float fc_{n}(float x, float y) {{ return {n}f(x, y); }}")
        out.append(f"FC_INLINE double fc_{n}(double x, double y) {{ return {n}(x, y); }}")
    for n, b in (("sqrt", "sqrt"), ("abs", "fabs"), ("floor", "floor"), ("ceil", "ceil"), ("trunc", "trunc")):
        out.append(f"FC_INLINE float fc_{n}(float x) {{ return __builtin_{b}f(x); }}")
        out.append(f"FC_INLINE double fc_{n}(double x) {{ return __builtin_{b}(x); }}")
    return "\n".join(out) + "\n"


_TAIL = r"""
/* exp inline: no call, and -inf (masks) is no special case.  2^n (1 + r + r^2 q(r)), |r| <= ln 2 / 2; q is a minimax
   polynomial, relative error 3e-9; 2^n in two factors, so that the result rounds once where it is subnormal. */
FC_INLINE float fc_exp(float x) {
  float c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float n = __builtin_rintf(c * 1.44269504f);
  const float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 1.38145383e-3f;
  q = q * r + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  const float p = (q * (r * r) + r) + 1.0f;
  const int32_t k = (int32_t)n, a = k >> 1;
  const uint32_t b = (uint32_t)k - (uint32_t)a;
  return p * fc_bits<float>(((uint32_t)a + 127u) << 23) * fc_bits<float>((b + 127u) << 23);
}
FC_INLINE float fc_round(float x) { return __builtin_rintf(x); }
FC_INLINE double fc_round(double x) { return __builtin_rint(x); }
FC_INLINE float fc_copysign(float x, float y) { return __builtin_copysignf(x, y); }
FC_INLINE double fc_copysign(double x, double y) { return __builtin_copysign(x, y); }
FC_INLINE bool fc_signbit(float x) { return fc_bits<uint32_t>(x) >> 31; }
FC_INLINE bool fc_signbit(double x) { return fc_bits<uint64_t>(x) >> 63; }
FC_INLINE bool fc_isinf(float x) { return fc_abs(x) == FC_INF; }
FC_INLINE bool fc_isinf(double x) { return fc_abs(x) == (double)FC_INF; }
template <class T> FC_INLINE T fc_rsqrt(T x) { return (T)1 / fc_sqrt(x); }
template <class T> FC_INLINE T fc_sigmoid(T x) { return (T)1 / ((T)1 + fc_exp(-x)); }
template <class T> FC_INLINE T fc_remainder(T a, T b) {
  const T m = fc_fmod(a, b);
  return m != 0 && ((b < 0) != (m < 0)) ? m + b : m;
}
template <class T> FC_INLINE T fc_floor_divide(T a, T b) {
  const T m = fc_fmod(a, b);
  T d = (a - m) / b;
  d = m != 0 && ((b < 0) != (m < 0)) ? d - 1 : d;
  T f = fc_floor(d);
  f = d - f > (T)0.5 ? f + 1 : f;
  f = d != 0 ? f : fc_copysign((T)0, a / b);
  return b == 0 ? a / b : f;
}
"""

PRELUDE = _HEAD + _math() + _TAIL
