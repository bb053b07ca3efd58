// The Python types of the module; the stub says what they do.
#pragma once

#include "python.h"

namespace strata {

// False with an error set.
bool add_types(PyObject* module);

}  // namespace strata
