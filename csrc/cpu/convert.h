// Memory to blocks and back. Included after vec.h, inside the instruction set's namespace.

template <class T>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};

template <class V>
RF_INLINE V load_bits(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// --- one register: bfloat16, the upper half of a float ---

RF_INLINE vf widen_bf16(const void* p) {
#if defined(RF_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(RF_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(load_bits<Native<float>::half>(p), vu) << 16);
#endif
}

// To nearest, ties to even, in the upper half; the lower half is left over. NaN stays NaN.
RF_INLINE vu rounded_bf16(vf x) {
  const vu u = (vu)x;
#if defined(RF_AVX512)
  const __m512i odd = _mm512_set1_epi32(0x10000), half = _mm512_set1_epi32(0x8000), nan = _mm512_set1_epi32(0x7fc00000);
  const __m512i below = _mm512_add_epi32((__m512i)u, _mm512_set1_epi32(0x7fff));
  const __m512i r = _mm512_mask_add_epi32(below, _mm512_test_epi32_mask((__m512i)u, odd), (__m512i)u, half);
  return (vu)_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q), nan);
#else
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return x == x ? rounded : vu{} + 0x7fc00000u;
#endif
}

RF_INLINE vf round_bf16(vf x) { return (vf)(rounded_bf16(x) & 0xffff0000u); }

RF_INLINE void store_upper_half(void* p, vu u) {
#if defined(RF_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)u, 16)));
#elif defined(RF_AVX2)
  const __m256i h = _mm256_srli_epi32((__m256i)u, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  const Native<float>::half h = __builtin_convertvector(u >> 16, Native<float>::half);
  memcpy(p, &h, sizeof h);
#endif
}

// --- one register: float16 ---

RF_INLINE vf widen_f16(const void* p) {
#if defined(RF_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(RF_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const vu h = __builtin_convertvector(load_bits<Native<float>::half>(p), vu);
  const vu magnitude = (h & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127, and makes subnormals right as well.
  const vu scaled = (vu)((vf)magnitude * 0x1p112f);
  const vu special = magnitude | 0x7f800000u;
  return (vf)((magnitude >= 0x0f800000u ? special : scaled) | ((h & 0x8000u) << 16));
#endif
}

RF_INLINE Native<float>::half narrow_f16(vf x) {
  typedef Native<float>::half half;
#if defined(RF_AVX512)
  return (half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(RF_AVX2)
  return (half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu sign = (vu)x & 0x80000000u;
  const vu u = (vu)x ^ sign;
  const vu normal = (u + (0xc8000000u + 0xfffu) + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the subnormal's 10 bits, rounded to nearest even, at the bottom of the significand.
  const vu subnormal = (vu)((vf)u + 0.5f) - 0x3f000000u;
  const vu special = u > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  vu r = u < 0x38800000u ? subnormal : normal;
  r = u >= 0x47800000u ? special : r;
  return __builtin_convertvector(r | (sign >> 16), half);
#endif
}

// --- blocks ---

template <class A>
RF_INLINE Block<A> load(const A* p) {
  return load_bits<Block<A>>(p);
}

template <class A, class T>
RF_INLINE Block<A> load_as(const T* p) {
  Block<A> r;
  RF_UNROLL for (int k = 0; k < r.count; ++k) {
    const T* q = p + k * r.lanes;
    if constexpr (__is_same(T, A)) r.v[k] = load_bits<typename Native<A>::vec>(q);
    else if constexpr (__is_same(T, bf16)) r.v[k] = widen_bf16(q);
    else if constexpr (__is_same(T, f16)) r.v[k] = widen_f16(q);
    else if constexpr (__is_same(A, float))
      r.v[k] = __builtin_convertvector(__builtin_convertvector(load_bits<Native<float>::byte>(q), vi), vf);
    else
      RF_UNROLL for (int j = 0; j < r.lanes; ++j) r.v[k][j] = A(q[j]);
  }
  return r;
}

// The value as it will read back from memory.
template <class T, class A>
RF_INLINE Block<A> round_to(const Block<A>& x) {
  Block<A> r = x;
  RF_UNROLL for (int k = 0; k < r.count; ++k) {
    if constexpr (__is_same(T, bf16)) r.v[k] = round_bf16(x.v[k]);
    if constexpr (__is_same(T, f16)) {
      const Native<float>::half h = narrow_f16(x.v[k]);
      r.v[k] = widen_f16(&h);
    }
  }
  return r;
}

// The largest number that round_to makes 0: half the smallest subnormal number, a tie to even. So round_to<T>(z) <= 0 is
// z <= vanishing<T>, at the price of a comparison.
template <class T>
constexpr float vanishing = 0;
template <>
constexpr float vanishing<bf16> = 0x1p-134f;
template <>
constexpr float vanishing<f16> = 0x1p-25f;

// Rounds to T and stores. (To bytes: small integers only.)
template <class T, class A>
RF_INLINE void store(T* p, const Block<A>& x) {
  RF_UNROLL for (int k = 0; k < x.count; ++k) {
    T* q = p + k * x.lanes;
    if constexpr (__is_same(T, A)) memcpy(q, &x.v[k], sizeof x.v[k]);
    else if constexpr (__is_same(T, bf16)) store_upper_half(q, rounded_bf16(x.v[k]));
    else if constexpr (__is_same(T, f16)) {
      const Native<float>::half h = narrow_f16(x.v[k]);
      memcpy(q, &h, sizeof h);
    } else if constexpr (__is_same(A, float)) {
      const Native<float>::byte b = __builtin_convertvector(__builtin_convertvector(x.v[k], vi), Native<float>::byte);
      memcpy(q, &b, sizeof b);
    } else
      RF_UNROLL for (int j = 0; j < x.lanes; ++j) q[j] = T(x.v[k][j]);
  }
}

// --- a whole block, or its first n elements (the rest reads as zero and is not written) ---

struct Whole {};

template <class A, class T>
RF_INLINE Block<A> load_as(const T* p, Whole) {
  return load_as<A>(p);
}
template <class A, class T>
RF_INLINE Block<A> load_as(const T* p, i64 n) {
  T buffer[kBlock];
  memset((void*)buffer, 0, sizeof buffer);
  memcpy((void*)buffer, p, n * sizeof(T));
  return load_as<A>(buffer);
}

template <class T, class A>
RF_INLINE void store(T* p, const Block<A>& x, Whole) {
  store(p, x);
}
template <class T, class A>
RF_INLINE void store(T* p, const Block<A>& x, i64 n) {
  T buffer[kBlock];
  store(buffer, x);
  memcpy((void*)p, buffer, n * sizeof(T));
}

// 16 mask bits from bit i on, which need not start a byte.
RF_INLINE uint32_t load_mask(const uint8_t* mask, i64 bytes, i64 i) {
  const i64 first = i >> 3;
  uint32_t word = 0;
  if (first + 4 <= bytes) memcpy(&word, mask + first, 4);
  else
    for (i64 k = first; k < bytes; ++k) word |= uint32_t(mask[k]) << (8 * (k - first));
  return (word >> (i & 7)) & 0xffffu;
}

RF_INLINE void store_mask(uint8_t* mask, i64 i, uint32_t bits, Whole) {
  const uint16_t word = uint16_t(bits);
  memcpy(mask + (i >> 3), &word, 2);
}
RF_INLINE void store_mask(uint8_t* mask, i64 i, uint32_t bits, i64 n) {
  bits &= (1u << n) - 1;
  mask[i >> 3] = uint8_t(bits);
  if (n > 8) mask[(i >> 3) + 1] = uint8_t(bits >> 8);
}
