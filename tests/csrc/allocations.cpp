// Every check of condense/tensor.h on tensors that pass it, where asking for memory ends the program; then one that
// fails, whose text is printed.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "condense/tensor.h"

namespace {
bool forbidden = false;
}

void* operator new(std::size_t bytes) {
  if (forbidden) {
    std::fputs("a check that passes asks for memory\n", stderr);
    std::abort();
  }
  return std::malloc(bytes);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  using namespace condense;
  constexpr const char* op = "checks";
  float data[24] = {};
  int64_t ends[2] = {};
  const View k{data, Dtype::f32, 4, {1, 2, 3, 4}, {24, 12, 4, 1}};
  const View bounds{ends, Dtype::i64, 2, {1, 2}, {2, 1}};
  const int64_t sink = 1;
  forbidden = true;
  CONDENSE_CHECK(k.rank == 4, "k has ", int64_t{k.rank}, " dimensions, expected 4");
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  CONDENSE_CHECK_FLOAT(k, 4);
  CONDENSE_CHECK_INTEGER(bounds, 2);
  CONDENSE_CHECK_DTYPE(k, Dtype::f32);
  CONDENSE_CHECK_SAME_DTYPE(k, k);
  CONDENSE_CHECK_SHAPE(k, 1, kAny, kSome, 4);
  CONDENSE_CHECK_ROWS(k);
  CONDENSE_CHECK_CONTIGUOUS(k);
  CONDENSE_CHECK_WRITABLE(k);
  CONDENSE_CHECK_HEADS("q", 4, 2);
  CONDENSE_CHECK_PACKED(k, Dtype::f32, 1, 2, 3, 4);
  CONDENSE_CHECK_BOUNDS(bounds, 1);
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_POSITIVE(sink);
  forbidden = false;
  try {
    CONDENSE_CHECK_SHAPE(k, 1, 2, 3, 5);
  } catch (const std::invalid_argument& error) {
    std::puts(error.what());
  }
}
