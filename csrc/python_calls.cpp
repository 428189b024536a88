// Function objects for Python: the plain calls of moments, pair_moments and mix_ without a line of Python.
//
// For small tensors the call is the cost, and most of it is asking each tensor a dozen questions from Python and handing
// the answers to ctypes. Here one call through DLPack's exchange interface answers them all (address, shape, strides,
// dtype, device; 50 ns), and the object that Python calls costs 15 ns where ctypes takes several hundred. The functions of
// Python's stable interface and the exchange interface come by address and have fixed layouts (python_api.h), so the
// library is still tied to no version of Python or torch.
//
// Whatever is not the plain case is passed on, with nothing done, to the Python function behind (`self` of the object),
// which makes the full checks and raises their errors.
#include <new>

#include "python_tensors.h"

namespace gac {
namespace python {

Python py;
Objects objects;
const Exchange* exchange;

namespace {

int64_t quick;  // elements up to which a call keeps the interpreter lock and the caller's thread

// Threads for that many elements; -1 with Python's error set.
int threads_for(int64_t elements) {
  if (elements <= quick) return 1;
  const Held count(py.call(objects.thread_count, nullptr));
  const long threads = count.get() ? py.as_long(count.get()) : -1;
  return threads < 0 ? -1 : static_cast<int>(threads);
}

// Calls work(threads), without the interpreter lock where there is much to do.
template <class Work>
int run(int64_t elements, int threads, Work&& work) {
  if (elements <= quick) return work(threads);
  void* const state = py.release_lock();
  const int code = work(threads);
  py.take_lock(state);
  return code;
}

// Each takes a call and sets its result (null with Python's error set), or returns false with nothing done.

bool moments(Object* argument, Object*& answer) {
  Tensors x;
  if (!read_list(argument, x)) return false;
  const int threads = threads_for(x.elements());
  double* out = nullptr;
  Held result(threads < 0 ? nullptr : new_result(2, out));
  if (!result.get()) return true;
  if (x.elements() > quick) x.hold();
  const int code = run(x.elements(), threads, [&](int count) {
    if (x.single()) return gac_moments_one(x.data(), x.packed(count), out);
    return gac_moments(x.rows(), x.count(), x.form(), 0, out, count);
  });
  if (code != GAC_OK) return false;
  answer = result.release();
  return true;
}

bool pair_moments(Object* first, Object* second, Object*& answer) {
  Tensors a, b;
  if (!read_pairs(first, second, a, b)) return false;
  const int threads = threads_for(a.elements());
  double* out = nullptr;
  Held result(threads < 0 ? nullptr : new_result(3, out));
  if (!result.get()) return true;
  if (a.elements() > quick) a.hold(), b.hold();
  const int code = run(a.elements(), threads, [&](int count) {
    if (a.single() && a.dtype() == b.dtype()) return gac_pair_moments_one(a.data(), b.data(), a.packed(count), out);
    return gac_pair_moments(a.rows(), b.rows(), a.count(), a.form() | b.form() << 4, 0, out, count);
  });
  if (code != GAC_OK) return false;
  answer = result.release();
  return true;
}

// Tells autograd that the tensors have been written. False with Python's error set.
bool increment_version(Object* written) {
  if (type_of(written) == objects.list) return Held(py.call(objects.increment_version, written, nullptr)).get();
  const Held tuple(py.tuple_new(1));
  if (!tuple.get() || py.tuple_set(tuple.get(), 0, counted(written))) return false;
  return Held(py.call(objects.increment_version, tuple.get(), nullptr)).get();
}

bool mix(Object* first, Object* second, Object* mu, bool with_moments, Object*& answer) {
  Tensors a, b;
  double weight = 0;
  if (!read_pairs(first, second, a, b) || !read_number(mu, weight)) return false;
  const int threads = threads_for(a.elements());
  double* out = nullptr;
  Held result(threads < 0 ? nullptr : with_moments ? new_result(3, out) : counted(objects.none));
  if (!result.get()) return true;
  if (a.elements() > quick) a.hold(), b.hold();
  const int code = run(a.elements(), threads, [&](int count) {
    if (a.single() && a.dtype() == b.dtype()) return gac_mix_one(a.data(), b.data(), a.packed(count), weight, out);
    return gac_mix(a.rows(), b.rows(), a.count(), a.form() | b.form() << 4, weight, out, count);
  });
  if (code != GAC_OK) return false;
  if (increment_version(first)) answer = result.release();
  return true;
}

// The only keyword argument, which is false where it is left out. False for calls of another form.
bool read_flag(Object* const* args, Size count, Object* names, Size positional, Object* name, bool& flag) {
  if (count != positional) return false;
  flag = false;
  if (!names) return true;
  if (py.tuple_size(names) != 1 || py.tuple_item(names, 0) != name) return false;
  const int truth = py.is_true(args[count]);
  if (truth < 0) py.clear_error();
  flag = truth > 0;
  return truth >= 0;
}

// The same call of the Python function behind.
Object* pass_on(Object* behind, Object* const* args, Size count, Object* names) {
  const Size named = names ? py.tuple_size(names) : 0;
  const Held positional(py.tuple_new(count)), keywords(named ? py.dict_new() : nullptr);
  if (!positional.get() || (named && !keywords.get())) return nullptr;
  for (Size k = 0; k < count; ++k)
    if (py.tuple_set(positional.get(), k, counted(args[k]))) return nullptr;
  for (Size k = 0; k < named; ++k)
    if (py.dict_set(keywords.get(), py.tuple_item(names, k), args[count + k])) return nullptr;
  return py.call_with(behind, positional.get(), keywords.get());
}

// Memory can run out only before anything is done: the function behind is then called, and says so if need be.
template <class Body>
Object* guarded(Object* behind, Object* const* args, Size count, Object* names, Body&& body) {
  Object* answer = nullptr;
  try {
    if (body(answer)) return answer;
  } catch (const std::bad_alloc&) {
  }
  return pass_on(behind, args, count, names);
}

Object* call_moments(Object* self, Object* const* args, Size count, Object* names) {
  return guarded(self, args, count, names, [&](Object*& answer) {
    bool each;
    return read_flag(args, count, names, 1, objects.per_tensor, each) && !each && moments(args[0], answer);
  });
}
Object* call_pair_moments(Object* self, Object* const* args, Size count, Object* names) {
  return guarded(self, args, count, names, [&](Object*& answer) {
    bool each;
    return read_flag(args, count, names, 2, objects.per_tensor, each) && !each &&
           pair_moments(args[0], args[1], answer);
  });
}
Object* call_mix(Object* self, Object* const* args, Size count, Object* names) {
  return guarded(self, args, count, names, [&](Object*& answer) {
    bool sums;
    return read_flag(args, count, names, 3, objects.moments, sums) && mix(args[0], args[1], args[2], sums, answer);
  });
}

Object* call_describe(Object* self, Object* const* args, Size count, Object* names) {
  return guarded(self, args, count, names, [&](Object*& answer) {
    std::vector<int64_t> numbers;
    if (count != 1 || names || !describe(args[0], numbers)) return false;
    answer = py.bytes_new(reinterpret_cast<const char*>(numbers.data()), static_cast<Size>(8 * numbers.size()));
    return true;
  });
}

MethodDef methods[] = {
    {"describe", call_describe, kFastCall, "describe(tensors)\n--\n\nA plain list in numbers; see __self__."},
    {"moments", call_moments, kFastCall, "moments(tensors, *, per_tensor=False)\n--\n\nThe plain calls; see __self__."},
    {"pair_moments", call_pair_moments, kFastCall,
     "pair_moments(a, b, *, per_tensor=False)\n--\n\nThe plain calls; see __self__."},
    {"mix_", call_mix, kFastCall, "mix_(a, b, mu, *, moments=False)\n--\n\nThe plain calls; see __self__."},
};

}  // namespace
}  // namespace python
}  // namespace gac

using namespace gac::python;

const char* gac_python_names(void) {
#define GAC_NAME(field, name, result, parameters) " " #name
#define GAC_FIELD(field) " " #field
  return "functions:" GAC_PYTHON_FUNCTIONS(GAC_NAME) "\nobjects:" GAC_PYTHON_OBJECTS(GAC_FIELD);
#undef GAC_NAME
#undef GAC_FIELD
}

gac_object* gac_python_call(const char* name, gac_object* behind, const void* functions, const void* kept,
                            const void* dlpack_exchange, int64_t most) {
  py = *static_cast<const Python*>(functions);
  exchange = static_cast<const Exchange*>(dlpack_exchange);
  quick = most;
  objects = *static_cast<const Objects*>(kept);
  Object* const* const all = static_cast<Object* const*>(kept);
  for (size_t k = 0; k < sizeof objects / sizeof(Object*); ++k) py.incref(all[k]);  // for good
  for (MethodDef& method : methods)
    if (!std::strcmp(method.name, name)) return py.new_function(&method, behind, nullptr);
  return counted(behind);
}
