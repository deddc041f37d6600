// ragged_append: the rows of t new tokens [B, G, t, D] behind the valid ones of a ragged cache [T, D], in place; then
// every length grows by t. Reads and writes the new rows once: 8 KB each way for a token of a layer (8 heads, D 128,
// bf16), so a launch costs more than its bytes. One for keys, values and lengths, nothing read back: a captured decode
// step replays it.
//
// A block takes a head. All its threads read the head's length before one of them writes it, and no other block looks
// at it. Rows move in units of 16 bytes where addresses, strides and D allow it, else by elements.
#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace condense::cuda {

namespace {

constexpr int kThreads = CONDENSE_BLOCK(256);

struct Side {  // keys or values, strides in elements
  void* cache;
  const void* added;
  int64_t row;                 // of the cache
  int64_t batch, head, token;  // of the new rows
};

struct Append {
  Side side[2];
  Integers offsets;
  void* lengths;
  int64_t length_stride, rows;  // rows: T
  int added, units, kv_heads;   // units of a row
  bool wide;
};

template <class T, class Unit>
__global__ void __launch_bounds__(kThreads) append_rows(Append args) {
  constexpr int kPer = sizeof(Unit) / sizeof(T);
  const int n = static_cast<int>(blockIdx.x), b = n / args.kv_heads, g = n - b * args.kv_heads;
  const int64_t at = n * args.length_stride;
  const int64_t length = Integers{args.lengths, 1, args.wide}[at];
  const int64_t start = clamp(args.offsets[n], args.rows) + (length > 0 ? length : 0);
  const int64_t stop = clamp(args.offsets[n + 1], args.rows);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.wide)
      static_cast<int64_t*>(args.lengths)[at] = length + args.added;
    else
      static_cast<int32_t*>(args.lengths)[at] = static_cast<int32_t>(length + args.added);
  }
  const int64_t room = stop > start ? stop - start : 0;
  const int64_t places = (room < args.added ? room : args.added) * args.units;
  for (int64_t place = threadIdx.x; place < places; place += kThreads) {
    const int64_t j = place / args.units, column = place % args.units * kPer;
    Unit value[2];
    for (int s = 0; s < 2; ++s) {
      const Side& side = args.side[s];
      const T* from = static_cast<const T*>(side.added) + b * side.batch + g * side.head + j * side.token;
      value[s] = *reinterpret_cast<const Unit*>(from + column);
    }
    for (int s = 0; s < 2; ++s) {
      T* to = static_cast<T*>(args.side[s].cache) + (start + j) * args.side[s].row;
      *reinterpret_cast<Unit*>(to + column) = value[s];
    }
  }
}

}  // namespace

void ragged_append(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                   const View& v_new, uintptr_t stream) {
  require(k.rank == 2 && v.rank == 2 && k_new.rank == 4 && v_new.rank == 4, "ragged_append: wrong ranks");
  require(k.dtype == v.dtype && k.dtype == k_new.dtype && k.dtype == v_new.dtype,
          "ragged_append: k, v, k_new and v_new must be of one dtype");
  require_integer(cu_seqlens, 1, "ragged_append: cu_seqlens must be integers [B*G+1]");
  require_integer(lengths, 1, "ragged_append: lengths must be integers [B*G]");
  const int64_t heads = k_new.size[0] * k_new.size[1], d = k.size[1];
  require(cu_seqlens.size[0] == heads + 1 && lengths.size[0] == heads, "ragged_append: offsets of other heads");
  if (heads == 0) return;
  bool wide_units = d * bytes_of(k.dtype) % 16 == 0;
  for (const View* x : {&k, &v, &k_new, &v_new}) {
    require(x->size[x->rank - 1] == d && (x->stride[x->rank - 1] == 1 || d == 1), "ragged_append: rows of another D");
    wide_units = wide_units && aligned(*x);
  }
  Append args{};
  args.side[0] = {k.data, k_new.data, k.stride[0], k_new.stride[0], k_new.stride[1], k_new.stride[2]};
  args.side[1] = {v.data, v_new.data, v.stride[0], v_new.stride[0], v_new.stride[1], v_new.stride[2]};
  args.offsets = {cu_seqlens.data, cu_seqlens.stride[0], cu_seqlens.dtype == Dtype::i64};
  args.lengths = lengths.data, args.length_stride = lengths.stride[0], args.wide = lengths.dtype == Dtype::i64;
  args.rows = k.size[0], args.added = static_cast<int>(k_new.size[2]);
  args.units = static_cast<int>(wide_units ? d * bytes_of(k.dtype) / 16 : d);
  args.kv_heads = static_cast<int>(k_new.size[1]);
  by_type(k.dtype, [&]<class T>(T*) {
    launch(wide_units ? append_rows<T, uint4> : append_rows<T, T>, dim3(static_cast<unsigned>(heads)), dim3(kThreads),
           stream, args);
  });
}

}  // namespace condense::cuda
