// What of Python and torch the library calls: nothing of either is linked or included. gac_kernels/cpu/builtins.py hands
// over addresses, by the names and in the order of the two lists here, which it reads from gac_python_names().
#pragma once

#include "gac_cpu.h"
#include "types.h"

namespace gac {
namespace python {

using Object = gac_object;  // PyObject
using Size = intptr_t;
using Function = Object* (*)(Object* self, Object* const* args, Size count, Object* names);

struct MethodDef {  // PyMethodDef
  const char* name;
  Function function;
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x80 | 0x02;  // METH_FASTCALL | METH_KEYWORDS

// Functions of Python's stable interface: field, name in Python, result, parameters.
#define GAC_PYTHON_FUNCTIONS(X)                                                             \
  X(new_function, PyCFunction_NewEx, Object*, (MethodDef*, Object* self, Object* module))   \
  X(incref, Py_IncRef, void, (Object*))                                                     \
  X(decref, Py_DecRef, void, (Object*))                                                     \
  X(type, PyObject_Type, Object*, (Object*))                                                \
  X(call, PyObject_CallFunctionObjArgs, Object*, (Object*, ...)) /* ended by nullptr */     \
  X(call_with, PyObject_Call, Object*, (Object*, Object* tuple, Object* dict))              \
  X(list_size, PyList_Size, Size, (Object*))                                                \
  X(list_item, PyList_GetItem, Object*, (Object*, Size)) /* borrowed */                     \
  X(list_append, PyList_Append, int, (Object*, Object*))                                    \
  X(capsule_new, PyCapsule_New, Object*, (void*, const char*, void (*)(Object*)))           \
  X(capsule_pointer, PyCapsule_GetPointer, void*, (Object*, const char*))                   \
  X(tuple_new, PyTuple_New, Object*, (Size))                                                \
  X(tuple_set, PyTuple_SetItem, int, (Object*, Size, Object*)) /* takes the reference */    \
  X(tuple_size, PyTuple_Size, Size, (Object*))                                              \
  X(tuple_item, PyTuple_GetItem, Object*, (Object*, Size)) /* borrowed */                   \
  X(bytes_new, PyBytes_FromStringAndSize, Object*, (const char*, Size))                     \
  X(dict_new, PyDict_New, Object*, ())                                                      \
  X(dict_set, PyDict_SetItem, int, (Object*, Object*, Object*))                             \
  X(as_double, PyFloat_AsDouble, double, (Object*))                                         \
  X(as_long, PyLong_AsLong, long, (Object*))                                                \
  X(is_true, PyObject_IsTrue, int, (Object*))                                               \
  X(clear_error, PyErr_Clear, void, ())                                                     \
  X(release_lock, PyEval_SaveThread, void*, ())                                             \
  X(take_lock, PyEval_RestoreThread, void, (void*))

// Objects that are kept: types, functions of torch, and names of arguments, interned.
#define GAC_PYTHON_OBJECTS(X)                                \
  X(tensor) X(parameter) X(list) X(floating) X(none)         \
  X(is_neg) X(increment_version) X(thread_count)             \
  X(per_tensor) X(moments)

struct Python {
#define GAC_FIELD(field, name, result, parameters) result(*field) parameters;
  GAC_PYTHON_FUNCTIONS(GAC_FIELD)
#undef GAC_FIELD
};

struct Objects {
#define GAC_FIELD(field) Object* field;
  GAC_PYTHON_OBJECTS(GAC_FIELD)
#undef GAC_FIELD
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
constexpr int kDlCpu = 1, kDlFloat = 2, kDlBfloat = 4, kDlFloat8E4M3 = 10, kDlFloat8E5M2 = 12;

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

// What gac_python_call was given.
extern Python py;
extern Objects objects;
extern const Exchange* exchange;

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

inline Object* counted(Object* object) {
  py.incref(object);
  return object;
}

inline Object* type_of(Object* object) { return Held(py.type(object)).get(); }  // lives as long as the object does

}  // namespace python
}  // namespace gac
