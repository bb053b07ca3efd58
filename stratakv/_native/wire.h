// Layers of many pages over sockets that speak the pool protocol (`stratakv/pool/messages.py` says how).
#pragma once

#include "moves.h"

namespace strata {

PyObject* fetch_pages(PyObject* module, PyObject* args);
PyObject* push_pages(PyObject* module, PyObject* args);

}  // namespace strata
