// Walks over the elements. Included after convert.h, inside the instruction set's namespace.

// Calls body(i, n, p) for the blocks [i, i + n) of [begin, end), p being K per-channel vectors for those elements. n is
// Whole{} but for the last block, and blocks start at begin + a multiple of 16.
template <class A, int K, class Body>
RF_INLINE void sweep_channels_last(
    const Geometry& g, const A* const (&vectors)[K], i64 begin, i64 end, const Body& body) {
  Block<A> p[K > 0 ? K : 1];
  const i64 step = kBlock % g.c;
  i64 phase = begin % g.c;
  i64 i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    RF_UNROLL for (int k = 0; k < K; ++k) p[k] = load(vectors[k] + phase);
    body(i, Whole{}, p);
    phase += step;
    if (phase >= g.c) phase -= g.c;
  }
  if (i < end) {
    RF_UNROLL for (int k = 0; k < K; ++k) p[k] = load(vectors[k] + phase);
    body(i, end - i, p);
  }
}

template <class A, int K, class Body>
RF_INLINE void sweep_contiguous(
    const Geometry& g, const A* const (&vectors)[K], i64 begin, i64 end, const Body& body) {
  Block<A> p[K > 0 ? K : 1];
  i64 i = begin;
  while (i < end) {
    const i64 plane = i / g.hw;
    const i64 inside = (plane + 1) * g.hw < end ? (plane + 1) * g.hw : end;
    if (i + kBlock <= inside) {
      const i64 c = plane % g.c;
      RF_UNROLL for (int k = 0; k < K; ++k) p[k] = splat(vectors[k][c]);
      for (; i + kBlock <= inside; i += kBlock) body(i, Whole{}, p);
    }
    if (i >= end) break;
    if (i == inside) continue;
    // A block over the border of planes.
    A lane[K > 0 ? K : 1][kBlock];
    i64 c = plane % g.c, left = inside - i;
    for (int j = 0; j < kBlock; ++j, --left) {
      if (left == 0) {
        left = g.hw;
        c = c + 1 < g.c ? c + 1 : 0;
      }
      for (int k = 0; k < K; ++k) lane[k][j] = vectors[k][c];
    }
    RF_UNROLL for (int k = 0; k < K; ++k) p[k] = load(lane[k]);
    if (i + kBlock <= end) body(i, Whole{}, p);
    else body(i, end - i, p);
    i += kBlock;
  }
}

template <class A, int K, class Body>
RF_INLINE void sweep(const Geometry& g, const A* const (&vectors)[K], i64 begin, i64 end, const Body& body) {
  if (g.channels_last) sweep_channels_last(g, vectors, begin, end, body);
  else sweep_contiguous(g, vectors, begin, end, body);
}

constexpr i64 kAheadBytes = 12 * 1024;  // how far before its use a row is asked for

// The terms of a reduction, and the tensors (at most 2) that they read from memory.
template <class F>
struct Terms {
  F f;
  const char* streams[2];
  i64 size;

  template <class... X>
  __attribute__((always_inline)) void operator()(X&&... x) const { f(x...); }
  __attribute__((always_inline)) void fetch(i64 i) const {
    for (const char* stream : streams)
      if (stream != nullptr) __builtin_prefetch(stream + i * size, 0, 2);
  }
};

template <class F, class T>
RF_INLINE Terms<F> terms(const T* first, const T* second, F f) {
  return {f, {(const char*)first, (const char*)second}, sizeof(T)};
}

// Adds body's two terms over a matrix [rows, width] of elements from `base` on into s1 and s2 [width]; vectors are
// periodic. body(i, n, p, t1, t2) adds to t1 and t2; body.fetch(i) asks for element i's cache lines early. Four rows at a
// time shorten the chain of additions, but hide the stream from the processor's own prefetcher.
template <class A, int K, class Body>
RF_INLINE void add_rows(
    i64 base, i64 rows, i64 width, const A* const (&vectors)[K], A* s1, A* s2, const Body& body) {
  const i64 ahead = (kAheadBytes / (width * body.size) + 4) * width;
  for (i64 r = 0; r < rows; r += 4) {
    const i64 group = rows - r < 4 ? rows - r : 4;
    for (i64 j = 0; j < width; j += kBlock) {
      Block<A> p[K > 0 ? K : 1];
      RF_UNROLL for (int k = 0; k < K; ++k) p[k] = load(vectors[k] + j);
      Block<A> t1 = zero<A>(), t2 = zero<A>();
      const i64 i = base + r * width + j;
      if (j + kBlock <= width) {
        if (group == 4)
          RF_UNROLL_ROWS for (int q = 0; q < 4; ++q) {
            body.fetch(i + q * width + ahead);
            body(i + q * width, Whole{}, p, t1, t2);
          }
        else
          for (i64 q = 0; q < group; ++q) body(i + q * width, Whole{}, p, t1, t2);
      } else
        for (i64 q = 0; q < group; ++q) body(i + q * width, width - j, p, t1, t2);
      store(s1 + j, load(s1 + j) + t1);
      store(s2 + j, load(s2 + j) + t2);
    }
  }
}

// The same over `pixels` pixels of c channels, `repeat` of them to a row; s1 and s2 hold width + 16 and are set, not
// added to, and folded: the sums lie in the first c.
template <class A>
RF_INLINE void clear_sums(const Geometry& g, A* s1, A* s2) {
  for (i64 j = 0; j < g.width + kBlock; ++j) s1[j] = s2[j] = 0;
}

template <class A, int K, class Body>
RF_INLINE void add_pixels(
    const Geometry& g, i64 base, i64 pixels, const A* const (&vectors)[K], A* s1, A* s2, const Body& body) {
  const i64 rows = pixels / g.repeat;
  add_rows(base, rows, g.width, vectors, s1, s2, body);
  const i64 left = pixels - rows * g.repeat;
  if (left > 0) add_rows(base + rows * g.width, left, g.c, vectors, s1, s2, body);
}

template <class A>
RF_INLINE void fold(const Geometry& g, A* s) {
  for (i64 k = 1; k < g.repeat; ++k)
    for (i64 j = 0; j < g.c; ++j) s[j] += s[k * g.c + j];
}

// Sums of body's two terms over elements [first, last) of channel c (counted over images) of a contiguous tensor.
template <class A, int K, class Body>
RF_INLINE void add_channel(
    const Geometry& g, i64 c, i64 first, i64 last, const Block<A> (&p)[K], A& s1, A& s2, const Body& body) {
  Block<A> total1 = zero<A>(), total2 = zero<A>();
  for (i64 e = first; e < last;) {
    const i64 image = e / g.hw, offset = e % g.hw;
    const i64 run = g.hw - offset < last - e ? g.hw - offset : last - e;
    const i64 base = (image * g.c + c) * g.hw + offset;
    i64 j = 0;
    for (; j + 4 * kBlock <= run; j += 4 * kBlock) {
      Block<A> t1 = zero<A>(), t2 = zero<A>();
      RF_UNROLL_ROWS for (int q = 0; q < 4; ++q) body(base + j + q * kBlock, Whole{}, p, t1, t2);
      total1 = total1 + t1;
      total2 = total2 + t2;
    }
    for (; j + kBlock <= run; j += kBlock) body(base + j, Whole{}, p, total1, total2);
    if (j < run) body(base + j, run - j, p, total1, total2);
    e += run;
  }
  s1 = sum_lanes(total1);
  s2 = sum_lanes(total2);
}
