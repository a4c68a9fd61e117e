// The result of everything that can be refused or fail: an empty message is success.
#pragma once

#include <string>
#include <utility>

namespace jax_flashkda {

struct Status {
  std::string message;

  bool ok() const { return message.empty(); }
  static Status error(std::string text) { return Status{std::move(text)}; }
};

}  // namespace jax_flashkda
