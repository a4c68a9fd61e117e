// The compiled table. A row here needs its instantiations in sm90/*/launch.cu and a case in
// tests/cases.py.
#pragma once

#include "dispatch/dispatch.h"

namespace jax_flashkda {

inline std::vector<Variant> compiled_variants() {
  return {
      {90, 128, 128, DType::kBF16, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kF32}},
  };
}

inline std::vector<StepVariant> compiled_step_variants() {
  const std::vector<DType> tokens = {DType::kBF16, DType::kF16, DType::kF32};
  const std::vector<DType> states = {DType::kF32, DType::kBF16};
  return {{90, 128, 128, tokens, states}, {90, 64, 64, tokens, states}};
}

inline std::vector<ShortConvVariant> compiled_short_conv_variants() {
  return {{90,
           kShortConvWidth,
           kShortConvChannelMultiple,
           {DType::kBF16, DType::kF32},
           {DType::kBF16, DType::kF16, DType::kF32}}};
}

}  // namespace jax_flashkda
