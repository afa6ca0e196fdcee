// What `compiled.cpp` knows of dtypes and of the formats of compressed messages (wire.py), a block of elements at a time.
//
// Whole blocks are loops of a fixed length, which the compiler makes vectors of. Both files are compiled as one.

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t BLOCK = 256;  // elements; a multiple of the 64 that share four scales
constexpr int64_t GROUP = 64;
constexpr int32_t SPOILT = 255;
constexpr int32_t INFINITE = 0x7f800000;

enum Dtype : int64_t { FP32, FP64, BF16, FP16, INT8, FP8 };

struct Flat {
  char* data;
  int64_t dtype;
};

int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool finite(float value) { return (bits_of(value) & INFINITE) != INFINITE; }

bool finite(double value) { return std::fabs(value) <= std::numeric_limits<double>::max(); }

float from_bf16(uint16_t stored) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(stored) << 16)); }

// To nearest, ties to even; NaNs stay.
uint16_t to_bf16(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > static_cast<uint32_t>(INFINITE) ? 0x7fc0 : rounded);
}

// Four exponent bits of bias 7, three behind the point, no infinities. Subnormals count in steps of 2^-9.
float from_fp8(uint8_t code) {
  const int32_t size = code & 0x7f;
  const float value = size < 8 ? static_cast<float>(size) * 0x1p-9f : float_of((size + (120 << 3)) << 20);
  return code & 0x80 ? -value : value;
}

// Of a value of at most 448.
uint8_t to_fp8(float value) {
  const int32_t bits = bits_of(value), size = bits & 0x7fffffff;
  const int32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  const int32_t subnormal = static_cast<int32_t>(std::rint(float_of(size) * 0x1p9f));
  return static_cast<uint8_t>((size < (121 << 23) ? subnormal : normal) | ((bits >> 24) & 0x80));
}

// Elements [at, at + count) of a tensor as arithmetic values: where they lie, if they are whole and of this dtype, else a copy.
template <typename A>
A* load(const Flat& flat, int64_t at, int64_t count, A* copy) {
  if (flat.dtype == (sizeof(A) == 8 ? FP64 : FP32)) {
    A* there = reinterpret_cast<A*>(flat.data) + at;
    if (count == BLOCK) return there;
    for (int64_t i = 0; i < count; ++i) copy[i] = there[i];
  } else if (flat.dtype == BF16) {
    const uint16_t* there = reinterpret_cast<uint16_t*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) copy[i] = from_bf16(there[i]);
  } else if (flat.dtype == FP16) {
    const c10::Half* there = reinterpret_cast<c10::Half*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<float>(there[i]);
  } else if (flat.dtype == FP32) {
    const float* there = reinterpret_cast<float*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) copy[i] = there[i];
  } else {
    const double* there = reinterpret_cast<double*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<A>(there[i]);
  }
  for (int64_t i = count; i < BLOCK; ++i) copy[i] = 0;
  return copy;
}

// Back to where `load` found them.
template <typename A>
void store(const Flat& flat, int64_t at, int64_t count, const A* values) {
  if (flat.dtype == BF16) {
    uint16_t* there = reinterpret_cast<uint16_t*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) there[i] = to_bf16(static_cast<float>(values[i]));
  } else if (flat.dtype == FP16) {
    c10::Half* there = reinterpret_cast<c10::Half*>(flat.data) + at;
    for (int64_t i = 0; i < count; ++i) there[i] = static_cast<float>(values[i]);
  } else if (flat.dtype == FP32) {
    float* there = reinterpret_cast<float*>(flat.data) + at;
    if (reinterpret_cast<const char*>(there) == reinterpret_cast<const char*>(values)) return;
    for (int64_t i = 0; i < count; ++i) there[i] = static_cast<float>(values[i]);
  } else {
    double* there = reinterpret_cast<double*>(flat.data) + at;
    if (reinterpret_cast<const char*>(there) == reinterpret_cast<const char*>(values)) return;
    for (int64_t i = 0; i < count; ++i) there[i] = values[i];
  }
}

// Elements [at, at + count) of codes: where they lie if they are a whole block, else a copy with zeros behind.
template <typename C>
const C* codes_at(const char* codes, int64_t at, int64_t count, C* copy) {
  const C* there = reinterpret_cast<const C*>(codes) + at;
  if (count == BLOCK) return there;
  std::memset(copy, 0, BLOCK * sizeof(C));
  std::memcpy(copy, there, count * sizeof(C));
  return copy;
}

// The largest size, as bits, of what shares a scale in a group of 64: of elements equal modulo 4.
void largest_sizes(const float* values, int32_t* largest) {
  for (int i = 0; i < 16; ++i) largest[i] = 0;
  for (int row = 0; row < 4; ++row) {
    const float* lanes = values + 16 * row;
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const int32_t size = bits_of(lanes[i]) & 0x7fffffff;
      largest[i] = size > largest[i] ? size : largest[i];
    }
  }
  for (int i = 0; i < 8; ++i) largest[i] = largest[i] > largest[i + 8] ? largest[i] : largest[i + 8];
  for (int i = 0; i < 4; ++i) largest[i] = largest[i] > largest[i + 4] ? largest[i] : largest[i + 4];
}

// Scales of a group's differences, which are scaled in place, and what scales them back; whether one is not finite.
bool scale_group(bool eighths, float* values, uint8_t* scales, float* down) {
  int32_t largest[16];
  largest_sizes(values, largest);
  const int32_t top = eighths ? 8 : 6;
  const float most = eighths ? 448.0f : 127.0f;
  float up[16];
  bool spoilt = false;
  for (int i = 0; i < 4; ++i) {
    const int32_t field = largest[i] >> 23;
    const int32_t scale = field == SPOILT ? SPOILT : field - top < 1 ? 1 : field - top;
    spoilt |= field == SPOILT;
    scales[i] = static_cast<uint8_t>(scale);
    up[i] = field == SPOILT ? 0.0f : float_of((254 - scale) << 23);
    down[i] = field == SPOILT ? 0.0f : float_of(scale << 23);
  }
  for (int i = 4; i < 16; ++i) {
    up[i] = up[i - 4];
    down[i] = down[i - 4];
  }
  for (int row = 0; row < 4; ++row) {
    float* lanes = values + 16 * row;
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      // Not times 0, which leaves NaNs.
      float scaled = up[i] == 0.0f ? 0.0f : lanes[i] * up[i];
      scaled = scaled > most ? most : scaled;
      lanes[i] = scaled < -most ? -most : scaled;
    }
  }
  return spoilt;
}

// Eight-bit codes of a block's differences, and what they mean in the differences' place; whether a group is left out.
bool encode(bool eighths, float* values, uint8_t* codes, uint8_t* scales, int64_t count) {
  float down[BLOCK / GROUP][16] = {};
  bool spoilt = false;
  for (int64_t first = 0; first < count; first += GROUP)
    spoilt |= scale_group(eighths, values + first, scales + first / 16, down[first / GROUP]);
  if (eighths) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) {
      const uint8_t code = to_fp8(values[i]);
      codes[i] = code;
      values[i] = from_fp8(code);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) {
      const float whole = std::rint(values[i]);
      codes[i] = static_cast<uint8_t>(static_cast<int32_t>(whole));
      values[i] = whole;
    }
  }
  for (int64_t row = 0; row < BLOCK / 16; ++row) {
    float* lanes = values + 16 * row;
    const float* power = down[row / 4];
#pragma omp simd
    for (int i = 0; i < 16; ++i) lanes[i] *= power[i];
  }
  return spoilt;
}

// bf16 codes of a block's differences, as `encode`.
bool encode_bf16(float* values, uint16_t* codes) {
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < BLOCK; ++i) {
    const uint16_t code = to_bf16(values[i]);
    const float meant = from_bf16(code);
    codes[i] = code;
    bad |= finite(meant) ? 0 : 1;
    values[i] = finite(meant) ? meant : 0.0f;
  }
  return bad != 0;
}

}  // namespace
