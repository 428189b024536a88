// The interface in words, made from the declarations of gac_cpu.h themselves: what is written here by hand is no more
// than names. The Python side compares it with its own table when it loads the library.
#include <string>
#include <type_traits>

#include "gac_cpu.h"
#include "sketch.h"
#include "types.h"

namespace gac {
namespace {

constexpr int kVersion = 8;

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
  const auto& [a, b, c, d, e, f, g, h, i, j, k, l] = map;
  return format(a, b, c, d, e, f, g, h, i, j, k, l);
}
std::string format_of(const gac_sum& sum) {
  const auto& [a, b, c, d, e, f, g] = sum;
  return format(a, b, c, d, e, f, g);
}
std::string format_of(const gac_tokens& tokens) {
  const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q] = tokens;
  return format(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q);
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
  GAC_FUNCTION(gac_python_call)
  GAC_FUNCTION(gac_python_names)
  GAC_LINE("struct gac_sketch_map", format_of(gac_sketch_map{}))
  GAC_LINE("struct gac_sum", format_of(gac_sum{}))
  GAC_LINE("struct gac_tokens", format_of(gac_tokens{}))
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
