// SPDX-License-Identifier: Apache-2.0
// STD_TORCH_CHECK for messages that users read: torch's own puts function, file and line in front.
#pragma once

#include <stdexcept>

#include <torch/headeronly/util/Exception.h>

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(cond, ...)                                                         \
  if (__builtin_expect(!(cond), 0)) {                                                      \
    throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__)); \
  }
