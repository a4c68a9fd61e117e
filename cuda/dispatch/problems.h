// What the checks of all targets share: one error that tells every mismatch of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch/dispatch.h"

namespace jax_flashkda {

inline constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

// Collects every mismatch of a call, so that one error tells all of them.
class Problems {
 public:
  template <typename... Parts>
  void add(const Parts&... parts) {
    if (count_++ > 0) text_ << "; ";
    (text_ << ... << parts);
  }
  Status status(const char* target) const {
    return ok() ? Status{} : Status::error(std::string(target) + ": " + text_.str());
  }
  bool ok() const { return count_ == 0; }

 private:
  std::ostringstream text_;
  int count_ = 0;
};

inline bool contains(const std::vector<DType>& list, DType dtype) {
  return std::find(list.begin(), list.end(), dtype) != list.end();
}

inline std::string names(const std::vector<DType>& list) {
  std::string text;
  for (DType dtype : list) text += (text.empty() ? "" : ", ") + std::string(name(dtype));
  return text;
}

// 16 bytes: the kernels' vector and bulk copies. An operand without elements may be null.
inline void check_pointer(const char* what, const void* pointer, bool needed, uintptr_t alignment,
                          Problems& problems) {
  if (pointer == nullptr) {
    if (needed) problems.add(what, " is missing");
  } else if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    problems.add(what, " is not aligned to ", alignment, " bytes");
  }
}

}  // namespace jax_flashkda
