// The Python types `Stack` and `Step`; their stub says what they do.
#pragma once

#include "python.h"

namespace strata {

// Adds both to the module; false with an error set.
bool add_stack_types(PyObject* module);

}  // namespace strata
