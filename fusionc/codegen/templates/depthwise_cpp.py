"""C++ text of a depthwise convolution on the CPU: one filter a channel, bias and activation, NCHW and channels-last.

Contiguous images: each plane is copied once into zero-padded rows of float, columns apart by the stride, so that every tap
of every output is an unaligned vector load without a test. A tile of R rows × V vectors of outputs stays in registers; an
input row is loaded once for all output rows it contributes to. Rows of one remainder modulo the dilation form an
undilated convolution of their own, so dilation costs nothing there.

Channels-last: a vector holds channels of one pixel; the padded image of one block of channels is copied, and its filter
laid out tap by tap, once; a tile is T output columns of one row.

Sums are taken in float in the order of the taps; nothing that is not a product of the input enters them, so NaN and Inf
stay where eager has them. bfloat16 and float16 are converted on the way in and rounded once at the end.

Source: register blocking of direct convolution after Zhang et al., "High Performance Zero-Memory Overhead Direct
Convolutions" (arXiv 1809.10170); the copies are our own trade: they are 1/k² of the work and remove all border cases.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPES = {"float32": ("float", "{}", "{}"), "bfloat16": ("uint16_t", "fc_from_bf16({})", "fc_to_bf16({})"),
         "float16": ("uint16_t", "fc_from_f16({})", "fc_to_f16({})")}  # fmt: skip
ACTIVATIONS = {
    "": "v",
    "relu": "(v < 0.0f ? 0.0f : v)",  # keeps NaN, as eager does
    "gelu": "0.5f * v * (1.0f + erf_quick(v * 0.70710678118654752f))",
    "gelu_tanh": "v / (1.0f + fc_exp(-1.59576912160573072f * (v + 0.044715f * v * v * v)))",
    "silu": "v / (1.0f + fc_exp(-v))",
}


@dataclass(frozen=True)
class Variant:
    """What the text depends on. ``rows`` × ``vectors`` of ``lanes`` outputs are a tile (where
    lanes are channels: ``vectors`` columns)."""

    dtype: str
    bias: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    layout: str  # "rows" and "channels" of contiguous images, "last"
    activation: str
    lanes: int
    rows: int
    vectors: int

    @property
    def symbol(self) -> str:
        """A name that says it all."""
        sizes = (*self.kernel, *self.stride, *self.dilation, self.lanes, self.rows, self.vectors)
        return f"depthwise_{self.dtype}_{self.bias}_{self.layout}_{'_'.join(map(str, sizes))}_{self.activation or 'linear'}"


def text(variant: Variant) -> str:
    """``int symbol(x, w, bias, out, N, C, H, W, OH, OW, PH, PW, STRIP)``: 0, or 1 where memory ran out; bias may be null.
    STRIP rows of the result are made at a time, so that the copied rows stay in a core's cache."""
    kind, read, write = TYPES[variant.dtype]
    bias_kind, read_bias, _ = TYPES[variant.bias]
    (kh, kw), (sh, sw), (dh, dw) = variant.kernel, variant.stride, variant.dilation
    head = f"""
namespace SPACE {{
typedef {kind} T;
typedef {bias_kind} B;
constexpr int KH = {kh}, KW = {kw}, SH = {sh}, SW = {sw}, DH = {dh}, DW = {dw};
constexpr bool LAST = {str(variant.layout == "last").lower()}, SPLIT = KW > 8; /* sums of a row of taps on their own */
constexpr int L = {variant.lanes}, R = {variant.rows}, V = {variant.vectors};
FC_INLINE float get(T v) {{ return {read.format("v")}; }}
FC_INLINE T put(float v) {{ return {write.format("v")}; }}
/* to 1.2e-7 of its range: 1 - exp(-a P(a)), P fitted to -log(erfc(a)) / a over [0, 4] */
FC_INLINE float erf_quick(float x) {{
  const float a = x < 0.0f ? -x : x;
  float p = 3.14389749e-05f * a - 3.08801825e-04f;
  p = p * a + 1.03240158e-03f;
  p = p * a + 5.36933537e-04f;
  p = p * a - 1.95839605e-02f;
  p = p * a + 1.02919618e-01f;
  p = p * a + 6.36597724e-01f;
  p = p * a + 1.12838021e+00f;
  const float y = 1.0f - fc_exp(-p * a);
  return x < 0.0f ? -y : y;
}}
FC_INLINE float getb(B v) {{ return {read_bias.format("v")}; }}
constexpr bool ACTIVE = {str(bool(variant.activation)).lower()};
FC_INLINE float act(float v) {{ return {ACTIVATIONS[variant.activation]}; }}
}}
"""
    own = f"fc_{variant.symbol}"
    body = _HEAD + (_ROWS if variant.layout == "rows" else _CHANNELS)
    return (head + body).replace("SPACE", own).replace("SYMBOL", variant.symbol)


_HEAD = r"""
namespace SPACE {
typedef float vec __attribute__((vector_size(L * 4), aligned(4), may_alias));
FC_INLINE vec at(const float* p) { return *(const vec*)p; }
FC_INLINE void keep(float* p, vec v) { *(vec*)p = v; }
FC_INLINE void keep(float* p, vec v, int64_t n) { for (int64_t l = 0; l < n; ++l) p[l] = v[l]; }
FC_INLINE void zero(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }
}
"""

_ROWS = r"""
namespace SPACE {
struct Tile {
  const float *p, *w; /* first input row and column, taps */
  int64_t step, phase; /* between input rows, between columns of one remainder modulo SW */
  int64_t lo, hi; /* input rows below lo and from hi on are padding */
};
/* input row r of a tile of Q output rows: output row q meets it with taps r - SH q; ALL: every one of them has such taps */
template <int Q, bool ALL, int AT> FC_INLINE void row(const Tile& t, vec (&acc)[Q][V], int64_t r) {
  if (r < t.lo || r >= t.hi) return;
  const float* s = t.p + r * t.step;
  const float* w = t.w + r * KW;
  vec own[Q][V];
  if (SPLIT)
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) own[q][v] = (vec){};
  for (int j = 0; j < KW; ++j) {
    const float* x = s + (j * DW % SW) * t.phase + j * DW / SW;
    vec in[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) in[v] = at(x + v * L);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      if (!ALL && (AT < SH * q || AT >= SH * q + KH)) continue;
      const float tap = w[j - SH * q * KW];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) (SPLIT ? own : acc)[q][v] += tap * in[v];
    }
  }
  if (SPLIT)
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[q][v] += own[q][v];
}
template <int Q, int AT, int END> FC_INLINE void edge(const Tile& t, vec (&acc)[Q][V]) {
  if constexpr (AT < END) {
    row<Q, false, AT>(t, acc, AT);
    edge<Q, AT + 1, END>(t, acc);
  }
}
template <int Q> FC_INLINE void tile(const Tile& t, float bias, float* out, int64_t stride, int64_t columns) {
  constexpr int FULL = SH * (Q - 1), END = FULL + KH;
  vec acc[Q][V];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[q][v] = bias - (vec){};
  edge<Q, 0, FULL>(t, acc);
  for (int64_t r = FULL; r < KH; ++r) row<Q, true, 0>(t, acc, r);
  edge<Q, (KH > FULL ? KH : FULL), END>(t, acc);
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* o = out + q * stride + v * L;
      if (columns >= (v + 1) * L) keep(o, acc[q][v]);
      else if (columns > v * L) keep(o, acc[q][v], columns - v * L);
    }
}
}
extern "C" int SYMBOL(const SPACE::T* x, const SPACE::T* w, const SPACE::B* b, SPACE::T* out, int64_t N, int64_t C,
                      int64_t H, int64_t W, int64_t OH, int64_t OW, int64_t PH, int64_t PW, int64_t STRIP) {
  using namespace SPACE;
  const int64_t rows = (STRIP - 1) * SH + (KH - 1) * DH + 1, strips = (OH + STRIP - 1) / STRIP;
  const int64_t wide = OW > V * L ? OW : V * L, phase = wide + (KW - 1) * DW / SW + 1, step = SW * phase;
  const bool direct = sizeof(T) == sizeof(float);
  int err = 0;
#pragma omp parallel reduction(| : err) if (N * C * OH * OW * KH * KW > 65536)
  {
    int64_t first, last;
    fc_share(N * C * strips, &first, &last);
    fc_row<float> plane(rows * step + KH * KW + (direct ? 0 : STRIP * OW));
    err |= plane.data == nullptr;
    if (!err && first < last) {
      zero(plane.data, rows * step); /* columns of padding stay zero, rows of padding are never read */
      float *taps = plane.data + rows * step, *extra = taps + KH * KW;
      for (int64_t u = first; u < last; ++u) {
        const int64_t image = u / strips, c = image % C, begin = u % strips * STRIP;
        const int64_t end = fc_least(begin + STRIP, OH), many_rows = end - begin;
        const int64_t above = begin * SH - PH; /* the image's row that is the scratch's row 0 */
        const int64_t from = above < 0 ? 0 : above, to = fc_least(H, above + (many_rows - 1) * SH + (KH - 1) * DH + 1);
        for (int64_t h = from; h < to; ++h) {
          float* put_at = plane.data + (h - above) * step;
          const T* got = x + (image * H + h) * W - PW;
          if (SW == 1) {
            for (int64_t k = PW; k < W + PW && k < step; ++k) put_at[k] = get(got[k]);
          } else {
            for (int64_t m = 0; m < SW; ++m)
              for (int64_t k = (PW - m + SW - 1) / SW; k < phase && k * SW + m < W + PW; ++k)
                put_at[m * phase + k] = get(got[k * SW + m]);
          }
        }
        for (int64_t k = 0; k < KH * KW; ++k) taps[k] = get(w[c * KH * KW + k]);
        const float bias = b ? getb(b[c]) : 0.0f;
        T* goal = out + (image * OH + begin) * OW;
        float* res = direct ? (float*)goal : extra;
        const int64_t in = from - above, beyond = to - above;
        for (int64_t rest = 0; rest < DH && rest < many_rows; ++rest) {
          const int64_t count = (many_rows - rest + DH - 1) / DH, many = count >= R ? R : 1;
          for (int64_t q = 0; q < count; q += many) {
            const int64_t q0 = q + many > count ? count - many : q, top = q0 * SH * DH + rest;
            const int64_t lo = top < in ? (in - top + DH - 1) / DH : 0, hi = beyond > top ? (beyond - top + DH - 1) / DH : 0;
            for (int64_t o = 0; o < OW; o += V * L) {
              const int64_t o0 = o + V * L > OW && OW >= V * L ? OW - V * L : o;
              const Tile t = {plane.data + top * step + o0, taps, DH * step, phase, lo, hi};
              float* to_row = res + (rest + q0 * DH) * OW + o0;
              if (many == R) tile<R>(t, bias, to_row, DH * OW, OW - o0);
              else tile<1>(t, bias, to_row, DH * OW, OW - o0);
            }
          }
        }
        if (!direct || ACTIVE) {
#pragma omp simd
          for (int64_t k = 0; k < many_rows * OW; ++k) goal[k] = put(act(res[k]));
        }
      }
    }
  }
  return err;
}
"""

_CHANNELS = r"""
namespace SPACE {
/* Q neighbouring columns of one row; p is the first tap's pixel of the first column, lo ≤ i < hi the rows inside */
template <int Q> FC_INLINE void tile(const float* p, const float* w, vec bias, int64_t step, int64_t lo, int64_t hi, int64_t left,
                                     int64_t right, vec (&acc)[Q]) {
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) acc[q] = bias;
  for (int64_t i = lo; i < hi; ++i) {
    vec own[Q];
    if (SPLIT)
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) own[q] = (vec){};
    for (int64_t j = left; j < right; ++j) {
      const vec tap = at(w + (i * KW + j) * L);
      const float* x = p + i * DH * step + j * DW * L;
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) (SPLIT ? own : acc)[q] += tap * at(x + q * SW * L);
    }
    if (SPLIT)
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) acc[q] += own[q];
  }
}
/* Q finished pixels of ``lanes`` channels; not inlined: conversions and activations of a whole tile take long to compile */
static __attribute__((noinline)) void give(T* out, float* v, int64_t count, int64_t lanes, int64_t next, int64_t apart) {
  if (ACTIVE)
#pragma omp simd
    for (int64_t k = 0; k < count * L; ++k) v[k] = act(v[k]);
  for (int64_t q = 0; q < count; ++q, v += L) {
    T* o = out + q * next;
    if (LAST && lanes == L) {
#pragma omp simd
      for (int l = 0; l < L; ++l) o[l] = put(v[l]);
    } else {
      for (int64_t l = 0; l < lanes; ++l) o[l * apart] = put(v[l]);
    }
  }
}
}
extern "C" int SYMBOL(const SPACE::T* x, const SPACE::T* w, const SPACE::B* b, SPACE::T* out, int64_t N, int64_t C,
                      int64_t H, int64_t W, int64_t OH, int64_t OW, int64_t PH, int64_t PW, int64_t STRIP) {
  using namespace SPACE;
  const int64_t rows = (STRIP - 1) * SH + (KH - 1) * DH + 1, strips = (OH + STRIP - 1) / STRIP;
  const int64_t WP = W + 2 * PW, step = WP * L, blocks = (C + L - 1) / L;
  int err = 0;
#pragma omp parallel reduction(| : err) if (N * C * OH * OW * KH * KW > 65536)
  {
    int64_t first, last, known = -1;
    fc_share(blocks * N * strips, &first, &last);
    fc_row<float> plane((rows * WP + KH * KW) * L);
    err |= plane.data == nullptr;
    if (!err && first < last) {
      zero(plane.data, (rows * WP + KH * KW) * L); /* columns of padding stay zero, rows of padding are never read */
      float* taps = plane.data + rows * WP * L;
      vec bias = {};
      for (int64_t u = first; u < last; ++u) {
        const int64_t begin = u % strips * STRIP, n = u / strips % N, c = u / strips / N * L;
        const int64_t lanes = fc_least(C - c, L), end = fc_least(begin + STRIP, OH);
        if (known != c) {
          known = c;
          for (int64_t l = 0; l < L; ++l) {
            for (int64_t k = 0; k < KH * KW; ++k) taps[k * L + l] = l < lanes ? get(w[(c + l) * KH * KW + k]) : 0.0f;
            bias[l] = b && l < lanes ? getb(b[c + l]) : 0.0f;
          }
        }
        const int64_t above = begin * SH - PH; /* the image's row that is the scratch's row 0 */
        const int64_t from = above < 0 ? 0 : above, to = fc_least(H, above + (end - begin - 1) * SH + (KH - 1) * DH + 1);
        for (int64_t h = from; h < to; ++h) {
          float* put_at = plane.data + ((h - above) * WP + PW) * L;
          const T* got = LAST ? x + (n * H + h) * W * C + c : x + ((n * C + c) * H + h) * W;
          if (!LAST) {
            for (int64_t l = 0; l < lanes; ++l)
              for (int64_t k = 0; k < W; ++k) put_at[k * L + l] = get(got[l * H * W + k]);
          } else if (lanes == L) {
            for (int64_t k = 0; k < W; ++k)
#pragma omp simd
              for (int l = 0; l < L; ++l) put_at[k * L + l] = get(got[k * C + l]);
          } else {
            for (int64_t k = 0; k < W; ++k)
              for (int64_t l = 0; l < lanes; ++l) put_at[k * L + l] = get(got[k * C + l]);
          }
        }
        const int64_t many = OW >= V ? V : 1, in = from - above, beyond = to - above;
        for (int64_t h = 0; h < end - begin; ++h) {
          const int64_t top = h * SH;
          const int64_t lo = top < in ? (in - top + DH - 1) / DH : 0;
          const int64_t hi = beyond > top ? fc_least((beyond - top + DH - 1) / DH, KH) : 0;
          for (int64_t o = 0; o < OW; o += many) {
            const int64_t o0 = o + many > OW ? OW - many : o;
            const int64_t start = o0 * SW, stop = start + (many - 1) * SW;
            int64_t left = stop < PW ? (PW - stop + DW - 1) / DW : 0, right = (PW + W - start + DW - 1) / DW;
            right = right < 0 ? 0 : right < KW ? right : KW;
            const float* p = plane.data + top * step + start * L;
            const int64_t place = (begin + h) * OW + o0, next = LAST ? C : 1;
            T* goal = out + (LAST ? (n * OH * OW + place) * C + c : (n * C + c) * OH * OW + place);
            float made[V * L];
            if (many == V) {
              vec acc[V];
              tile<V>(p, taps, bias, step, lo, hi, left, right, acc);
#pragma GCC unroll 16
              for (int q = 0; q < V; ++q) keep(made + q * L, acc[q]);
            } else {
              vec acc[1];
              tile<1>(p, taps, bias, step, lo, hi, left, right, acc);
              keep(made, acc[0]);
            }
            give(goal, made, many, lanes, next, LAST ? 1 : OH * OW);
          }
        }
      }
    }
  }
  return err;
}
"""
