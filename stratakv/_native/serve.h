// The daemon's end of the pool protocol: bytes in and out of the segment, without the interpreter.
#pragma once

#include "grants.h"

namespace strata {

PyObject* serve_frames(PyObject* module, PyObject* args);

}  // namespace strata
