// Plain tensors, read from Python's objects and handed back as such. Called with the interpreter lock held.
#pragma once

#include <vector>

#include "python_api.h"

namespace gac {
namespace python {

// A contiguous CPU tensor of a plain type.
struct Plain {
  char* data;
  int64_t numel;
  int dtype, dimensions;
  const int64_t* shape;
};

// False for what is no such tensor. Subclasses are not: their memory may not be their own.
bool read(Object* object, Plain& tensor);

// A list of contiguous tensors of plain types on one device, in numbers: dtype of all or -1, then the table of gac_cpu.h of
// form 0. False for any other list.
bool describe(Object* list, std::vector<int64_t>& numbers);

// One tensor, or the tensors of a list: the table of gac_cpu.h. Holds references while the interpreter lock is away,
// when other threads may change the list.
class Tensors {
 public:
  ~Tensors() {
    for (Object* object : held_) py.decref(object);
  }

  bool open(Object* argument);  // false when the list is empty
  bool add(Size k, Plain& tensor);
  void hold();

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

// False when any is not plain, or the list is empty.
bool read_list(Object* argument, Tensors& tensors);
// Two lists, or two tensors, that pair up in shape.
bool read_pairs(Object* first, Object* second, Tensors& a, Tensors& b);
// The number of a float or of a 0-dim float tensor.
bool read_number(Object* argument, double& number);

// A float64 tensor of `width` numbers, to be written at `out`. Null with Python's error set.
Object* new_result(int width, double*& out);

}  // namespace python
}  // namespace gac
