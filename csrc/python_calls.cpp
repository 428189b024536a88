// Function objects for Python: the plain calls of moments, pair_moments and mix_ without a line of Python.
//
// For small tensors the call is the cost, and most of it is asking each tensor a dozen questions from Python and handing
// the answers to ctypes. Here one call through DLPack's exchange interface answers them all (address, shape, strides,
// dtype, device; 50 ns), and the object that Python calls costs 15 ns where ctypes takes several hundred. Nothing is
// linked or included: gac_kernels/cpu/builtins.py hands over the addresses of functions of Python's stable interface and
// of the exchange interface, whose layouts are fixed and repeated here, so the library is still tied to no version of
// Python or torch.
//
// Whatever is not the plain case is passed on, with nothing done, to the Python function behind (`self` of the object),
// which makes the full checks and raises their errors.
#include <new>
#include <vector>

#include "gac_cpu.h"
#include "types.h"

namespace gac {
namespace {

struct Object;  // PyObject
using Size = intptr_t;
using Function = Object* (*)(Object* self, Object* const* args, Size count, Object* names);

struct MethodDef {  // PyMethodDef
  const char* name;
  Function function;
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x80 | 0x02;  // METH_FASTCALL | METH_KEYWORDS

struct Python {  // in the order of builtins.py's _FUNCTIONS
  Object* (*new_function)(MethodDef*, Object* self, Object* module);
  void (*incref)(Object*);
  void (*decref)(Object*);
  Object* (*type)(Object*);
  Object* (*call)(Object*, ...);  // arguments end with nullptr
  Object* (*call_with)(Object*, Object* tuple, Object* dict);
  Size (*list_size)(Object*);
  Object* (*list_item)(Object*, Size);  // borrowed
  Object* (*tuple_new)(Size);
  int (*tuple_set)(Object*, Size, Object*);  // takes the reference
  Size (*tuple_size)(Object*);
  Object* (*tuple_item)(Object*, Size);  // borrowed
  Object* (*dict_new)();
  int (*dict_set)(Object*, Object*, Object*);
  double (*as_double)(Object*);
  long (*as_long)(Object*);
  int (*is_true)(Object*);
  void (*clear_error)();
  void* (*release_lock)();
  void (*take_lock)(void*);
};

struct Objects {  // in the order of builtins.py's _OBJECTS
  Object *tensor, *parameter, *list, *floating, *none;
  Object *is_neg, *increment_version, *thread_count;
  Object *per_tensor, *moments;  // names of arguments, interned
};

// DLPack 1.3: DLTensor, DLManagedTensorVersioned and DLPackExchangeAPI.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int kDlCpu = 1, kDlFloat = 2, kDlBfloat = 4;

struct DlManaged {
  uint32_t major, minor;
  void* context;
  void (*destroy)(DlManaged*);
  uint64_t flags;
  DlTensor tensor;
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void *allocate, *export_tensor;
  int (*import_tensor)(DlManaged*, Object**);  // takes the memory. Both: -1 with Python's error set
  int (*describe)(Object*, DlTensor*);         // borrows
};

Python py;
Objects objects;
const Exchange* exchange;
int64_t quick;  // elements up to which a call keeps the interpreter lock and the caller's thread

// A reference that is held.
class Held {
 public:
  explicit Held(Object* object = nullptr) : object_(object) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (object_) py.decref(object_);
  }
  Object* get() const { return object_; }
  Object* release() {
    Object* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  Object* object_;
};

Object* counted(Object* object) {
  py.incref(object);
  return object;
}

Object* type_of(Object* object) { return Held(py.type(object)).get(); }  // lives as long as the object does

// A contiguous CPU tensor of a plain type.
struct Plain {
  char* data;
  int64_t numel;
  int dtype, dimensions;
  const int64_t* shape;
};

// Asks for the first elements while the call still gets ready, which saves 2 to 4% where 1 K of them are in no cache.
void ask_ahead(const Plain& tensor) {
#if defined(__GNUC__) || defined(__clang__)
  const int64_t bytes = tensor.numel * bytes_of(tensor.dtype);
  for (int64_t k = 0; k < bytes && k < 1024; k += 64) __builtin_prefetch(tensor.data + k);
#endif
}

int dtype_of(const DlTensor& t) {
  if (t.lanes != 1) return -1;
  if (t.code == kDlBfloat) return t.bits == 16 ? kBFloat16 : -1;
  if (t.code != kDlFloat) return -1;
  return t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : -1;
}

// False for what is no such tensor. Subclasses are not: their memory may not be their own.
bool read(Object* object, Plain& tensor) {
  Object* const type = type_of(object);
  if (type != objects.tensor && type != objects.parameter) return false;
  DlTensor t;
  if (exchange->describe(object, &t)) {  // no memory (meta), no strides (sparse), wrapped by functorch, ...
    py.clear_error();
    return false;
  }
  const int dtype = dtype_of(t);
  if (dtype < 0 || t.device_type != kDlCpu || (t.dimensions && !t.strides)) return false;
  int64_t numel = 1;
  bool contiguous = true;
  for (int k = t.dimensions - 1; k >= 0; --k) {
    if (t.shape[k] != 1 && t.strides[k] != numel) contiguous = false;
    numel *= t.shape[k];
  }
  if (!contiguous && numel) return false;
  if (numel == 1) {  // a lazily negated view of this size counts as contiguous
    const Held negated(py.call(objects.is_neg, object, nullptr));
    if (!negated.get()) py.clear_error();
    if (!negated.get() || py.is_true(negated.get())) return false;
  }
  tensor = {static_cast<char*>(t.data) + t.byte_offset, numel, dtype, t.dimensions, t.shape};
  ask_ahead(tensor);
  return true;
}

bool same_shape(const Plain& a, const Plain& b) {
  if (a.dimensions != b.dimensions) return false;
  for (int k = 0; k < a.dimensions; ++k)
    if (a.shape[k] != b.shape[k]) return false;
  return true;
}

// One tensor, or the tensors of a list: the table of gac_cpu.h. Holds references while the interpreter lock is away,
// when other threads may change the list.
class Tensors {
 public:
  ~Tensors() {
    for (Object* object : held_) py.decref(object);
  }

  // False when any is not plain, or the list is empty.
  bool open(Object* argument) {
    list_ = type_of(argument) == objects.list ? argument : nullptr;
    one_ = argument;
    count_ = list_ ? py.list_size(list_) : 1;
    rows_ = first_;
    if (count_ > 1) {
      many_.resize(3 * count_);
      rows_ = many_.data();
    }
    return count_ > 0;
  }
  bool add(Size k, Plain& tensor) {
    Object* const object = list_ ? py.list_item(list_, k) : one_;
    if (!object) py.clear_error();  // the list has shrunk
    if (!object || !read(object, tensor)) return false;
    rows_[k] = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.data));
    rows_[count_ + k] = tensor.numel;
    rows_[2 * count_ + k] = tensor.dtype;
    alike_ = alike_ && tensor.dtype == rows_[2 * count_];
    elements_ += tensor.numel;
    return true;
  }
  void hold() {
    held_.reserve(count_);
    for (Size k = 0; k < count_; ++k) {
      Object* const object = list_ ? py.list_item(list_, k) : one_;
      if (object) held_.push_back(counted(object));
    }
    py.clear_error();
  }

  Size count() const { return count_; }
  int64_t elements() const { return elements_; }
  const int64_t* rows() const { return rows_; }
  int form() const { return alike_ ? 2 + dtype() : 0; }
  int dtype() const { return static_cast<int>(rows_[2 * count_]); }
  void* data() const { return reinterpret_cast<void*>(static_cast<intptr_t>(rows_[0])); }
  bool single() const { return count_ == 1; }
  int64_t packed(int threads) const { return elements_ << 16 | threads << 4 | dtype(); }  // of a single one

 private:
  Object *list_ = nullptr, *one_ = nullptr;
  Size count_ = 0;
  int64_t elements_ = 0, first_[3] = {};
  int64_t* rows_ = first_;
  bool alike_ = true;
  std::vector<int64_t> many_;
  std::vector<Object*> held_;
};

bool read_list(Object* argument, Tensors& tensors) {
  if (!tensors.open(argument)) return false;
  Plain tensor;
  for (Size k = 0; k < tensors.count(); ++k)
    if (!tensors.add(k, tensor)) return false;
  return true;
}

// Two lists, or two tensors, that pair up in shape.
bool read_pairs(Object* first, Object* second, Tensors& a, Tensors& b) {
  if (!a.open(first) || !b.open(second) || a.count() != b.count()) return false;
  Plain x, y;
  for (Size k = 0; k < a.count(); ++k)
    if (!a.add(k, x) || !b.add(k, y) || !same_shape(x, y)) return false;
  return true;
}

// The memory of a result, handed to torch, which then makes a tensor of it in half the time of torch.empty.
struct Result {
  DlManaged managed;
  double sums[3];
  int64_t shape, stride;
};

// A float64 tensor of `width` numbers, to be written at `out`. Null with Python's error set.
Object* new_result(int width, double*& out) {
  Result* const r = new Result{};
  r->shape = width;
  r->stride = 1;
  r->managed = {1, 0, r, [](DlManaged* m) { delete static_cast<Result*>(m->context); }, 0,
                {r->sums, kDlCpu, 0, 1, kDlFloat, 64, 1, &r->shape, &r->stride, 0}};
  Object* tensor = nullptr;
  if (exchange->import_tensor(&r->managed, &tensor)) return nullptr;
  out = r->sums;
  return tensor;
}

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

// The number of a float or of a 0-dim float tensor.
bool read_number(Object* argument, double& number) {
  if (type_of(argument) == objects.floating) {
    number = py.as_double(argument);
    return true;
  }
  Plain tensor;
  if (!read(argument, tensor) || tensor.dimensions) return false;
  switch (tensor.dtype) {
    case kFloat32: number = *reinterpret_cast<const float*>(tensor.data); break;
    case kBFloat16: number = to_double(*reinterpret_cast<const bf16*>(tensor.data)); break;
    case kFloat16: number = to_double(*reinterpret_cast<const fp16*>(tensor.data)); break;
    default: number = *reinterpret_cast<const double*>(tensor.data);
  }
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

MethodDef methods[] = {
    {"moments", call_moments, kFastCall, "moments(tensors, *, per_tensor=False)\n--\n\nThe plain calls; see __self__."},
    {"pair_moments", call_pair_moments, kFastCall,
     "pair_moments(a, b, *, per_tensor=False)\n--\n\nThe plain calls; see __self__."},
    {"mix_", call_mix, kFastCall, "mix_(a, b, mu, *, moments=False)\n--\n\nThe plain calls; see __self__."},
};

}  // namespace
}  // namespace gac

using namespace gac;

void* gac_python_call(int which, void* behind, const void* functions, void* const* kept, const void* dlpack_exchange,
                      int64_t most) {
  py = *static_cast<const Python*>(functions);
  exchange = static_cast<const Exchange*>(dlpack_exchange);
  quick = most;
  std::memcpy(&objects, kept, sizeof objects);
  for (size_t k = 0; k < sizeof objects / sizeof(Object*); ++k) py.incref(static_cast<Object*>(kept[k]));  // for good
  return py.new_function(&methods[which], static_cast<Object*>(behind), nullptr);
}
