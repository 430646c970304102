// Just enough of CUDA and of TileLang's device library to run a generated kernel on a CPU. Blocks run
// one after another, and the threads of a block as fibers of one OS thread: a fiber runs until it
// waits for its warp or its block, then the next one does. That is fast, and every run is the same.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define __global__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define CUDART_INF_F INFINITY

template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
// Of a number and NaN, the number.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;
using half_t = _Float16;
struct uchar2 { uchar x, y; };
struct uchar4 { uchar x, y, z, w; };
struct uint1 { uint x; };
struct int2 { int x, y; };
struct uint2 { uint x, y; };
struct float2 { float x, y; };
struct int4 { int x, y, z, w; };
struct uint4 { uint x, y, z, w; };
struct float4 { float x, y, z, w; };
struct __half2 { _Float16 x, y; };
using half2 = __half2;
inline half2 __float22half2_rn(float2 v) {
  return {static_cast<half_t>(v.x), static_cast<half_t>(v.y)};
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uchar2 make_uchar2(uchar x, uchar y) { return {x, y}; }
inline uint1 make_uint1(uint x) { return {x}; }
inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint __pack_half2(half_t x, half_t y) {
  half_t both[2] = {x, y};
  uint bits;
  memcpy(&bits, both, 4);
  return bits;
}

// FP8 with E bits of exponent: e4m3fn, which has no infinity, and e5m2.
template <int E> struct fp8_t {
  uchar bits;
  operator float() const {
    const int M = 7 - E, exponent = (bits & 0x7f) >> M, mantissa = bits & ((1 << M) - 1);
    const int largest = (1 << E) - 1, bias = (1 << (E - 1)) - 1;
    float value = exponent == 0 ? std::ldexp(mantissa, 1 - bias - M)
                                : std::ldexp((1 << M) + mantissa, exponent - bias - M);
    if (E == 4 ? (bits & 0x7f) == 0x7f : exponent == largest) value = mantissa ? NAN : INFINITY;
    return bits & 0x80 ? -value : value;
  }
  // The nearest, of two the even one; what is beyond the largest number becomes that.
  static fp8_t nearest(float value) {
    fp8_t best{0}, other;
    if (std::isnan(value)) return {0x7f};
    for (int code = 0; std::isfinite(static_cast<float>(other = {static_cast<uchar>(code)})); ++code) {
      float nearer = std::fabs(best - std::fabs(value)) - std::fabs(other - std::fabs(value));
      if (nearer > 0 || (nearer == 0 && code % 2 == 0)) best = other;
    }
    if (std::isinf(value)) best.bits = E == 4 ? 0x7e : 0x7b;
    return {static_cast<uchar>(best.bits | (std::signbit(value) ? 0x80 : 0))};
  }
};
using fp8_e4_t = fp8_t<4>;
using fp8_e5_t = fp8_t<5>;
struct fp8_e4_4_t { fp8_e4_t of[4]; };
struct fp8_e4_8_t { fp8_e4_t of[8]; };
struct fp8_e4_16_t { fp8_e4_t of[16]; };
struct fp8_e5_4_t { fp8_e5_t of[4]; };
struct fp8_e5_8_t { fp8_e5_t of[8]; };
struct fp8_e5_16_t { fp8_e5_t of[16]; };
struct fp8_e4_2_t { fp8_e4_t of[2]; };
struct fp8_e5_2_t { fp8_e5_t of[2]; };
using __nv_fp8x2_storage_t = ushort;
enum { __NV_E4M3, __NV_E5M2, __NV_SATFINITE };
inline half2 __tl_cvt_fp8x2_to_half2(ushort pair, int kind) {
  const uchar low = pair & 0xff, high = pair >> 8;
  if (kind == __NV_E4M3)
    return {static_cast<half_t>(float(fp8_e4_t{low})), static_cast<half_t>(float(fp8_e4_t{high}))};
  return {static_cast<half_t>(float(fp8_e5_t{low})), static_cast<half_t>(float(fp8_e5_t{high}))};
}
inline ushort __nv_cvt_float2_to_fp8x2(float2 pair, int, int kind) {
  if (kind == __NV_E4M3)
    return fp8_e4_t::nearest(pair.x).bits | fp8_e4_t::nearest(pair.y).bits << 8;
  return fp8_e5_t::nearest(pair.x).bits | fp8_e5_t::nearest(pair.y).bits << 8;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

struct Index { int x, y, z; };
inline Index threadIdx, blockIdx;
inline int warp() { return threadIdx.x / 32; }
inline int lane() { return threadIdx.x % 32; }

enum class Waits { kForWarp, kForBlock, kForEver, kApart };
struct Fiber {
  Waits waits;
  jmp_buf place;
};
inline Fiber fibers[1024];
inline jmp_buf scheduler;

[[gnu::noinline]] inline void wait(Waits waits) {
  Fiber& self = fibers[threadIdx.x];
  self.waits = waits;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}
inline void sync_warp() { wait(Waits::kForWarp); }
inline void __syncwarp() { sync_warp(); }
inline void __syncthreads() { wait(Waits::kForBlock); }

// What the threads of a warp or of the block show each other. Letters of two turns lie apart: who is
// a turn ahead cannot overwrite what another still reads, and so each turn needs one barrier.
template <void (*sync)()> struct Exchange {
  static inline uint64_t letters[2][1024][6];
  static inline uchar turns[1024];
  uint64_t (*shown)[6];

  template <class T> explicit Exchange(T mine) : shown(letters[turns[threadIdx.x] ^= 1]) {
    static_assert(sizeof(T) <= sizeof(*shown));
    memcpy(shown[threadIdx.x], &mine, sizeof(T));
    sync();
  }
  template <class T> T of(int thread) const {
    T value;
    memcpy(&value, shown[thread], sizeof(T));
    return value;
  }
};
using InWarp = Exchange<sync_warp>;
using InBlock = Exchange<__syncthreads>;

template <class T> T from_lane(T value, int source) {
  bool inside = source >= 0 && source < 32;
  return InWarp(value).template of<T>(warp() * 32 + (inside ? source : lane()));
}
template <class T> T __shfl_sync(uint, T v, int source, int) { return from_lane(v, source); }
template <class T> T __shfl_xor_sync(uint, T v, int d, int) { return from_lane(v, lane() ^ d); }
template <class T> T __shfl_up_sync(uint, T v, int d, int) { return from_lane(v, lane() - d); }
template <class T> T __shfl_down_sync(uint, T v, int d, int) { return from_lane(v, lane() + d); }
inline unsigned long long __ballot_sync(uint, bool predicate) {
  InWarp shown(predicate);
  unsigned long long votes = 0;
  for (int i = 0; i < 32; ++i)
    votes |= static_cast<unsigned long long>(shown.of<bool>(warp() * 32 + i)) << i;
  return votes;
}

inline int __popc(uint x) { return __builtin_popcount(x); }
inline int __clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint __byte_perm(uint x, uint y, uint selector) {
  uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint value = 0;
  for (int i = 0; i < 4; ++i)
    value |= static_cast<uint>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return value;
}
template <class T, class U> void AtomicAdd(T* p, U v, int = 0) {
  __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_RELAXED);
}
template <class T, class U> T AtomicAddRet(T* p, U v, int = 0) {
  return __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_RELAXED);
}
inline int atomicAdd(int* p, int value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T> T atomicOr(T* p, T bits) {
  return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED);
}
inline int atomicExch(int* p, int value) {
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}

namespace cutlass {
using half_t = _Float16;
}
template <> struct std::numeric_limits<half_t> {  // libstdc++ has it from C++23 on
  static half_t infinity() { return static_cast<half_t>(INFINITY); }
};
inline half_t __hmin(half_t a, half_t b) { return min(static_cast<float>(a), static_cast<float>(b)); }
inline half_t __hmax(half_t a, half_t b) { return max(static_cast<float>(a), static_cast<float>(b)); }

namespace tl {
enum class DataType { kFloat16, kFloat32 };
struct MaxOp { template <class T> T operator()(T a, T b) { return max(a, b); } };
struct MinOp { template <class T> T operator()(T a, T b) { return min(a, b); } };
struct SumOp { template <class T> T operator()(T a, T b) { return a + b; } };
struct BitOrOp { template <class T> T operator()(T a, T b) { return a | b; } };
template <class Op, class T> T warp_reduce(T value) {
  for (int d = 16; d > 0; d /= 2) value = Op()(value, from_lane(value, lane() ^ d));
  return value;
}
template <class T> T warp_reduce_max(T value) { return warp_reduce<MaxOp>(value); }
template <class T> T warp_reduce_min(T value) { return warp_reduce<MinOp>(value); }
template <class T> T warp_reduce_sum(T value) { return warp_reduce<SumOp>(value); }
template <class T> T warp_reduce_bitor(T value) { return warp_reduce<BitOrOp>(value); }

// A wide value filled with copies of a narrow one.
template <class To, class Unit> To broadcast(Unit unit) {
  To value;
  for (size_t at = 0; at < sizeof(To); at += sizeof(Unit))
    memcpy(reinterpret_cast<char*>(&value) + at, &unit, sizeof(Unit));
  return value;
}
template <class To> To from_uint1(uint1 bits) {
  To value;
  memcpy(&value, &bits, 4);
  return value;
}
template <class From> uint1 to_uint1(From value) {
  uint1 bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline __half2 max2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 min2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }

template <int threads> struct NamedBarrier {};
// Butterfly over the threads whose numbers differ in the bits from `scale` to `threads` / 2.
template <class Op, int threads, int scale, int offset, class Barrier> struct AllReduce {
  template <class T> static T run(T value, T* = nullptr) {
    for (int d = threads / 2; d >= scale; d /= 2)
      value = Op()(value, InBlock(value).template of<T>(threadIdx.x ^ d));
    return value;
  }
};

template <int bytes> void cp_async_gs(const void* to, const void* from) {
  memcpy(const_cast<void*>(to), from, bytes);
}
inline void cp_async_commit() {}
template <int> void cp_async_wait() {}

// ldmatrix of 8 x 8 matrices of halves: lane 8 i + r holds the address of row r of matrix i; lane l
// gets elements 2 (l % 4) and the next of row l / 4 of each matrix (of column l / 4 for trans).
template <int count, bool trans> void load_matrices(const void* row, void* registers) {
  InWarp rows(row);
  for (int i = 0; i < count; ++i) {
    half_t pair[2];
    for (int e = 0; e < 2; ++e) {
      int r = trans ? 2 * (lane() % 4) + e : lane() / 4;
      int c = trans ? lane() / 4 : 2 * (lane() % 4) + e;
      pair[e] = rows.of<const half_t*>(warp() * 32 + 8 * i + r)[c];
    }
    memcpy(static_cast<char*>(registers) + 4 * i, pair, 4);
  }
}
inline void ptx_ldmatrix_x2(const void* row, void* to) { load_matrices<2, false>(row, to); }
inline void ptx_ldmatrix_x4(const void* row, void* to) { load_matrices<4, false>(row, to); }
inline void ptx_ldmatrix_x4_trans(const void* row, void* to) { load_matrices<4, true>(row, to); }

// m16n8k16: with g = lane / 4, t = lane % 4, a holds rows g and g + 8 at k = 2t and 2t + 8, b holds
// column g at the same k, c holds rows g and g + 8 of columns 2t and 2t + 1.
template <DataType, DataType, DataType, int m, int n, int k, bool, bool>
void mma_sync(float* c, const uint* a, const uint* b) {
  static_assert(m == 16 && n == 8 && k == 16);
  struct Operands { float a[4][2], b[2][2]; } mine;
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) mine.a[i][e] = reinterpret_cast<const half_t*>(a)[2 * i + e];
  for (int i = 0; i < 2; ++i)
    for (int e = 0; e < 2; ++e) mine.b[i][e] = reinterpret_cast<const half_t*>(b)[2 * i + e];
  InWarp shown(mine);
  auto operands = [&](int of) -> const Operands& {
    return *reinterpret_cast<const Operands*>(shown.shown[warp() * 32 + of]);
  };
  for (int i = 0; i < 4; ++i) {
    int upper = i / 2, column = 2 * (lane() % 4) + i % 2;
    float sum = c[i];
    for (int t = 0; t < 4; ++t)
      for (int half = 0; half < 2; ++half)
        for (int e = 0; e < 2; ++e)
          sum += operands(lane() / 4 * 4 + t).a[half * 2 + upper][e] *
                 operands(column * 4 + t).b[half][e];
    c[i] = sum;
  }
}
}  // namespace tl

// fma.rn.sat: from 0 to 1, and 0 where it is NaN.
inline float fma_saturated(float a, float b, float c) {
  float sum = std::fma(a, b, c);
  return sum > 0 ? min(sum, 1.0f) : 0.0f;
}

// m16n8k128 of bits: with g = lane / 4, t = lane % 4, a holds the t-th words of rows g and g + 8, b
// that of column g, d rows g and g + 8 of columns 2t and 2t + 1.
inline void mma_b1(int* d, const uint* a, const uint* b) {
  struct Operands { uint a[2], b; };
  InWarp shown(Operands{{a[0], a[1]}, b[0]});
  for (int i = 0; i < 4; ++i) {
    int column = 2 * (lane() % 4) + i % 2;
    for (int t = 0; t < 4; ++t) {
      uint row = shown.of<Operands>(warp() * 32 + lane() / 4 * 4 + t).a[i / 2];
      d[i] += __popc(row & shown.of<Operands>(warp() * 32 + column * 4 + t).b);
    }
  }
}

alignas(1024) inline uchar buf_dyn_shmem[256 * 1024];

[[gnu::noinline]] inline void resume(int thread) {
  threadIdx = {thread, 0, 0};
  if (_setjmp(scheduler) == 0) _longjmp(fibers[thread].place, 1);
}

template <class Kernel> const Kernel* kernel_of_block;
template <class Kernel> void enter() {
  wait(Waits::kForBlock);
  (*kernel_of_block<Kernel>)();
  wait(Waits::kForEver);
}
template <class Kernel> [[gnu::noinline]] void start(int thread, char* stack, size_t stack_bytes) {
  threadIdx = {thread, 0, 0};
  InWarp::turns[thread] = InBlock::turns[thread] = 0;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  makecontext(&context, enter<Kernel>, 0);
  if (_setjmp(scheduler) == 0) setcontext(&context);
}

// What all of these threads wait for; kApart where that differs.
inline Waits what_all_wait_for(int first, int count) {
  for (int i = 1; i < count; ++i)
    if (fibers[first + i].waits != fibers[first].waits) return Waits::kApart;
  return fibers[first].waits;
}

// Runs the block whose fibers have started; false if they wait for each other, as where not all of
// them reach a barrier. Warps run one by one from barrier to barrier of the block, and lanes one by
// one from barrier to barrier of the warp: first to last, and the next time last to first. So where
// a barrier is missing, some thread comes too early.
inline bool run_block(int threads) {
  for (bool backwards = false;; backwards = !backwards) {
    for (int w = 0; w < threads; w += 32) {
      int first = backwards ? threads - 32 - w : w;
      bool lanes_backwards = backwards;
      do {
        for (int i = 0; i < 32; ++i) resume(first + (lanes_backwards ? 31 - i : i));
        lanes_backwards = !lanes_backwards;
      } while (what_all_wait_for(first, 32) == Waits::kForWarp);
    }
    Waits all = what_all_wait_for(0, threads);
    if (all != Waits::kForBlock) return all == Waits::kForEver;
  }
}

// False if a block's threads wait for each other.
template <class Kernel> bool run_grid(int grid_x, int grid_y, int grid_z, int threads, Kernel kernel) {
  constexpr size_t stack_bytes = 128 * 1024;
  char* stacks = static_cast<char*>(malloc(threads * stack_bytes));
  kernel_of_block<Kernel> = &kernel;
#ifdef __SSE__
  unsigned modes = _mm_getcsr();
  _mm_setcsr(modes | 0x8040);  // denormals are zeros, as with --use_fast_math
#endif
  bool ended = true;
  for (int z = 0; z < grid_z; ++z)
    for (int y = 0; y < grid_y; ++y)
      for (int x = 0; x < grid_x && ended; ++x) {
        blockIdx = {x, y, z};
        for (int t = 0; t < threads; ++t) start<Kernel>(t, stacks + t * stack_bytes, stack_bytes);
        ended = run_block(threads);
      }
#ifdef __SSE__
  _mm_setcsr(modes);
#endif
  free(stacks);
  return ended;
}
