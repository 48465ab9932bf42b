// What every function of the C interface checks of a weight.
#pragma once

#include "../common/checks.h"

namespace gemma4::linear {

// That some kernel here reads the weight, and what goes with its kind is there. `checks` knows the function's name.
gemma4_status check_weight(const Checks& checks, const gemma4_weight& weight);

}  // namespace gemma4::linear
