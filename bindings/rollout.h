// What the binding files of rollout share: records as numpy arrays, kinds by their names.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "rollout/types.h"

namespace kimisys::bindings {

void bind_records(pybind11::module_& rollout);
void bind_config(pybind11::module_& rollout);
void bind_ledger(pybind11::module_& rollout);
void bind_scheduler(pybind11::module_& rollout);

// A copy of records of one plain type.
template <typename T>
pybind11::array_t<T> as_array(const std::vector<T>& records) {
  pybind11::array_t<T> array(static_cast<pybind11::ssize_t>(records.size()));
  if (!records.empty()) {
    std::memcpy(array.mutable_data(), records.data(), records.size() * sizeof(T));
  }
  return array;
}

// An array of one dimension as records; raises SchedulerError for any other.
template <typename T>
pybind11::array_t<T, pybind11::array::c_style> records(const pybind11::array& given,
                                                       const char* name) {
  KIMISYS_CHECK(given.ndim() == 1 && pybind11::isinstance<pybind11::array_t<T>>(given),
                ErrorCode::kScheduler, "an array of ", given.ndim(), " dimensions and dtype ",
                pybind11::str(given.dtype()).cast<std::string>(),
                " was given; it must have one, and dtype kimisys.rollout.", name);
  return pybind11::array_t<T, pybind11::array::c_style>::ensure(given);
}

// Python's -1 for what the records spell as their type's greatest value: none.
inline std::int64_t or_none(rollout::EngineId engine) {
  return engine == rollout::kNoEngine ? -1 : static_cast<std::int64_t>(engine);
}

inline std::int64_t lease_or_none(rollout::Lease lease) {
  return lease == rollout::kNoLease ? -1 : static_cast<std::int64_t>(lease);
}

}  // namespace kimisys::bindings
