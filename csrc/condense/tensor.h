// A tensor as the extension sees it: an address, a dtype, sizes and strides. Python owns the memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace condense {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3, i64 = 4 };

// Bit patterns; arithmetic happens in fp32 after conversion.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct View {
  static constexpr int kMaxRank = 5;
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int rank = -1;  // -1: the argument was None
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  explicit operator bool() const { return rank >= 0; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The Python faces have checked all arguments before; what is asked here again costs nothing and keeps a caller of the
// bare extension from reading through a wrong pointer.
static inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

static inline void require_float(const View& x, int rank, const char* what) {
  require(x.rank == rank && (x.dtype == Dtype::f32 || x.dtype == Dtype::bf16 || x.dtype == Dtype::f16), what);
}

static inline void require_integer(const View& x, int rank, const char* what) {
  require(x.rank == rank && (x.dtype == Dtype::i32 || x.dtype == Dtype::i64), what);
}

// One element of an int32 or int64 tensor.
static inline int64_t integer_at(const View& x, int64_t offset) {
  return x.dtype == Dtype::i32 ? x.as<const int32_t>()[offset] : x.as<const int64_t>()[offset];
}

// Calls f with a null pointer of the element type: `by_dtype(x.dtype, [&](auto* tag) { ... })`.
template <class F>
void by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
    default:
      throw std::invalid_argument("expected a float32, bfloat16 or float16 tensor");
  }
}

}  // namespace condense
