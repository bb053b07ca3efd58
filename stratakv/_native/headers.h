// Headers of many pages (`stratakv/layout.py` says what is in them), made and checked at once.
#pragma once

#include "python.h"

namespace strata {

PyObject* check_headers(PyObject* module, PyObject* args);
PyObject* pack_headers(PyObject* module, PyObject* args);

}  // namespace strata
