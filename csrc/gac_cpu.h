// C interface of the CPU library. No torch, no Python: plain pointers and counts, loaded through ctypes.
//
// A list of n tensors is one int64 table of n columns ("tensor table"), row after row:
//   row 0  address of the first element
//   row 1  number of elements
//   row 2  dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64; where one list is read also 4 float8_e4m3fn, 5 float8_e5m2
//   row 3  elements of one contiguous run
//   row 4  distance between the starts of two runs, in elements
// A table's form says which rows it has: 1 all; 0 rows 0 to 2, every tensor is contiguous; 2 + dtype rows 0 and 1, every
// tensor is contiguous and of that dtype. Two tables come with form_a | form_b << 4.
//
// Every function returns 0, or one of the codes below. Sums are float64, taken over fixed chunks and combined in a
// fixed order: results do not depend on the number of threads.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define GAC_API extern "C" __declspec(dllexport)
#else
#define GAC_API extern "C" __attribute__((visibility("default")))
#endif

enum gac_code { GAC_OK = 0, GAC_NULL_POINTER = 1, GAC_NO_MEMORY = 2 };

// This interface in words, one line for each function, struct and order that the Python side repeats ("name: ..."), and
// a version, to be raised where a meaning changes and no line does. See interface.cpp; gac_kernels/cpu/library.py has
// the same table and refuses a library with another.
GAC_API const char* gac_interface(void);
// Limits the instruction sets: "portable", "avx2", "avx512", "neon", or "" for the best. Returns 0, or 1 when this CPU
// or this build lacks it (nothing changes then). Not to be called while an operation runs.
GAC_API int gac_select(const char* isa);
// Instruction set in use.
GAC_API const char* gac_isa(void);
// Where threads come from: "openmp" (the runtime already in the process, hence torch's own threads) or "pool".
GAC_API const char* gac_threading(void);
// For tests: 1 uses the library's own pool even where an OpenMP runtime is there, 0 does not.
GAC_API void gac_prefer_pool(int pool);

// out: [2] or, per_tensor, [n, 2]: sum of squares, count of non-finite elements.
GAC_API int gac_moments(const int64_t* table, int64_t n, int form, int per_tensor, double* out, int threads);
// The same for one contiguous tensor. packed = numel << 16 | threads << 4 | dtype (fewer arguments: ctypes charges each).
GAC_API int gac_moments_one(const void* x, int64_t packed, double* out);

// out: [3] or, per_tensor, [n, 3]: |a|^2, |b|^2, <a, b>.
GAC_API int gac_pair_moments(const int64_t* a, const int64_t* b, int64_t n, int form, int per_tensor, double* out,
                             int threads);
// The same for two contiguous tensors of one dtype.
GAC_API int gac_pair_moments_one(const void* a, const void* b, int64_t packed, double* out);

// a <- mu*a + (1-mu)*b. out: [3] of the values before the update, or null.
GAC_API int gac_mix(const int64_t* a, const int64_t* b, int64_t n, int form, double mu, double* out, int threads);
GAC_API int gac_mix_one(void* a, const void* b, int64_t packed, double mu, double* out);

// The linear map of gac_kernels/layout.py. pieces is a table of n columns: region's first bucket, region's first sign
// index, elements of the region, start of the piece within the region, region's first cell.
//
// With total, each tensor fills its region, each another, and out is a float32 vector of what buckets held before: with
// delta = scale * (float32 sum - out), total += delta and out <- the sum. The squares of delta over each 128 lanes of a
// slab are added to moments + 2, from the region's first cell on. per_tensor is then 0.
struct gac_sketch_map {
  int64_t lanes;
  int64_t rows_per_slab;
  uint64_t seed;  // low 32 bits count
  double scale;
  void* out;
  float* total;        // or null
  int64_t out_size;    // elements of out
  int64_t used;        // elements of out that the layout covers; the rest is zeroed when overwriting
  int32_t out_double;  // 0: float32, 1: float64
  int32_t accumulate;  // 1: add to the buckets
  int32_t per_tensor;  // moments: [2] or [n, 2]
  int32_t add;         // 1: add to the moments
  int32_t fresh;       // bits: 1, total counts as 0 before; 2, out does
};
GAC_API int gac_sketch(const int64_t* table, const int64_t* pieces, int64_t n, int form,
                       const struct gac_sketch_map* map, double* moments, int threads);
// A table `seconds` of dtype 6 holds scales: of a contiguous x, element i counts as x[i] * 2^(seconds[i / 32] - 127), 255
// being NaN; where its tensor has no elements, x counts as it is. Float32 arithmetic, float64 where out is.
// The same of x / (sqrt(v) + eps), v the elements of the table `seconds` (as many in each tensor). form: form_a | form_b << 4.
// A finite x counts as 0 where v is 0. Float32 arithmetic, float64 where a tensor or out is. eps is 0 or a normal number
// of float32.
GAC_API int gac_sketch_weighted(const int64_t* table, const int64_t* seconds, const int64_t* pieces, int64_t n, int form,
                                const struct gac_sketch_map* map, double eps, double* moments, int threads);

// One row of sums for each of `rows` sequences of `length` tokens, see reference.token_moments. Strides in elements.
struct gac_tokens {
  int64_t rows, length;
  const void* logprobs;
  int64_t logprobs_row, logprobs_col;
  const void* advantages;
  int64_t advantages_row, advantages_col;
  const void* mask;
  int64_t mask_row, mask_col;
  const uint8_t* is_expert;
  int64_t is_expert_row;
  int32_t logprobs_dtype, advantages_dtype;
  int32_t mask_bytes;  // bytes of one element: 1, 2, 4 or 8
  int32_t mask_float;  // 1: the sign bit does not count (minus zero is zero)
};
GAC_API int gac_token_moments(const struct gac_tokens* tokens, double* out, int threads);

// delta = scale * (current - previous); total += delta; previous <- current. out: a sum of squares for each 1024, set or,
// with add, added to.
GAC_API int gac_absorb(const float* current, float* previous, float* total, int64_t m, double scale, double* out, int add,
                       int threads);

// total[offsets[k] + i] += scale * x_k[i] for each tensor k of the list; no two stretches overlap. Of a table `seconds`, if
// not null, x counts as x / (sqrt(v) + eps), or scaled, as above. Where total is null nothing is added. With previous, x - previous is added, and previous <- x; x is rounded
// to float32 before either. moments: squares of what was added, before scale, and non-finite x.
struct gac_sum {
  const int64_t* offsets;
  float* total;     // or null
  float* previous;  // or null
  double scale;
  double eps;
  int32_t per_tensor;  // moments: [2] or [n, 2]
  int32_t add;         // 1: add to the moments
  int32_t fresh;       // bits: 1, total counts as 0 before; 2, previous does
};
GAC_API int gac_accumulate(const int64_t* table, const int64_t* seconds, int64_t n, int form, const struct gac_sum* sum,
                           double* moments, int threads);

// Where numbers of a step lie: of its sums ...
enum gac_sums {
  GAC_POWER = 0,
  GAC_TOKENS = 2,
  GAC_COUNTS = 4,
  GAC_NONFINITE = 6,
  GAC_SILENT = 7,
  GAC_NORMS = 8,
  GAC_TIME_NOISE = 11,
  GAC_STEP_SUMS = 13  // how many
};
// ... of its state ...
enum gac_state {
  GAC_ROW_RAW = 1,
  GAC_ROW_SKIPPED = 4,
  GAC_MU = 20,
  GAC_MOVED = 21,
  GAC_ALPHA = 22,
  GAC_KL = 23,
  GAC_LAST = 24,  // then level, average and count, 4 each
  GAC_WAITING = 40,
  GAC_UNSETTLED = 43,
  GAC_MUS = 46,
  GAC_EVIDENCE = 48,
  GAC_AVERAGES = 50,
  GAC_SQUARES = 62,
  GAC_STATE = 80  // how many
};
// ... and of the law's options. gac_kernels/step_vector.py has the same, and says what each number is.
enum gac_options {
  GAC_CAP = 0,
  GAC_MU_MIN,
  GAC_MU_MAX,
  GAC_NOISE,
  GAC_FORGET,
  GAC_PRIOR_WEIGHT,
  GAC_PRIOR_SD,
  GAC_UNKNOWN_WEIGHT,
  GAC_KL_TARGET,
  GAC_KL_DECAY,
  GAC_HYSTERESIS,
  GAC_ETA_UP,
  GAC_ETA_DOWN,
  GAC_ALPHA_MIN,
  GAC_ALPHA_MAX,
  GAC_SURPRISE,
  GAC_RATES,  // and shares, alternating
  GAC_OPTIONS = 20  // how many
};

// Sums of a step: out[GAC_STEP_SUMS], 0 for what is not found here. Rows that were read are cleared on the way.
struct gac_step {
  const float* sft;  // both branches' totals, m floats each
  const float* rl;
  double* rows;      // of each contribution: squares and non-finite elements as read, then `cells` parts of its square
  const double* told;  // of each contribution: 0 for SFT and 1 for RL, tokens, squared scale
  int64_t m;
  int64_t stride;         // numbers of a row
  int64_t contributions;
  int64_t used;           // rows in which something may stand, at least `contributions`
  int64_t cells;
  int32_t lossless;  // 1: a contribution's square is the first number of its row, times its squared scale
  int32_t clear;     // 1: these rows become 0
};
GAC_API int gac_step_sums(const struct gac_step* step, double* out, int threads);

// The state of law and statistics after a step, in place, and the weights of the next one.
struct gac_ending {
  const double* source;   // sums of the step, or ten statistics; null: it measured none
  double* state;          // [GAC_STATE]
  const double* table;    // [1025, 3]: by the number of measurements, weights of averages and factor of an error
  const double* options;  // [GAC_OPTIONS]
  float* weights;         // [4], of the next step: mu, 1 - mu, and what undoes them
  double alpha;           // counts unless follows_kl
  double prior;           // NaN: none
  double kl;
  int64_t passed;          // steps before this one in which nothing was measured or told
  int32_t averages;        // that the law keeps, 1 or 2
  int32_t from_statistics;
  int32_t follows_kl;
  int32_t prior_is_tensor;  // it is clipped to [0, 1], and counts as mu where it is not finite
  int32_t present;          // bit k: branch k had a weight above 0 ...
  int32_t lone;             // ... and noise from time
};
GAC_API int gac_step_end(const struct gac_ending* ending);

// A new function object for Python that takes the plain calls of an operation: "moments", "pair_moments" or "mix_"; or
// "describe", which makes the bytes of int64 numbers of a list of contiguous tensors on one device: the dtype of all or -1,
// then their table of form 0.
// Other calls it passes on to the callable `behind`, which is also what is returned for another name. Called with the
// interpreter lock held; see python_calls.cpp and gac_kernels/cpu/builtins.py. functions, objects: the addresses that
// gac_python_names() lists. exchange: a DLPackExchangeAPI of version 1.3 or a later 1.x. quick: elements up to which a
// call runs on the caller's thread with the lock held.
struct gac_object;  // PyObject
GAC_API struct gac_object* gac_python_call(const char* name, struct gac_object* behind, const void* functions,
                                           const void* objects, const void* exchange, int64_t quick);
// "functions: ..." and, on a second line, "objects: ...": names, in order, of what gac_python_call takes.
GAC_API const char* gac_python_names(void);

// Hooks that add gradients as they arrive, see arriving.cpp and gac_kernels/cpu/arriving.py. Called with the interpreter lock
// held, once gac_python_call has been. A new handle; `accumulated`: a list that parameters are put on whose gradients were
// not added. None where memory has run out.
GAC_API struct gac_object* gac_arriving_new(struct gac_object* accumulated);
// The hooks of a parameter: a tuple of that on its incoming gradient and that after its accumulation. came: a list that
// gradients are put on that were not added. region, offset, numel: where in the totals its elements are.
GAC_API struct gac_object* gac_arriving_hooks(struct gac_object* handle, struct gac_object* came, int64_t region,
                                              int64_t offset, int64_t numel);
struct gac_adding {
  float* total;
  uint8_t* fresh;  // of each region, 1: its stretch of the total counts as 0 before, and then 0; or null
  double scale;
  int64_t quick;   // elements up to which a gradient is added on the caller's thread, with the lock held
  int32_t threads;  // of larger ones
  int32_t own_time;  // 1: seconds are those of the processor in this thread, where the system tells them
};
// total[offset + i] += scale * x[i] of each gradient x that comes before the end.
GAC_API void gac_arriving_begin(struct gac_object* handle, const struct gac_adding* told);
// How many parameters' gradients were added; -1 where some came more than once, or of another pass. What was added stays.
GAC_API int64_t gac_arriving_end(struct gac_object* handle, double* seconds);
// Squares and non-finite elements of what was added: added to into[2], and each in the order in which they came, with its
// region. Any may be null.
GAC_API void gac_arriving_sums(struct gac_object* handle, double* into, double* each, int64_t* regions);
