// How many layers are through, for threads that must not need the interpreter to say so or to wait for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "python.h"

namespace strata {

// Seconds of CLOCK_MONOTONIC, which is `time.monotonic` of Python.
double monotonic_s();

class Gate {
 public:
  // Layers below `layers` may pass; never closes on those that may already.
  void open(int64_t layers);
  // No more will open: everybody who waits returns.
  void close();
  // Until `layers` may pass: true; until it is closed or the deadline passes: false.
  bool wait(int64_t layers, double deadline_s);

  int64_t open_layers() const { return open_.load(std::memory_order_acquire); }
  bool is_closed() const { return closed_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int64_t> open_{0};
  std::atomic<bool> closed_{false};
};

// The Python type; created once, by the module.
PyObject* make_gate_type();
// The gate in an object of that type. Throws PythonError (TypeError).
Gate& gate_of(PyObject* object);

}  // namespace strata
