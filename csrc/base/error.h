// The one error type of the C++ core. Every failure carries a code that the bindings map to a
// Python exception class, and a message that says what went wrong, where (tensor, region, ranks),
// and what to do about it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kimisys {

enum class ErrorCode {
  kLayout,          // LayoutError: a bad layout, region, shape, or its text form
  kPlan,            // PlanError: cannot be planned, or the proof failed
  kBufferMismatch,  // BufferMismatchError: missing, wrong-size, read-only or overlapping memory
  kSnapshot,        // SnapshotError: shared memory, file descriptors, torn reads, failed OS calls
  kVersion,         // VersionError: not the published version, or not increasing
  kDigest,          // DigestError: digests of the two sides differ
  kNotFinite,       // NotFiniteError: a weight that is NaN or infinite
  kScheduler,       // SchedulerError: a rollout configuration, event or trace that makes no sense
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// Joins the parts with operator<< and throws them as one Error.
template <typename... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(code, message.str());
}

}  // namespace kimisys

// KIMISYS_CHECK(condition, ErrorCode::kLayout, "tensor ", name, " ..."): the message parts are
// evaluated only when the condition is false.
#define KIMISYS_CHECK(condition, code, ...) \
  do {                                      \
    if (!(condition)) [[unlikely]] {        \
      ::kimisys::fail((code), __VA_ARGS__); \
    }                                       \
  } while (false)
