// Plans of launches, for the table in api.h.
#pragma once

#include "api.h"

namespace warpform {

void begin_plan(const api::Machine* machine);
const char* end_plan();

}  // namespace warpform
