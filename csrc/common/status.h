// How a function of the C interface fails: a status, and a sentence kept for the thread.
#pragma once

#include <string>

#include "../include/gemma4_kernels.h"

namespace gemma4 {

// Keeps the sentence for gemma4_last_error and returns the status.
gemma4_status fail(gemma4_status status, const std::string& sentence);

}  // namespace gemma4
