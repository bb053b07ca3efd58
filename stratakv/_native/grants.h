// Which ranges of a segment each unfinished put may be written to, until when, and by how many just now.
//
// The daemon publishes it, the threads that receive bytes ask it: neither needs the interpreter for that.
#pragma once

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "frames.h"

namespace strata {

// How a request to write ended; `Entered` in the Python stub.
enum class Entered : int { kYes = 0, kRefused = 1, kOutside = 2 };

class Grants {
 public:
  struct Run {
    uint64_t start;
    uint64_t end;
  };

  // `runs` ascend and do not overlap.
  void open(const std::string& put_id, std::vector<Run> runs, double deadline_s);
  // No write begins any more. Says whether none is running either.
  bool close(const std::string& put_id);
  // May these ranges be written now? If so, `leave` has to follow.
  Entered enter(const std::string& put_id, const std::vector<WireRange>& ranges, double now_s);
  void leave(const std::string& put_id);

 private:
  struct Grant {
    std::vector<Run> runs;
    double deadline_s;
    size_t writers = 0;
    bool is_closed = false;
  };

  std::mutex mutex_;
  std::unordered_map<std::string, Grant> grants_;
};

// The Python type; created once, by the module.
PyObject* make_grants_type();
// The grants in an object of that type. Throws PythonError (TypeError).
Grants& grants_of(PyObject* object);

}  // namespace strata
