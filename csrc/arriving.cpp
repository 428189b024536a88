// Hooks for Python that add a parameter's gradient to a branch's total at the moment when it arrives: it is still in the
// cache then, and nobody has to keep it. A parameter has two, on its incoming gradient and after that was accumulated: what
// torch.autograd.grad asks for comes to the first alone, and is no contribution.
//
// Outside of gac_arriving_begin and gac_arriving_end, and for gradients that are not plain, they put on lists what comes.
// gac_kernels/cpu/arriving.py says what each call is for.
#include <algorithm>
#include <chrono>
#include <ctime>
#include <new>

#include "accumulate.h"
#include "python_tensors.h"

namespace gac {
namespace python {
namespace {

struct Slot;

// What the hooks of a model share. Freed with the last of them and of what Python holds.
struct Shared {
  int64_t references = 0;
  Object* accumulated = nullptr;  // a list: parameters, in order, whose gradients were not added
  gac_adding told = {};           // of the pass under way ...
  bool adding = false;            // ... if there is one
  bool unclear = false;           // gradients came whose pass cannot be told
  int64_t pass = 0;               // its number
  int64_t waiting = 0;            // gradients that came in it and were not accumulated yet
  double seconds = 0;             // spent in adding
  double sums[2] = {};            // squares and non-finite elements of what was added
  std::vector<Slot*> slots, order;  // all, and those added to in this pass
};

// A parameter.
struct Slot {
  Shared* shared = nullptr;
  Object* came = nullptr;      // a list: its incoming gradients that were not added
  Object* gradient = nullptr;  // what has come and was not accumulated yet, held
  int64_t region = 0, offset = 0, numel = 0;
  int64_t pass = 0;  // in which it was added to last
  double sums[2] = {};
  bool added() const { return pass == shared->pass; }
};

const char* const kShared = "gac_arriving";
const char* const kSlot = "gac_arriving_slot";

void drop(Object*& object) {
  Object* const old = object;
  object = nullptr;
  if (old) py.decref(old);
}

void release(Shared* shared) {
  if (--shared->references) return;
  drop(shared->accumulated);
  delete shared;
}

void free_shared(Object* capsule) {
  Shared* const shared = static_cast<Shared*>(py.capsule_pointer(capsule, kShared));
  shared->adding = false;  // the totals may go
  release(shared);
}

void free_slot(Object* capsule) {
  Slot* const slot = static_cast<Slot*>(py.capsule_pointer(capsule, kSlot));
  Shared* const shared = slot->shared;
  for (auto* list : {&shared->slots, &shared->order}) list->erase(std::remove(list->begin(), list->end(), slot), list->end());
  drop(slot->came);
  drop(slot->gradient);
  delete slot;
  release(shared);
}

Shared* shared_of(Object* handle) { return static_cast<Shared*>(py.capsule_pointer(handle, kShared)); }

// Calls work(threads), without the interpreter lock where there is much to do. The gradient is held meanwhile.
template <class Work>
void run(bool much, int threads, Work&& work) {
  if (!much) return work(1);
  void* const state = py.release_lock();
  try {
    work(threads);
  } catch (...) {
    py.take_lock(state);
    throw;
  }
  py.take_lock(state);
}

// Adds a plain gradient of the right size; false, with nothing done, for another.
bool add(Slot& slot, Object* gradient) {
  Shared& shared = *slot.shared;
  Plain tensor;
  if (slot.added() || !read(gradient, tensor) || tensor.numel != slot.numel) return false;
  const int64_t rows[3] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.data)), tensor.numel, tensor.dtype};
  const Table table(rows, 1, 0);
  if (!table.readable()) return false;
  const gac_adding& told = shared.told;
  uint8_t* const fresh = told.fresh ? told.fresh + slot.region : nullptr;
  const gac_sum sum = {&slot.offset, told.total, nullptr, told.scale, 0, 0, 0, fresh ? *fresh : 0};
  if (fresh) *fresh = 0;
  shared.order.push_back(&slot);
  slot.pass = shared.pass;
  run(slot.numel > told.quick, told.threads, [&](int threads) { accumulate(table, nullptr, sum, slot.sums, threads); });
  for (int w = 0; w < 2; ++w) shared.sums[w] += slot.sums[w];
  return true;
}

// Seconds on the clock that was asked for.
double seconds_now(const gac_adding& told) {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now;
  if (told.own_time && !clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)) return now.tv_sec + 1e-9 * now.tv_nsec;
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Object* none_or_error(int code) { return code ? nullptr : counted(objects.none); }

// Asks for the stretch of the total that is written as soon as the gradient has been accumulated: 5% of what GAC takes of
// the steps of a model of 343,000 parameters.
void ask_ahead(const Slot& slot) {
#if defined(__GNUC__) || defined(__clang__)
  const float* const stretch = slot.shared->told.total + slot.offset;
  const int64_t count = std::min(slot.numel, kChunk);
  for (int64_t k = 0; k < count; k += 16) __builtin_prefetch(stretch + k, 1);
#endif
}

Object* on_gradient(Object* self, Object* const* args, Size, Object*) {
  Slot& slot = *static_cast<Slot*>(py.capsule_pointer(self, kSlot));
  if (!slot.shared->adding) return none_or_error(py.list_append(slot.came, args[0]));
  if (slot.gradient || slot.added()) slot.shared->unclear = true;
  if (!slot.gradient) ++slot.shared->waiting;
  drop(slot.gradient);
  slot.gradient = counted(args[0]);
  ask_ahead(slot);
  return counted(objects.none);
}

Object* on_accumulated(Object* self, Object* const* args, Size, Object*) {
  Slot& slot = *static_cast<Slot*>(py.capsule_pointer(self, kSlot));
  Shared& shared = *slot.shared;
  if (!shared.adding) return none_or_error(py.list_append(shared.accumulated, args[0]));
  const Held gradient(slot.gradient);
  slot.gradient = nullptr;
  if (!gradient.get()) {
    shared.unclear = true;
    return counted(objects.none);
  }
  --shared.waiting;
  const double start = seconds_now(shared.told);
  bool added = false;
  try {
    added = add(slot, gradient.get());
  } catch (const std::bad_alloc&) {
    shared.unclear = true;
    return counted(objects.none);
  }
  shared.seconds += seconds_now(shared.told) - start;
  if (added) return counted(objects.none);
  if (py.list_append(slot.came, gradient.get())) return nullptr;
  return none_or_error(py.list_append(shared.accumulated, args[0]));
}

MethodDef of_gradient = {"on_gradient", on_gradient, kFastCall, "on_gradient(gradient)\n--\n\nA gradient comes."};
MethodDef of_parameter = {"on_accumulated", on_accumulated, kFastCall,
                          "on_accumulated(parameter)\n--\n\nIt was accumulated."};

}  // namespace
}  // namespace python
}  // namespace gac

using namespace gac::python;

gac_object* gac_arriving_new(gac_object* accumulated) {
  Shared* const shared = new (std::nothrow) Shared;
  Object* const handle = shared ? py.capsule_new(shared, kShared, free_shared) : nullptr;
  if (!handle) {
    delete shared;
    return counted(objects.none);
  }
  shared->references = 1;
  shared->accumulated = counted(accumulated);
  return handle;
}

gac_object* gac_arriving_hooks(gac_object* handle, gac_object* came, int64_t region, int64_t offset, int64_t numel) {
  Shared* const shared = shared_of(handle);
  Slot* const slot = new (std::nothrow) Slot;
  Held capsule(slot ? py.capsule_new(slot, kSlot, free_slot) : nullptr);
  if (!capsule.get()) {
    delete slot;
    return counted(objects.none);
  }
  ++shared->references;
  slot->shared = shared;
  slot->came = counted(came);
  slot->region = region, slot->offset = offset, slot->numel = numel;
  try {
    shared->slots.push_back(slot);
    shared->order.reserve(shared->slots.size());  // hooks push to it
  } catch (const std::bad_alloc&) {
    return counted(objects.none);
  }
  Held both(py.tuple_new(2));
  Held first(py.new_function(&of_gradient, capsule.get(), nullptr));
  Held second(py.new_function(&of_parameter, capsule.get(), nullptr));
  if (!both.get() || !first.get() || !second.get()) return nullptr;
  if (py.tuple_set(both.get(), 0, first.release()) || py.tuple_set(both.get(), 1, second.release())) return nullptr;
  return both.release();
}

void gac_arriving_begin(gac_object* handle, const gac_adding* told) {
  Shared* const shared = shared_of(handle);
  shared->order.clear();
  shared->told = *told;
  shared->unclear = false;
  ++shared->pass;
  shared->seconds = shared->sums[0] = shared->sums[1] = 0;
  shared->adding = true;
}

int64_t gac_arriving_end(gac_object* handle, double* seconds) {
  Shared* const shared = shared_of(handle);
  shared->adding = false;
  if (shared->waiting) {  // they were only asked for
    for (Slot* slot : shared->slots) drop(slot->gradient);
    shared->waiting = 0;
  }
  *seconds = shared->seconds;
  return shared->unclear ? -1 : static_cast<int64_t>(shared->order.size());
}

void gac_arriving_sums(gac_object* handle, double* into, double* each, int64_t* regions) {
  const Shared& shared = *shared_of(handle);
  if (into)
    for (int w = 0; w < 2; ++w) into[w] += shared.sums[w];
  for (size_t i = 0; (each || regions) && i < shared.order.size(); ++i) {
    const Slot& slot = *shared.order[i];
    if (each) each[2 * i] = slot.sums[0], each[2 * i + 1] = slot.sums[1];
    if (regions) regions[i] = slot.region;
  }
}
