// The interface in words, made from the declarations of gac_cpu.h themselves: what is written here by hand is no more
// than names. The Python side compares it with its own table when it loads the library.
#include <initializer_list>
#include <string>
#include <type_traits>

#include "gac_cpu.h"
#include "sketch.h"
#include "types.h"

namespace gac {
namespace {

constexpr int kVersion = 10;

// A type as the tables spell it.
template <class T>
struct Name;
#define GAC_TYPE(type, text)                  \
  template <>                                 \
  struct Name<type> {                         \
    static std::string get() { return text; } \
  };
GAC_TYPE(void, "void")
GAC_TYPE(char, "char")
GAC_TYPE(int, "int")
GAC_TYPE(int64_t, "int64")
GAC_TYPE(float, "float")
GAC_TYPE(double, "double")
GAC_TYPE(gac_sketch_map, "gac_sketch_map")
GAC_TYPE(gac_sum, "gac_sum")
GAC_TYPE(gac_tokens, "gac_tokens")
GAC_TYPE(gac_step, "gac_step")
GAC_TYPE(gac_ending, "gac_ending")
GAC_TYPE(gac_adding, "gac_adding")
GAC_TYPE(gac_object, "object")
#undef GAC_TYPE
template <class T>
struct Name<const T> {
  static std::string get() { return "const " + Name<T>::get(); }
};
template <class T>
struct Name<T*> {
  static std::string get() { return Name<T>::get() + "*"; }
};

// "result(parameter, ...)"
template <class Result, class... Parameters>
std::string signature(Result (*)(Parameters...)) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + Name<Parameters>::get()), ...);
  return Name<Result>::get() + "(" + text + ")";
}

// A field's character in a format of Python's struct module.
template <class T>
constexpr char code() {
  if (std::is_pointer_v<T>) return 'P';
  if (std::is_same_v<T, double>) return 'd';
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, double> || std::is_same_v<T, int32_t> ||
                std::is_same_v<T, int64_t> || std::is_same_v<T, uint64_t>);
  return std::is_same_v<T, int32_t> ? 'i' : std::is_same_v<T, int64_t> ? 'q' : 'Q';
}

template <class... Fields>
std::string format(const Fields&...) {
  return {code<Fields>()...};
}

// These do not compile when a field comes or goes.
std::string format_of(const gac_sketch_map& map) {
  const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m] = map;
  return format(a, b, c, d, e, f, g, h, i, j, k, l, m);
}
std::string format_of(const gac_sum& sum) {
  const auto& [a, b, c, d, e, f, g, h] = sum;
  return format(a, b, c, d, e, f, g, h);
}
std::string format_of(const gac_tokens& tokens) {
  const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q] = tokens;
  return format(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q);
}
std::string format_of(const gac_step& step) {
  const auto& [a, b, c, d, e, f, g, h, i, j, k] = step;
  return format(a, b, c, d, e, f, g, h, i, j, k);
}
std::string format_of(const gac_ending& ending) {
  const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o] = ending;
  return format(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o);
}
std::string format_of(const gac_adding& adding) {
  const auto& [a, b, c, d, e, f] = adding;
  return format(a, b, c, d, e, f);
}

// Places, as numbers with blanks between them.
std::string places(std::initializer_list<int> numbers) {
  std::string text;
  for (int number : numbers) text += (text.empty() ? "" : " ") + std::to_string(number);
  return text;
}

std::string interface() {
  std::string text = "version: " + std::to_string(kVersion);
#define GAC_LINE(name, value) text += std::string("\n" name ": ") + (value);
#define GAC_FUNCTION(name) GAC_LINE(#name, signature(name))
  GAC_FUNCTION(gac_interface)
  GAC_FUNCTION(gac_select)
  GAC_FUNCTION(gac_isa)
  GAC_FUNCTION(gac_threading)
  GAC_FUNCTION(gac_prefer_pool)
  GAC_FUNCTION(gac_moments)
  GAC_FUNCTION(gac_moments_one)
  GAC_FUNCTION(gac_pair_moments)
  GAC_FUNCTION(gac_pair_moments_one)
  GAC_FUNCTION(gac_mix)
  GAC_FUNCTION(gac_mix_one)
  GAC_FUNCTION(gac_sketch)
  GAC_FUNCTION(gac_sketch_weighted)
  GAC_FUNCTION(gac_token_moments)
  GAC_FUNCTION(gac_absorb)
  GAC_FUNCTION(gac_accumulate)
  GAC_FUNCTION(gac_step_sums)
  GAC_FUNCTION(gac_step_end)
  GAC_FUNCTION(gac_python_call)
  GAC_FUNCTION(gac_python_names)
  GAC_FUNCTION(gac_arriving_new)
  GAC_FUNCTION(gac_arriving_hooks)
  GAC_FUNCTION(gac_arriving_begin)
  GAC_FUNCTION(gac_arriving_end)
  GAC_FUNCTION(gac_arriving_sums)
  GAC_LINE("struct gac_sketch_map", format_of(gac_sketch_map{}))
  GAC_LINE("struct gac_sum", format_of(gac_sum{}))
  GAC_LINE("struct gac_tokens", format_of(gac_tokens{}))
  GAC_LINE("struct gac_step", format_of(gac_step{}))
  GAC_LINE("struct gac_ending", format_of(gac_ending{}))
  GAC_LINE("struct gac_adding", format_of(gac_adding{}))
  GAC_LINE("sums of a step", places({GAC_POWER, GAC_TOKENS, GAC_COUNTS, GAC_NONFINITE, GAC_SILENT, GAC_NORMS,
                                     GAC_TIME_NOISE, GAC_STEP_SUMS}))
  GAC_LINE("state after a step",
           places({0, GAC_MU, GAC_MOVED, GAC_ALPHA, GAC_KL, GAC_LAST, GAC_LAST + 4, GAC_LAST + 8, GAC_LAST + 12,
                   GAC_WAITING, GAC_UNSETTLED, GAC_MUS, GAC_EVIDENCE, GAC_AVERAGES, GAC_SQUARES, GAC_STATE}))
  GAC_LINE("raw and skipped in its row", places({GAC_ROW_RAW, GAC_ROW_SKIPPED}))
  GAC_LINE("options of the law",
           places({GAC_CAP, GAC_MU_MIN, GAC_MU_MAX, GAC_NOISE, GAC_FORGET, GAC_PRIOR_WEIGHT, GAC_PRIOR_SD,
                   GAC_UNKNOWN_WEIGHT, GAC_KL_TARGET, GAC_KL_DECAY, GAC_HYSTERESIS, GAC_ETA_UP, GAC_ETA_DOWN,
                   GAC_ALPHA_MIN, GAC_ALPHA_MAX, GAC_SURPRISE, GAC_RATES, GAC_OPTIONS}))
  const char* dtypes[kDtypes] = {};
  dtypes[kFloat32] = "float32", dtypes[kBFloat16] = "bfloat16";
  dtypes[kFloat16] = "float16", dtypes[kFloat64] = "float64";
  dtypes[kFloat8E4M3] = "float8_e4m3fn", dtypes[kFloat8E5M2] = "float8_e5m2";
  text += "\ndtypes:";
  for (const char* dtype : dtypes) text += std::string(" ") + dtype;
  GAC_LINE("dtypes of two lists", std::to_string(kPaired))
  GAC_LINE("dtype of scales, elements of each", std::to_string(kScale) + " " + std::to_string(kScaled))
  GAC_LINE("elements of a sum of absorb_", std::to_string(kAbsorbCell))
  GAC_LINE("lanes of a sum of absorb_sketch_", std::to_string(kCellLanes))
#undef GAC_FUNCTION
#undef GAC_LINE
  return text;
}

}  // namespace
}  // namespace gac

const char* gac_interface(void) {
  static const std::string text = gac::interface();
  return text.c_str();
}
