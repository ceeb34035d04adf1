// What a twin library shows to Python: functions of plain C, with errors as text.
#pragma once

#include <string>

#include "runtime.h"

#define TWIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace twin {

// Runs `body` under a schedule; null, or what went wrong, valid until the next call.
template <class Body>
const char* guarded(uint64_t seed, Body body) {
  static std::string message;
  options.seed = seed;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    self = nullptr;
    block = nullptr;
    message = error.what();
    return message.c_str();
  }
}

}  // namespace twin
