// What all handlers share: a call's operands, results and attributes, each checked before a pointer
// is used, and the way from a function that reads a call to an XLA FFI handler. Included by the
// handlers' sources alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/status.h"
#include "problem/params.h"
#include "xla/ffi/api/ffi.h"

struct CUstream_st;

// Headers of a newer JAX would compile too, and the oldest JAX supported would refuse the module.
static_assert(XLA_FFI_API_MAJOR == 0 && XLA_FFI_API_MINOR == 3,
              "build against the XLA FFI headers of jaxlib 0.9.2");

namespace jax_flashkda {

namespace ffi = xla::ffi;

// A call whose operands, results or attributes are not what the target takes.
struct InvalidCall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The same, found by the dispatch layer, whose message names the target.
struct RefusedCall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void refuse(const std::string& problem) { throw InvalidCall(problem); }

template <typename T>
T value_or_refuse(ffi::ErrorOr<T> decoded, const std::string& what) {
  if (decoded.has_error()) refuse(what + ": " + decoded.error().message());
  return *decoded;
}

inline std::string to_string(ffi::Span<const int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline std::string to_string(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F64:
      return "float64";
    case ffi::F32:
      return "float32";
    case ffi::F16:
      return "float16";
    case ffi::BF16:
      return "bfloat16";
    case ffi::S32:
      return "int32";
    case ffi::U8:
      return "uint8";
    default:
      return "XLA element type " + std::to_string(static_cast<int>(dtype));
  }
}

// A buffer under the name that messages give it. Its methods either return or throw InvalidCall.
class Operand {
 public:
  Operand(std::string name, ffi::AnyBuffer buffer) : name_(std::move(name)), buffer_(buffer) {}

  void expect_rank(size_t rank) const {
    if (buffer_.dimensions().size() != rank) {
      refuse(name_ + " has shape " + to_string(buffer_.dimensions()) + ", expected " +
             std::to_string(rank) + " dimensions");
    }
  }

  // `meaning` spells the expected dimensions as letters, for the message.
  void expect_shape(const std::string& meaning, std::initializer_list<int64_t> dims) const {
    const ffi::Span<const int64_t> got = buffer_.dimensions();
    if (got.size() != dims.size() || !std::equal(dims.begin(), dims.end(), got.begin())) {
      refuse(name_ + " has shape " + to_string(got) + ", expected " + meaning + " = " +
             to_string(ffi::Span<const int64_t>(dims.begin(), dims.size())));
    }
  }

  void expect_dtype(ffi::DataType dtype) const {
    if (buffer_.element_type() != dtype) {
      refuse(name_ + " is " + to_string(buffer_.element_type()) + ", expected " + to_string(dtype));
    }
  }

  DType float_dtype() const {
    switch (buffer_.element_type()) {
      case ffi::F32:
        return DType::kF32;
      case ffi::BF16:
        return DType::kBF16;
      case ffi::F16:
        return DType::kF16;
      default:
        refuse(name_ + " is " + to_string(buffer_.element_type()) +
               ", expected float32, bfloat16 or float16");
    }
  }

  int64_t dim(size_t axis) const { return buffer_.dimensions()[axis]; }
  int64_t bytes() const { return static_cast<int64_t>(buffer_.size_bytes()); }
  ffi::DataType dtype() const { return buffer_.element_type(); }
  template <typename T>
  T* data() const {
    return static_cast<T*>(buffer_.untyped_data());
  }

 private:
  std::string name_;
  ffi::AnyBuffer buffer_;
};

// Hands out operands, or results, in order; the caller says which is next.
class OperandReader {
 public:
  explicit OperandReader(ffi::RemainingArgs args) : args_(args) {}

  Operand next(const char* name) {
    if (next_ == args_.size()) refuse(std::string(name) + " is missing from the operands");
    return Operand(name, value_or_refuse(args_.get<ffi::AnyBuffer>(next_++), name));
  }
  void expect_end() const {
    if (next_ != args_.size()) {
      refuse("got " + std::to_string(args_.size()) + " operands, expected " +
             std::to_string(next_));
    }
  }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
};

class ResultReader {
 public:
  explicit ResultReader(ffi::RemainingRets rets) : rets_(rets) {}

  Operand next(const char* name) {
    if (next_ == rets_.size()) refuse(std::string(name) + " is missing from the results");
    return Operand(name, *value_or_refuse(rets_.get<ffi::AnyBuffer>(next_++), name));
  }
  void expect_end() const {
    if (next_ != rets_.size()) {
      refuse("got " + std::to_string(rets_.size()) + " results, expected " + std::to_string(next_));
    }
  }

 private:
  ffi::RemainingRets rets_;
  size_t next_ = 0;
};

// Reads attributes by name and counts them, so that one nobody reads is refused, not ignored.
class AttributeReader {
 public:
  explicit AttributeReader(ffi::Dictionary attributes) : attributes_(attributes) {}

  template <typename T>
  T get(const char* name) {
    ++read_;
    return value_or_refuse(attributes_.get<T>(name), std::string("attribute ") + name);
  }
  void expect_end() const {
    if (attributes_.size() != read_) {
      refuse("got " + std::to_string(attributes_.size()) + " attributes, expected " +
             std::to_string(read_));
    }
  }

 private:
  ffi::Dictionary attributes_;
  size_t read_ = 0;
};

// The parts of a call, read in order; expect_end() refuses what nobody has read.
struct Call {
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary dictionary)
      : operands(args), results(rets), attributes(dictionary) {}

  void expect_end() const {
    operands.expect_end();
    results.expect_end();
    attributes.expect_end();
  }

  OperandReader operands;
  ResultReader results;
  AttributeReader attributes;
};

inline void refuse_unless_ok(const Status& status) {
  if (!status.ok()) throw RefusedCall(status.message);
}

inline void check_call(const Status& status, const Operand& workspace, int64_t needed) {
  refuse_unless_ok(status);
  if (workspace.bytes() < needed) {
    refuse("workspace has " + std::to_string(workspace.bytes()) + " bytes, expected " +
           std::to_string(needed) + ": was the program lowered by another version?");
  }
}

// What the kernel does not write would be lost if XLA had given the result memory of its own.
inline void expect_in_place(const Operand& given, const Operand& updated) {
  if (given.data<void>() != updated.data<void>())
    refuse("state is not updated in place: operand and result have different memory");
}

// Runs `body` and turns whatever it throws into an error that names the target.
template <typename Body>
ffi::Error guarded(const char* target, Body body) {
  const auto named = [&](const char* text) { return std::string(target) + ": " + text; };
  try {
    return body();
  } catch (const RefusedCall& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const InvalidCall& error) {
    return ffi::Error::InvalidArgument(named(error.what()));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(named(error.what()));
  } catch (...) {
    return ffi::Error::Internal(named("unknown exception"));
  }
}

inline ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::Internal(status.message);
}

// Reads the call of a target and launches it.
template <const char* kTarget, auto kRead, auto kLaunch>
ffi::Error execute(CUstream_st* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  return guarded(kTarget,
                 [&] { return to_error(kLaunch(kRead({args, rets, attributes}), stream)); });
}

// Stops before the launch.
template <const char* kTarget, auto kRead>
ffi::Error only_check(ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary attributes) {
  return guarded(kTarget, [&] {
    kRead({args, rets, attributes});
    return ffi::Error::Success();
  });
}

// Command buffer compatible: it launches and does nothing else (no allocation, no query of the
// stream), and the launches follow from the operands' shapes.
template <const char* kTarget, auto kRead, auto kLaunch>
void* executing_handler() {
  XLA_FFI_DEFINE_HANDLER(handler, (execute<kTarget, kRead, kLaunch>),
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<CUstream_st*>>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return reinterpret_cast<void*>(handler);
}

template <const char* kTarget, auto kRead>
void* checking_handler() {
  XLA_FFI_DEFINE_HANDLER(handler, (only_check<kTarget, kRead>),
                         ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
  return reinterpret_cast<void*>(handler);
}

}  // namespace jax_flashkda
