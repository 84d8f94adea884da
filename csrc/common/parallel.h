// SPDX-License-Identifier: Apache-2.0
// Work over threads: torch's own OpenMP pool where the process has one, else a small persistent
// pool of ours. OpenMP is not linked: a second libgomp would spin against torch's.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace pyfast {

// A reference to a callable that outlives the call: no allocation, unlike std::function.
class RangeFunction {
 public:
  template <class F>
  RangeFunction(const F& f)  // NOLINT: implicit by intent
      : object_(std::addressof(f)), call_([](const void* object, std::int64_t b, std::int64_t e) {
          (*static_cast<const F*>(object))(b, e);
        }) {}
  void operator()(std::int64_t begin, std::int64_t end) const { call_(object_, begin, end); }

 private:
  const void* object_;
  void (*call_)(const void*, std::int64_t, std::int64_t);
};

// Calls `body(begin, end)` on pieces that cover [0, count), at least `grain` long but for the last,
// on up to `threads` threads, the caller among them. `body` must not throw. Any number of threads
// may call this at once: one has the pool, the others run alone. Safe after fork().
void parallel_for(std::int64_t count, std::int64_t grain, int threads, RangeFunction body);

}  // namespace pyfast
