// What a processor has instructions for: stored numbers to and from float32, bit packing, and copies past the caches.
//
// Loops are plain ones that the compiler vectorizes; intrinsics stand only where it has no way to say the same.
// Compiled once per CPU level, like numerics.h.
#pragma once
#include <cstring>
#include <type_traits>

#include "stored.h"

#if defined(__x86_64__)
#if !defined(__clang__)
// GCC 12 warns of its own header: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#if defined(__clang__)
#define QUARK_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#define QUARK_VECTORIZE_STEP QUARK_VECTORIZE
#else
#define QUARK_VECTORIZE _Pragma("GCC ivdep")
// Of constant length: else GCC unrolls a short body into scalar code before it looks for vectors.
#define QUARK_VECTORIZE_STEP _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

namespace quark::QUARK_LEVEL {
namespace {

/// Elements of a tile: four float32 buffers of it fit in half of a 32 KiB cache. Also the unit that threads share, so a
/// packed byte never has two writers (the codes of a tile are whole bytes for every width).
inline constexpr int64_t kTile = 1024;

// ---- steps --------------------------------------------------------------------------------------------------------

/// The neighbours that loops take together.
inline constexpr int64_t kStep = 16;

/// widen() of a step's numbers.
template <class T>
QUARK_INLINE void load_step(const T* from, float* to) {
  QUARK_VECTORIZE_STEP
  for (int64_t i = 0; i < kStep; ++i) to[i] = widen(from[i]);
}

/// narrow() of a step's numbers, which have no other NaN than nan_like() gives, or of codes.
template <class From, class T>
QUARK_INLINE void store_step(const From* from, T* to) {
  QUARK_VECTORIZE_STEP
  for (int64_t i = 0; i < kStep; ++i) narrow(from[i], to[i]);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// A step is one register.
QUARK_INLINE __m512 floats_at(const void* from) { return _mm512_loadu_ps(from); }
QUARK_INLINE __m512i words_at(const void* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
QUARK_INLINE void store_bytes(__m512i bytes, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bytes));
}
QUARK_INLINE __m128i bytes_at(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

QUARK_INLINE void load_step(const Stored<float>* from, float* to) { _mm512_storeu_ps(to, floats_at(from)); }
QUARK_INLINE void load_step(const BFloat16Bits* from, float* to) {
  _mm512_storeu_si512(to, _mm512_slli_epi32(words_at(from), 16));
}
QUARK_INLINE void load_step(const Float16Bits* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
QUARK_INLINE void load_step(const Stored<int8_t>* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes_at(from))));
}
QUARK_INLINE void load_step(const Stored<uint8_t>* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes_at(from))));
}

QUARK_INLINE void store_step(const float* from, Stored<float>* to) { _mm512_storeu_ps(to, floats_at(from)); }
QUARK_INLINE void store_step(const float* from, BFloat16Bits* to) {
  const __m512i u = _mm512_loadu_si512(from);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i words = _mm512_srli_epi32(nearest, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
QUARK_INLINE void store_step(const float* from, Float16Bits* to) {
  const __m256i half = _mm512_cvtps_ph(floats_at(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
QUARK_INLINE void store_step(const float* from, Stored<int8_t>* to) {
  store_bytes(_mm512_cvttps_epi32(floats_at(from)), to);
}
QUARK_INLINE void store_step(const float* from, Stored<uint8_t>* to) {
  store_bytes(_mm512_cvttps_epi32(floats_at(from)), to);
}
QUARK_INLINE void store_step(const int32_t* from, Stored<uint8_t>* to) { store_bytes(_mm512_loadu_si512(from), to); }

#elif defined(__AVX2__) && defined(__F16C__)
// A step is two registers.
inline constexpr int64_t kHalf = kStep / 2;

QUARK_INLINE __m256 floats_at(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
QUARK_INLINE __m256i ints_at(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
QUARK_INLINE __m128i bytes_at(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
/// The lowest words of 16 numbers.
QUARK_INLINE __m256i words_of(__m256i low, __m256i high) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)), 0xd8);
}
/// The lowest bytes of 16 numbers.
QUARK_INLINE void store_bytes(__m256i low, __m256i high, void* to) {
  const __m256i words = _mm256_and_si256(words_of(low, high), _mm256_set1_epi16(0xff));
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
QUARK_INLINE void store_floats(__m256i low, __m256i high, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(low));
  _mm256_storeu_ps(to + kHalf, _mm256_cvtepi32_ps(high));
}

QUARK_INLINE void load_step(const Stored<float>* from, float* to) {
  _mm256_storeu_ps(to, floats_at(from));
  _mm256_storeu_ps(to + kHalf, floats_at(from + kHalf));
}
QUARK_INLINE void load_step(const BFloat16Bits* from, float* to) {
  for (int64_t i = 0; i < kStep; i += kHalf) {
    const __m256i top = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes_at(from + i)), 16);
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(top));
  }
}
QUARK_INLINE void load_step(const Float16Bits* from, float* to) {
  for (int64_t i = 0; i < kStep; i += kHalf) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bytes_at(from + i)));
}
QUARK_INLINE void load_step(const Stored<int8_t>* from, float* to) {
  const __m128i bytes = bytes_at(from);
  store_floats(_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, kHalf)), to);
}
QUARK_INLINE void load_step(const Stored<uint8_t>* from, float* to) {
  const __m128i bytes = bytes_at(from);
  store_floats(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, kHalf)), to);
}

QUARK_INLINE void store_step(const float* from, Stored<float>* to) {
  _mm256_storeu_ps(&to->raw, floats_at(from));
  _mm256_storeu_ps(&to[kHalf].raw, floats_at(from + kHalf));
}
/// to_bfloat16 as a word.
QUARK_INLINE __m256i bfloat16_words(const float* from) {
  const __m256i u = ints_at(from), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
}
QUARK_INLINE void store_step(const float* from, BFloat16Bits* to) {
  const __m256i words = _mm256_packus_epi32(bfloat16_words(from), bfloat16_words(from + kHalf));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(words, 0xd8));
}
QUARK_INLINE void store_step(const float* from, Float16Bits* to) {
  for (int64_t i = 0; i < kStep; i += kHalf) {
    const __m128i half = _mm256_cvtps_ph(floats_at(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
}
QUARK_INLINE void store_step(const float* from, Stored<uint8_t>* to) {
  store_bytes(_mm256_cvttps_epi32(floats_at(from)), _mm256_cvttps_epi32(floats_at(from + kHalf)), to);
}
QUARK_INLINE void store_step(const float* from, Stored<int8_t>* to) {
  store_bytes(_mm256_cvttps_epi32(floats_at(from)), _mm256_cvttps_epi32(floats_at(from + kHalf)), to);
}
QUARK_INLINE void store_step(const int32_t* from, Stored<uint8_t>* to) {
  store_bytes(ints_at(from), ints_at(from + kHalf), to);
}

#endif

/// Numbers that are stored as T.
template <class T>
struct Numbers {
  const T* at;

  explicit Numbers(const void* numbers) : at(static_cast<const T*>(numbers)) {}
  Numbers(const void* numbers, const Grid&) : Numbers(numbers) {}

  QUARK_INLINE float one(int64_t i) const { return widen(at[i]); }
  /// Asks for what will be read `ahead`, in the next tile: a processor's own prefetching stops at a page's end.
  QUARK_INLINE void step(int64_t i, float* to, int64_t ahead = kTile) const {
    __builtin_prefetch(at + i + ahead);
    load_step(at + i, to);
  }
};

/// Numbers that become stored as T, or fixed point codes its lowest byte.
template <class T>
struct NumbersOut {
  using Element = T;
  T* at;

  NumbersOut(void* numbers, const Grid&) : at(static_cast<T*>(numbers)) {}

  template <class From>
  QUARK_INLINE void one(From number, T& to) const {
    narrow(number, to);
  }
  template <class From>
  QUARK_INLINE void step(const From* numbers, T* to) const {
    store_step(numbers, to);
  }
};

/// All of `n` numbers that a reader (Numbers, Minifloats) has.
template <class Reader>
inline void read_all(const Reader& numbers, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) numbers.step(i, to + i);
  for (; i < n; ++i) to[i] = numbers.one(i);
}

/// narrow() of neighbours.
template <class T>
inline void narrow_all(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (std::is_same_v<T, Float16Bits> || std::is_same_v<T, BFloat16Bits>) {
      alignas(64) float x[kStep];
      QUARK_VECTORIZE_STEP
      for (int64_t j = 0; j < kStep; ++j) x[j] = is_nan(from[i + j]) ? nan_like(from[i + j]) : from[i + j];
      store_step(x, to + i);
    } else {
      store_step(from + i, to + i);
    }
  }
  for (; i < n; ++i) narrow(from[i], to[i]);
}

/// One contiguous or strided run, widened.
template <class T>
inline void load_run(const T* from, int64_t stride, float* to, int64_t n) {
  if (stride == 1) return read_all(Numbers<T>(from), to, n);
  if (stride == 0) {
    const float x = widen(*from);
    QUARK_VECTORIZE
    for (int64_t i = 0; i < n; ++i) to[i] = x;
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * stride]);
  }
}

// ---- copies past the caches ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)
using Line = __m512i;
QUARK_INLINE Line load_line(const char* from) { return _mm512_loadu_si512(from); }
QUARK_INLINE void stream_line(char* to, Line v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }
#elif defined(__AVX__)
using Line = __m256i;
QUARK_INLINE Line load_line(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
QUARK_INLINE void stream_line(char* to, Line v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v); }
#elif defined(__SSE2__)
using Line = __m128i;
QUARK_INLINE Line load_line(const char* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
QUARK_INLINE void stream_line(char* to, Line v) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), v); }
#endif

/// memcpy; `stream` says that the target is part of more than the caches hold, so that fetching its old bytes first and
/// keeping the new ones there is a waste. What was streamed is seen by other threads after stream_fence().
inline void copy_bytes(void* to, const void* from, int64_t n, bool stream) {
#if defined(__SSE2__)
  if (stream) {
    auto* out = static_cast<char*>(to);
    const auto* in = static_cast<const char*>(from);
    constexpr int64_t kLine = sizeof(Line);
    int64_t i = -int64_t(reinterpret_cast<uintptr_t>(out)) & (kLine - 1);  // to the first whole line
    if (i > n) i = n;
    std::memcpy(out, in, size_t(i));
    for (; i + kLine <= n; i += kLine) stream_line(out + i, load_line(in + i));
    std::memcpy(out + i, in + i, size_t(n - i));
    return;
  }
#endif
  (void)stream;
  std::memcpy(to, from, size_t(n));
}

/// Whether stream_step can write here.
QUARK_INLINE bool is_line(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

/// A step of stored numbers past the caches, to a step of a tile that is_line.
template <class T>
QUARK_INLINE void stream_step(const T* from, T* to) {
#if defined(__SSE2__)
  constexpr size_t kBytes = kStep * sizeof(T), kLine = sizeof(Line);
  const auto* in = reinterpret_cast<const char*>(from);
  auto* out = reinterpret_cast<char*>(to);
  if constexpr (kBytes >= kLine) {
    for (size_t i = 0; i < kBytes; i += kLine) stream_line(out + i, load_line(in + i));
#if defined(__AVX512F__)
  } else if constexpr (kBytes == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#endif
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
#else
  std::memcpy(to, from, kStep * sizeof(T));
#endif
}

/// A step of a writer's numbers (NumbersOut, MinifloatsOut) at element i, past the caches or not.
template <class Writer, class From>
QUARK_INLINE void put_step(const Writer& to, const From* numbers, int64_t i, bool stream) {
  if (!stream) return to.step(numbers, to.at + i);
  alignas(64) typename Writer::Element step[kStep];
  to.step(numbers, step);
  stream_step(step, to.at + i);
}

QUARK_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// One contiguous or strided run, narrowed. Numbers that stay as they are can be streamed.
template <class T>
inline void store_run(const float* from, T* to, int64_t stride, int64_t n, bool stream) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, Stored<float>>) {
      copy_bytes(to, from, n * int64_t(sizeof(float)), stream);
    } else if (stream) {
      alignas(64) T narrowed[kTile];
      narrow_all(from, narrowed, n);
      copy_bytes(to, narrowed, n * int64_t(sizeof(T)), true);
    } else {
      narrow_all(from, to, n);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i * stride]);
  }
}

// ---- codes of a byte ----------------------------------------------------------------------------------------------

/// The codes of equal steps, `per_step` being 1 / step: two's complement.
inline void encode_fixed(const float* y, uint8_t* codes, int64_t n, float per_step) {
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(int32_t(y[i] * per_step));
}

/// The reverse.
inline void decode_fixed(const uint8_t* codes, float* y, int64_t n, bool is_signed, float step) {
  const int32_t top = is_signed ? 0x80 : 0;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) y[i] = float((int32_t(codes[i]) ^ top) - top) * step;
}

/// Two's complement codes of fewer bits, above which there are zeros, as bytes.
inline void extend_signs(uint8_t* codes, int64_t n, uint32_t bits) {
  const uint32_t top = 1u << (bits - 1);
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t((codes[i] ^ top) - top);
}

/// encode() of numbers of the grid.
inline void encode_all(const float* y, uint8_t* codes, int64_t n, const Grid& grid) {
  const Grid g = grid;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(encode(y[i], g));
}

/// How a minifloat is a float16: the same number but for a power of two, its code moved up by `shift`.
struct HalfForm {
  Grid g;
  int shift;
  float scale;  ///< a float16 of these bits times this is the number

  explicit HalfForm(const Grid& grid)
      : g(grid), shift(10 - int(g.mantissa)), scale(float_of(g.min_exp + (14u << 23))) {}

  /// Whether the largest number, too, is a finite float16.
  bool holds() const { return g.hi <= 65504.0f * scale; }

#if defined(__AVX2__) && defined(__F16C__)
  /// decode() of 16 codes.
  QUARK_INLINE __m256i halves(__m256i code) const {
    constexpr uint32_t kNoCode = 0x7fff;
    const uint32_t top = 1u << (g.bits - 1), last = g.nan_from > kNoCode ? kNoCode : g.nan_from - 1u;
    const __m256i m = _mm256_and_si256(code, words(top - 1u));
    const __m256i sign = _mm256_sll_epi16(_mm256_and_si256(code, words(top)), _mm_cvtsi32_si128(16 - int(g.bits)));
    const __m256i fnuz_nan = _mm256_cmpeq_epi16(code, words(g.nan_code == top ? top : kNoCode));
    const __m256i is_nan = _mm256_or_si256(_mm256_cmpgt_epi16(m, words(last)), fnuz_nan);
    const __m256i half = _mm256_sll_epi16(m, _mm_cvtsi32_si128(shift));
    return _mm256_or_si256(_mm256_blendv_epi8(half, words(0x7e00), is_nan), _mm256_andnot_si256(fnuz_nan, sign));
  }

  /// encode() of 16 numbers. NaN is 0 where it has no code.
  QUARK_INLINE __m256i codes(__m256i half) const {
    const __m256i m = _mm256_and_si256(half, words(0x7fff)), is_nan = _mm256_cmpgt_epi16(m, words(0x7c00));
    const __m256i code = _mm256_srl_epi16(m, _mm_cvtsi32_si128(shift));
    const __m256i sign = _mm256_sll_epi16(_mm256_srli_epi16(half, 15), _mm_cvtsi32_si128(int(g.bits) - 1));
    const __m256i kept_sign = _mm256_andnot_si256(_mm256_and_si256(is_nan, words(~g.kept_nan)), sign);
    return _mm256_or_si256(_mm256_blendv_epi8(code, words(g.nan_code & g.kept_nan), is_nan), kept_sign);
  }

 private:
  static QUARK_INLINE __m256i words(uint32_t word) { return _mm256_set1_epi16(int16_t(word)); }
#endif
};

/// Minifloats that are stored as codes, a byte each. The format has a HalfForm.
struct Minifloats {
  const uint8_t* codes;
  HalfForm form;

  Minifloats(const void* numbers, const Grid& grid) : codes(static_cast<const uint8_t*>(numbers)), form(grid) {}

  QUARK_INLINE float one(int64_t i) const { return decode(codes[i], form.g); }
  QUARK_INLINE void step(int64_t i, float* to) const {
    __builtin_prefetch(codes + i + kTile);
#if defined(__AVX2__) && defined(__F16C__)
    const __m256i half = form.halves(_mm256_cvtepu8_epi16(bytes_at(codes + i)));
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(form.scale)));
#else
    const __m256 scale = _mm256_set1_ps(form.scale);
    _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), scale));
    _mm256_storeu_ps(to + kHalf, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), scale));
#endif
#else
    QUARK_VECTORIZE_STEP
    for (int64_t j = 0; j < kStep; ++j) to[j] = decode(codes[i + j], form.g);
#endif
  }
};

/// Minifloats that become codes. Numbers of the grid are exact as a float16.
struct MinifloatsOut {
  using Element = Stored<uint8_t>;
  Element* at;
  HalfForm form;
  float per_scale;

  MinifloatsOut(void* numbers, const Grid& grid)
      : at(static_cast<Element*>(numbers)), form(grid), per_scale(1.0f / form.scale) {}

  QUARK_INLINE void one(float number, Element& to) const { to.raw = uint8_t(encode_or_zero(number, form.g)); }
  QUARK_INLINE void step(const float* numbers, Element* to) const {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512 scaled = _mm512_mul_ps(floats_at(numbers), _mm512_set1_ps(per_scale));
    const __m256i codes = form.codes(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtepi16_epi8(codes));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m256 by = _mm256_set1_ps(per_scale);
    const __m128i low = _mm256_cvtps_ph(_mm256_mul_ps(floats_at(numbers), by), _MM_FROUND_TO_NEAREST_INT);
    const __m128i high = _mm256_cvtps_ph(_mm256_mul_ps(floats_at(numbers + kHalf), by), _MM_FROUND_TO_NEAREST_INT);
    const __m256i codes = form.codes(_mm256_set_m128i(high, low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)));
#else
    for (int64_t j = 0; j < kStep; ++j) one(numbers[j], to[j]);
#endif
  }
};

/// decode() of codes.
inline void decode_all(const uint8_t* codes, float* y, int64_t n, const Grid& grid) {
  if (HalfForm(grid).holds()) return read_all(Minifloats(codes, grid), y, n);
  const Grid g = grid;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) y[i] = decode(codes[i], g);
}

// ---- random numbers -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// Eight counters, each word in a lane of 64 bits.
using Lanes = __m512i;
inline constexpr int64_t kCounters = 8;
QUARK_INLINE Lanes lanes_of(uint32_t word) { return _mm512_set1_epi64(word); }
QUARK_INLINE Lanes counters_from(uint64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
/// Products of the lower halves.
QUARK_INLINE Lanes products(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
QUARK_INLINE Lanes upper_halves(Lanes a) { return _mm512_srli_epi64(a, 32); }
QUARK_INLINE Lanes xor_of(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
/// The lower halves of four words of every counter, one counter after the other.
QUARK_INLINE void store_words(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t* to) {
  const Lanes low = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
  const Lanes high = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
  const Lanes even = _mm512_unpacklo_epi64(low, high), odd = _mm512_unpackhi_epi64(low, high);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(even, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), odd));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(even, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), odd));
}
#elif defined(__AVX2__)
// Four counters.
using Lanes = __m256i;
inline constexpr int64_t kCounters = 4;
QUARK_INLINE Lanes lanes_of(uint32_t word) { return _mm256_set1_epi64x(word); }
QUARK_INLINE Lanes counters_from(uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_set_epi64x(3, 2, 1, 0));
}
QUARK_INLINE Lanes products(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
QUARK_INLINE Lanes upper_halves(Lanes a) { return _mm256_srli_epi64(a, 32); }
QUARK_INLINE Lanes xor_of(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
QUARK_INLINE void store_words(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t* to) {
  const Lanes low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const Lanes high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  const Lanes even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
  auto* lines = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(lines, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(lines + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
#endif

/// philox() of neighbouring counters: four words each.
inline void random_words(uint64_t first, int64_t blocks, uint64_t key, uint32_t* words) {
  int64_t i = 0;
#if defined(__AVX2__)
  const Lanes factor0 = lanes_of(kPhilox[0]), factor2 = lanes_of(kPhilox[1]);
  Lanes keys[kPhiloxRounds][2];
  for (uint32_t round = 0; round < uint32_t(kPhiloxRounds); ++round) {
    keys[round][0] = lanes_of(uint32_t(key) + round * kPhiloxWeyl[0]);
    keys[round][1] = lanes_of(uint32_t(key >> 32) + round * kPhiloxWeyl[1]);
  }
  for (; i + kCounters <= blocks; i += kCounters) {
    // What is in the upper half of a lane doesn't matter.
    Lanes c0 = counters_from(first + uint64_t(i)), c1 = upper_halves(c0), c2 = lanes_of(0), c3 = c2;
    for (const auto& k : keys) {
      const Lanes a = products(c0, factor0), b = products(c2, factor2);
      c0 = xor_of(upper_halves(b), c1, k[0]);
      c2 = xor_of(upper_halves(a), c3, k[1]);
      c1 = b;
      c3 = a;
    }
    store_words(c0, c1, c2, c3, words + 4 * i);
  }
#endif
  for (; i < blocks; ++i) {
    const RandomWords r = philox(first + uint64_t(i), key);
    __builtin_memcpy(words + 4 * i, r.word, sizeof(r.word));
  }
}

// ---- bit packing --------------------------------------------------------------------------------------------------

/// How eight codes, a byte each, are one word's bytes, and its low 8 * bits bits: in three steps fields of 8, 16 and 32
/// bits are joined in pairs, the upper one coming down by what its lower neighbour leaves free.
struct BitPacking {
  uint64_t code;                ///< a code's bits in every byte
  uint64_t lower[3], upper[3];  ///< of the pairs of a step
  uint32_t shift[3];

  explicit BitPacking(uint32_t width) : code(0x0101010101010101u * ((1u << width) - 1u)) {
    for (int step = 0; step < 3; ++step) {
      const int field = 8 << step;  // bits apart; width << step of them are taken
      const uint64_t taken = (uint64_t(1) << (width << step)) - 1u;
      lower[step] = 0;
      for (int at = 0; at < 64; at += 2 * field) lower[step] |= taken << at;
      upper[step] = lower[step] << field;
      shift[step] = (8u - width) << step;
    }
  }

  QUARK_INLINE uint64_t join(uint64_t w) const {
    w &= code;
    for (int step = 0; step < 3; ++step) w = (w & lower[step]) | (w & upper[step]) >> shift[step];
    return w;
  }
  QUARK_INLINE uint64_t split(uint64_t w) const {
    for (int step = 2; step >= 0; --step) w = (w & lower[step]) | (w << shift[step] & upper[step]);
    return w;
  }
};

/// Room after the bytes of a tile's codes: whole words are read and written.
inline constexpr int64_t kPackingSlack = 8;

/// Code i is bits [bits * i, bits * i + bits) of a little-endian bit stream; the last byte is filled with zero bits.
/// Codes and bytes have room for whole words.
inline void pack_codes(const uint8_t* codes, int64_t n, uint32_t bits, uint8_t* bytes) {
  if (bits == 4) {  // pairs are enough
    QUARK_VECTORIZE
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      uint16_t pair;
      __builtin_memcpy(&pair, codes + 2 * i, 2);
      bytes[i] = uint8_t((pair & 0xfu) | (pair >> 4 & 0xf0u));
    }
    if (n % 2) bytes[n / 2] &= 0xfu;
    return;
  }
  const BitPacking packing(bits);
  alignas(64) uint64_t words[kTile / 8];
  const int64_t whole = n / 8, rest = n % 8;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < whole; ++i) {
    uint64_t w;
    __builtin_memcpy(&w, codes + 8 * i, 8);
    words[i] = packing.join(w);
  }
  for (int64_t i = 0; i < whole; ++i) __builtin_memcpy(bytes + i * bits, words + i, 8);
  if (rest > 0) {
    uint64_t w = 0;
    __builtin_memcpy(&w, codes + 8 * whole, size_t(rest));
    w = packing.join(w);
    __builtin_memcpy(bytes + whole * bits, &w, 8);
  }
}

/// The reverse.
inline void unpack_codes(const uint8_t* bytes, int64_t n, uint32_t bits, uint8_t* codes) {
  if (bits == 4) {
    QUARK_VECTORIZE
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      const auto pair = uint16_t((bytes[i] & 0xfu) | (bytes[i] & 0xf0u) << 4);
      __builtin_memcpy(codes + 2 * i, &pair, 2);
    }
    return;
  }
  const BitPacking packing(bits);
  alignas(64) uint64_t words[kTile / 8 + 1];
  const int64_t count = (n + 7) / 8;
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(words + i, bytes + i * bits, 8);
  QUARK_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t w = packing.split(words[i]);
    __builtin_memcpy(codes + 8 * i, &w, 8);
  }
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
