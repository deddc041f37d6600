// The texts of failed checks. Nothing here runs on the way to a result.
#include "condense/tensor.h"

namespace condense {

namespace {

const char* const kNames[kDtypes] = {"float32", "bfloat16", "float16", "int32", "int64"};

std::string list(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    const std::string size = values[i] == kAny ? "any" : values[i] == kSome ? "1 or more" : std::to_string(values[i]);
    text += (i ? ", " : "") + size;
  }
  return text + "]";
}

std::string shape(const View& x) { return list(x.size, x.rank); }

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + ": " + what);
}

void require_tensor(const char* op, const char* name, const View& x) {
  if (!x) refuse(op, std::string(name) + " is None, expected a tensor");
}

}  // namespace

void fail(const char* op, std::initializer_list<Part> parts) {
  std::string what;
  for (const Part& part : parts) what += part.text ? std::string(part.text) : std::to_string(part.number);
  refuse(op, what);
}

void fail_rank(const char* op, const char* name, const View& x, int rank) {
  require_tensor(op, name, x);
  const std::string dimensions = rank == 1 ? " dimension" : " dimensions";
  refuse(op, std::string(name) + " has shape " + shape(x) + ", expected " + std::to_string(rank) + dimensions);
}

void fail_dtype(const char* op, const char* name, const View& x, unsigned expected, const char* like) {
  require_tensor(op, name, x);
  std::string known;
  for (int code = 0; code < kDtypes; ++code) {
    if (!(expected >> code & 1)) continue;
    const bool last = !(expected >> (code + 1));
    known += std::string(known.empty() ? "" : last ? " or " : ", ") + kNames[code];
  }
  const std::string as = like ? std::string(", the dtype of ") + like : "";
  refuse(op, std::string(name) + " is " + kNames[static_cast<int>(x.dtype)] + ", expected " + known + as);
}

void fail_shape(const char* op, const char* name, const View& x, Sizes expected) {
  require_tensor(op, name, x);
  const std::string wanted = list(expected.begin(), static_cast<int64_t>(expected.size()));
  refuse(op, std::string(name) + " has shape " + shape(x) + ", expected " + wanted);
}

void fail_rows(const char* op, const char* name, const View& x) {
  const std::string stride = std::to_string(x.stride[x.rank - 1]);
  refuse(op, std::string(name) + " has stride " + stride + " in its last dimension, expected 1");
}

void fail_strides(const char* op, const char* name, const View& x, const char* expected) {
  const std::string strides = list(x.stride, x.rank);
  refuse(op, std::string(name) + " has strides " + strides + " for shape " + shape(x) + ", expected " + expected);
}

void fail_heads(const char* op, const char* name, int64_t num_heads, int64_t kv_heads) {
  refuse(op, std::string(name) + " has " + std::to_string(num_heads) + " heads, expected a multiple of the " +
                 std::to_string(kv_heads) + " KV heads");
}

}  // namespace condense
