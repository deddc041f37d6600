// A tensor as the extension sees it, and what a kernel checks of its arguments. Python owns the memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace condense {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3, i64 = 4 };
constexpr int kDtypes = 5;

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

static inline bool empty(const View& x) {
  bool none = false;
  for (int i = 0; i < x.rank; ++i) none |= x.size[i] == 0;
  return none;
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

// --- Checks
//
// condense_core.ops checks what a user passes. Here every kernel checks that the tensors it is given fit each other,
// outputs included, so that a mistake in between is an error (std::invalid_argument, Python's ValueError) and no access
// beyond a tensor. A check compares a few integers and allocates nothing; the text of an error is made in tensor.cpp,
// out of line, when one fails:
//
//   key_norm: out has shape [2, 3], expected [2, 3, 17]
//
// The macros name the tensor as it is called in the source, and take the name of the op from a variable `op`.

constexpr unsigned dtypes(std::initializer_list<Dtype> all) {
  unsigned mask = 0;
  for (const Dtype dtype : all) mask |= 1u << static_cast<int>(dtype);
  return mask;
}
constexpr unsigned kFloats = dtypes({Dtype::f32, Dtype::bf16, Dtype::f16});
constexpr unsigned kIntegers = dtypes({Dtype::i32, Dtype::i64});
// For CONDENSE_CHECK_SHAPE: any size, and any but 0.
constexpr int64_t kAny = -1, kSome = -2;

// A piece of an error: text or a number.
struct Part {
  const char* text;
  int64_t number;
  __attribute__((always_inline)) constexpr Part(const char* text_) : text(text_), number(0) {}
  __attribute__((always_inline)) constexpr Part(int64_t number_) : text(nullptr), number(number_) {}
};

using Sizes = std::initializer_list<int64_t>;

[[noreturn]] void fail(const char* op, std::initializer_list<Part> parts);
[[noreturn]] void fail_rank(const char* op, const char* name, const View& x, int rank);
[[noreturn]] void fail_dtype(const char* op, const char* name, const View& x, unsigned expected, const char* like);
[[noreturn]] void fail_shape(const char* op, const char* name, const View& x, Sizes expected);
[[noreturn]] void fail_rows(const char* op, const char* name, const View& x);
[[noreturn]] void fail_strides(const char* op, const char* name, const View& x, const char* expected);
[[noreturn]] void fail_heads(const char* op, const char* name, int64_t num_heads, int64_t kv_heads);

static inline void check_tensor(const char* op, const char* name, const View& x, int rank) {
  if (x.rank != rank) fail_rank(op, name, x, rank);
  if (!x.data && !empty(x)) fail(op, {name, " has no memory, expected a tensor with data"});
}

static inline void check_dtype(const char* op, const char* name, const View& x, unsigned expected,
                               const char* like = nullptr) {
  if (!(expected >> static_cast<unsigned>(x.dtype) & 1)) fail_dtype(op, name, x, expected, like);
}

static inline void check_shape(const char* op, const char* name, const View& x, Sizes expected) {
  bool same = x.rank == static_cast<int>(expected.size());
  const int64_t* size = x.size;
  for (const int64_t wanted : expected) {
    same = same && (wanted == kAny || (wanted == kSome ? *size >= 1 : *size == wanted));
    ++size;
  }
  if (!same) fail_shape(op, name, x, expected);
  if (!x.data && !empty(x)) fail(op, {name, " has no memory, expected a tensor with data"});
}

// Kernels read and write whole rows. The strides of an empty tensor say nothing.
static inline void check_rows(const char* op, const char* name, const View& x) {
  if (x.stride[x.rank - 1] != 1 && x.size[x.rank - 1] > 1 && !empty(x)) fail_rows(op, name, x);
}

static inline void check_contiguous(const char* op, const char* name, const View& x) {
  int64_t stride = 1;
  bool packed = true;
  for (int i = x.rank - 1; i >= 0; --i) {
    packed = packed && (x.size[i] <= 1 || x.stride[i] == stride);
    stride *= x.size[i];
  }
  if (!packed && stride != 0) fail_strides(op, name, x, "contiguous");
}

// What is written in place must not be the same memory twice, as that of an expanded tensor is.
static inline void check_writable(const char* op, const char* name, const View& x) {
  bool repeated = false;
  for (int i = 0; i < x.rank; ++i) repeated |= x.size[i] > 1 && x.stride[i] == 0;
  if (repeated && !empty(x)) fail_strides(op, name, x, "no stride of 0 in a tensor that is written to");
}

static inline void check_heads(const char* op, const char* name, int64_t num_heads, int64_t kv_heads) {
  if (kv_heads ? num_heads % kv_heads != 0 || num_heads == 0 : num_heads != 0) {
    fail_heads(op, name, num_heads, kv_heads);
  }
}

// Keys, values or queries [B, G, N, D]; N may be 0.
static inline void check_heads_of_rows(const char* op, const char* name, const View& x) {
  check_tensor(op, name, x, 4);
  check_dtype(op, name, x, kFloats);
  check_shape(op, name, x, {kSome, kSome, kAny, kSome});
  check_rows(op, name, x);
}

#define CONDENSE_CHECK(condition, ...)                     \
  do {                                                     \
    if (!(condition)) ::condense::fail(op, {__VA_ARGS__}); \
  } while (0)

#define CONDENSE_CHECK_HEADS_OF_ROWS(x) ::condense::check_heads_of_rows(op, #x, x)
#define CONDENSE_CHECK_NOT_NEGATIVE(number) \
  CONDENSE_CHECK((number) >= 0, #number " is ", int64_t{number}, ", expected 0 or more")
#define CONDENSE_CHECK_POSITIVE(number) \
  CONDENSE_CHECK((number) >= 1, #number " is ", int64_t{number}, ", expected 1 or more")
// float32, bfloat16 or float16, of so many dimensions.
#define CONDENSE_CHECK_FLOAT(x, rank) \
  (::condense::check_tensor(op, #x, x, rank), ::condense::check_dtype(op, #x, x, ::condense::kFloats))
// int32 or int64, of so many dimensions.
#define CONDENSE_CHECK_INTEGER(x, rank) \
  (::condense::check_tensor(op, #x, x, rank), ::condense::check_dtype(op, #x, x, ::condense::kIntegers))
#define CONDENSE_CHECK_DTYPE(x, dtype) ::condense::check_dtype(op, #x, x, ::condense::dtypes({dtype}))
#define CONDENSE_CHECK_SAME_DTYPE(x, other) \
  ::condense::check_dtype(op, #x, x, ::condense::dtypes({(other).dtype}), #other)
// The sizes, each a number or kAny.
#define CONDENSE_CHECK_SHAPE(x, ...) ::condense::check_shape(op, #x, x, {__VA_ARGS__})
#define CONDENSE_CHECK_ROWS(x) ::condense::check_rows(op, #x, x)
#define CONDENSE_CHECK_CONTIGUOUS(x) ::condense::check_contiguous(op, #x, x)
#define CONDENSE_CHECK_WRITABLE(x) ::condense::check_writable(op, #x, x)
// num_heads query heads share kv_heads.
#define CONDENSE_CHECK_HEADS(name, num_heads, kv_heads) ::condense::check_heads(op, name, num_heads, kv_heads)
// A small tensor that is read, or an output, by one running offset: the shape, the dtype, contiguous.
#define CONDENSE_CHECK_PACKED(x, dtype, ...) \
  (CONDENSE_CHECK_SHAPE(x, __VA_ARGS__), CONDENSE_CHECK_DTYPE(x, dtype), CONDENSE_CHECK_CONTIGUOUS(x))
// bounds [B, 2], the first real token of each sequence and the one behind the last, or None.
#define CONDENSE_CHECK_BOUNDS(bounds, batch)    \
  do {                                          \
    if (bounds) {                               \
      CONDENSE_CHECK_INTEGER(bounds, 2);        \
      CONDENSE_CHECK_SHAPE(bounds, (batch), 2); \
    }                                           \
  } while (0)

}  // namespace condense
