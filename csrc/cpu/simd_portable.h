// 4 floats in a vector of the compiler's: SSE2, NEON, or plain code. For every other processor.
#pragma once

#include "kernels.h"

namespace {

using resnet_fast::cpu::Bfloat16;

constexpr int lanes = 4;
constexpr int tile_rows = 6;
typedef float Vector __attribute__((vector_size(16)));
typedef int Mask __attribute__((vector_size(16)));

inline Vector zero() { return Vector{0, 0, 0, 0}; }
inline Vector broadcast(float value) { return Vector{value, value, value, value}; }
inline Vector load(const float* from) {
  Vector a;
  __builtin_memcpy(&a, from, sizeof a);
  return a;
}
inline void store(float* to, Vector a) { __builtin_memcpy(to, &a, sizeof a); }
inline Vector load(const float* from, int count) {
  Vector a = zero();
  for (int i = 0; i < count; ++i) {
    a[i] = from[i];
  }
  return a;
}
inline void store(float* to, Vector a, int count) {
  for (int i = 0; i < count; ++i) {
    to[i] = a[i];
  }
}
typedef unsigned Bits __attribute__((vector_size(16)));
inline Vector load(const Bfloat16* from, int count) {
  Bits bits{};
  for (int i = 0; i < count; ++i) {
    bits[i] = unsigned{from[i].bits} << 16;
  }
  return reinterpret_cast<Vector>(bits);
}
inline Vector load(const Bfloat16* from) { return load(from, lanes); }
// What is bfloat16 already.
inline void store_exact(Bfloat16* to, Vector a, int count) {
  const Bits halves = reinterpret_cast<Bits>(a) >> 16;
  for (int i = 0; i < count; ++i) {
    to[i].bits = static_cast<unsigned short>(halves[i]);
  }
}
// To the nearest one, to even if two are as near.
inline void store(Bfloat16* to, Vector a, int count) {
  const Bits bits = reinterpret_cast<Bits>(a), unordered = reinterpret_cast<Bits>(a != a);
  const Bits up = bits + (bits >> 16 & 1) + 0x7fff;
  store_exact(to, reinterpret_cast<Vector>((unordered & (bits | 1 << 22)) | (~unordered & up)), count);
}
inline void store(Bfloat16* to, Vector a) { store(to, a, lanes); }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector subtract(Vector a, Vector b) { return a - b; }
inline Vector multiply(Vector a, Vector b) { return a * b; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector choose(Mask mask, Vector a, Vector b) {
  return reinterpret_cast<Vector>((reinterpret_cast<Mask>(a) & mask) | (reinterpret_cast<Mask>(b) & ~mask));
}
// max(0, a), and NaN for NaN.
inline Vector relu(Vector a) { return choose(a < zero(), zero(), a); }
// The larger one, and NaN if either is NaN.
inline Vector larger(Vector a, Vector b) { return choose((a > b) | (a != a), a, b); }
// Elements by their numbers.
using Numbers = Mask;
inline Numbers numbers(const int* from) {
  Numbers order;
  __builtin_memcpy(&order, from, sizeof order);
  return order;
}
inline Vector permute(Vector a, Numbers order) { return Vector{a[order[0]], a[order[1]], a[order[2]], a[order[3]]}; }
// Whether every element is a number: a difference to itself that is not 0 is that of NaN or infinity.
inline bool finite(Vector a) {
  const Mask wrong = (a - a) != zero();
  return (wrong[0] | wrong[1] | wrong[2] | wrong[3]) == 0;
}

}  // namespace
