// Owners of operating-system handles: one RAII type, templated on the function that releases it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <utility>

namespace kimisys {

// Owns a value until it is destroyed or moved from, then calls kRelease on it once. kNone is the
// value that owns nothing.
template <typename Value, Value kNone, void (*kRelease)(Value)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(Value value) : value_(value) {}
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, kNone)) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      reset();
      value_ = std::exchange(other.value_, kNone);
    }
    return *this;
  }

  Value get() const { return value_; }
  explicit operator bool() const { return !(value_ == kNone); }
  void reset() {
    if (*this) kRelease(std::exchange(value_, kNone));
  }

 private:
  Value value_ = kNone;
};

inline void release_descriptor(int descriptor) { ::close(descriptor); }
using FileDescriptor = Handle<int, -1, release_descriptor>;

// A range given by mmap.
struct MappedRange {
  void* address = nullptr;
  std::size_t nbytes = 0;

  constexpr bool operator==(const MappedRange&) const = default;
};

inline void release_mapping(MappedRange range) { ::munmap(range.address, range.nbytes); }
using Mapping = Handle<MappedRange, MappedRange{}, release_mapping>;

}  // namespace kimisys
