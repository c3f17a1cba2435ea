// The vector layer: blocks of 16 numbers in the accumulation type, whatever the dtype in memory and the width of the
// registers. Included once per instruction set, inside that set's namespace. Only <cstdint>, <cstring> and intrinsics may
// be used here (see args.h).

#define RF_INLINE static inline __attribute__((always_inline))
#define RF_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define RF_AVX512 1
#define RF_UNROLL_ROWS _Pragma("GCC unroll 4")
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define RF_AVX2 1
#define RF_UNROLL_ROWS _Pragma("GCC unroll 4")
constexpr int kBytes = 32;
#else
// A block is 4 or 8 registers here: unrolling more would only cost compile time.
#define RF_UNROLL_ROWS _Pragma("GCC unroll 1")
constexpr int kBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
struct Native;
template <>
struct Native<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float vec __attribute__((vector_size(kBytes)));
  typedef int32_t lane_int;
  typedef int32_t ivec __attribute__((vector_size(kBytes)));
  typedef uint32_t uvec __attribute__((vector_size(kBytes)));
  typedef uint16_t half __attribute__((vector_size(kBytes / 2)));
  typedef uint8_t byte __attribute__((vector_size(kBytes / 4)));
};
template <>
struct Native<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double vec __attribute__((vector_size(kBytes)));
  typedef int64_t lane_int;
  typedef int64_t ivec __attribute__((vector_size(kBytes)));
};

typedef Native<float>::vec vf;
typedef Native<double>::vec vd;
typedef Native<float>::ivec vi;
typedef Native<float>::uvec vu;

template <class A>
struct Block {
  static constexpr int lanes = Native<A>::lanes, count = int(kBlock) / lanes;
  typename Native<A>::vec v[count];
};

// Lanes chosen, one bit each where the registers have it so.
#if defined(RF_AVX512)
template <class A>
struct Mask {
  uint32_t m[Block<A>::count];
};
#else
template <class A>
struct Mask {
  typename Native<A>::ivec m[Block<A>::count];
};
#endif

// --- arithmetic ---

template <class A>
RF_INLINE Block<A> splat(A value) {
  Block<A> r;
  RF_UNROLL for (int k = 0; k < r.count; ++k) r.v[k] = value - typename Native<A>::vec{};
  return r;
}

template <class A>
RF_INLINE Block<A> zero() {
  Block<A> r;
  RF_UNROLL for (int k = 0; k < r.count; ++k) r.v[k] = typename Native<A>::vec{};
  return r;
}

#define RF_BINARY(op)                                                            \
  template <class A>                                                             \
  RF_INLINE Block<A> operator op(const Block<A>& a, const Block<A>& b) {         \
    Block<A> r;                                                                  \
    RF_UNROLL for (int k = 0; k < r.count; ++k) r.v[k] = a.v[k] op b.v[k];       \
    return r;                                                                    \
  }
RF_BINARY(+)
RF_BINARY(-)
RF_BINARY(*)
#undef RF_BINARY

#if defined(RF_AVX512)
RF_INLINE vf fma1(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
RF_INLINE vd fma1(vd a, vd b, vd c) { return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(RF_AVX2)
RF_INLINE vf fma1(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
RF_INLINE vd fma1(vd a, vd b, vd c) { return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
// Two roundings, the same everywhere: this file is compiled with -ffp-contract=off.
RF_INLINE vf fma1(vf a, vf b, vf c) { return a * b + c; }
RF_INLINE vd fma1(vd a, vd b, vd c) { return a * b + c; }
#endif

// a * b + c
template <class A>
RF_INLINE Block<A> fma(const Block<A>& a, const Block<A>& b, const Block<A>& c) {
  Block<A> r;
  RF_UNROLL for (int k = 0; k < r.count; ++k) r.v[k] = fma1(a.v[k], b.v[k], c.v[k]);
  return r;
}

// The sum of the lanes, always in the same order.
template <class A>
RF_INLINE A sum_lanes(const Block<A>& a) {
  A lane[kBlock];
  memcpy(lane, &a, sizeof lane);
  RF_UNROLL for (int step = 8; step > 0; step /= 2)
    RF_UNROLL for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
  return lane[0];
}

// --- comparison and choice ---

#if defined(RF_AVX512)
RF_INLINE uint32_t le1(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ); }
RF_INLINE uint32_t le1(vd a, vd b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ); }
RF_INLINE uint32_t gt1(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
RF_INLINE uint32_t gt1(vd a, vd b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
RF_INLINE uint32_t eq1(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
RF_INLINE uint32_t eq1(vd a, vd b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ); }
RF_INLINE vf choose1(uint32_t m, vf a, vf b) { return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
RF_INLINE vd choose1(uint32_t m, vd a, vd b) { return (vd)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
#else
template <class V>
RF_INLINE auto le1(V a, V b) { return a <= b; }
template <class V>
RF_INLINE auto gt1(V a, V b) { return a > b; }
template <class V>
RF_INLINE auto eq1(V a, V b) { return a == b; }
template <class M, class V>
RF_INLINE V choose1(M m, V a, V b) { return m ? a : b; }
#endif

#define RF_COMPARE(name, one)                                                              \
  template <class A>                                                                       \
  RF_INLINE Mask<A> name(const Block<A>& a, const Block<A>& b) {                           \
    Mask<A> r;                                                                             \
    RF_UNROLL for (int k = 0; k < Block<A>::count; ++k) r.m[k] = one(a.v[k], b.v[k]);      \
    return r;                                                                              \
  }
RF_COMPARE(less_equal, le1)
RF_COMPARE(greater, gt1)
RF_COMPARE(equal, eq1)
#undef RF_COMPARE

template <class A>
RF_INLINE Mask<A> operator|(const Mask<A>& a, const Mask<A>& b) {
  Mask<A> r;
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k) r.m[k] = a.m[k] | b.m[k];
  return r;
}

template <class A>
RF_INLINE Mask<A> operator~(const Mask<A>& a) {
  Mask<A> r;
#if defined(RF_AVX512)
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k) r.m[k] = a.m[k] ^ ((1u << Block<A>::lanes) - 1);
#else
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k) r.m[k] = ~a.m[k];
#endif
  return r;
}

// a where the mask is set, else b
template <class A>
RF_INLINE Block<A> choose(const Mask<A>& m, const Block<A>& a, const Block<A>& b) {
  Block<A> r;
  RF_UNROLL for (int k = 0; k < r.count; ++k) r.v[k] = choose1(m.m[k], a.v[k], b.v[k]);
  return r;
}

RF_INLINE uint32_t bits1(vi m) {
#if defined(RF_AVX2)
  return _mm256_movemask_ps((__m256)m);
#elif defined(__SSE2__) && !defined(RF_AVX512)
  return _mm_movemask_ps((__m128)m);
#else
  uint32_t r = 0;
  for (int k = 0; k < Native<float>::lanes; ++k) r |= uint32_t(m[k] & 1) << k;
  return r;
#endif
}

RF_INLINE uint32_t bits1(Native<double>::ivec m) {
#if defined(RF_AVX2)
  return _mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__) && !defined(RF_AVX512)
  return _mm_movemask_pd((__m128d)m);
#else
  uint32_t r = 0;
  for (int k = 0; k < Native<double>::lanes; ++k) r |= uint32_t(m[k] & 1) << k;
  return r;
#endif
}

template <class A>
RF_INLINE uint32_t to_bits(const Mask<A>& m) {
  uint32_t r = 0;
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k)
#if defined(RF_AVX512)
    r |= m.m[k] << (k * Block<A>::lanes);
#else
    r |= bits1(m.m[k]) << (k * Block<A>::lanes);
#endif
  return r;
}

template <class A>
RF_INLINE Mask<A> from_bits(uint32_t bits) {
  Mask<A> r;
#if defined(RF_AVX512)
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k)
    r.m[k] = (bits >> (k * Block<A>::lanes)) & ((1u << Block<A>::lanes) - 1);
#else
  typedef typename Native<A>::ivec ivec;
  typedef typename Native<A>::lane_int lane_int;
  RF_UNROLL for (int k = 0; k < Block<A>::count; ++k) {
    ivec lane;
    RF_UNROLL for (int j = 0; j < Block<A>::lanes; ++j) lane[j] = lane_int(1) << (k * Block<A>::lanes + j);
    r.m[k] = ((lane_int(bits) - ivec{}) & lane) == lane;
  }
#endif
  return r;
}
