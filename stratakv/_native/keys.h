// Which row of a table has a key: what the meta server looks blocks up with.
#pragma once

#include "python.h"

namespace strata {

// The Python type `KeyTable`.
PyObject* make_key_table_type();

}  // namespace strata
