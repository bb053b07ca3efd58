// Finds message boundaries in a stream of PostgreSQL's protocol that is cut anywhere.
#pragma once

#include "python.h"

namespace strata {

// The Python type `MessageWalker`.
PyObject* make_walker_type();

}  // namespace strata
