// One simulated engine: continuous batching with the linear time model of simulator.h. It admits
// and preempts as vLLM does, and jumps over steps in which nothing can happen.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

#include "rollout/simulator.h"
#include "rollout/types.h"

namespace kimisys::rollout {

// Simulated time in tenths of a picosecond: with integers, n steps at once take exactly as long as
// n steps one by one. 63 bits hold 10 days.
using Ticks = std::int64_t;
__extension__ using Wide = __int128;  // sums of products of them
constexpr Ticks kTicksPerMicrosecond = 10'000'000;
constexpr double kTicksPerSecond = 1e13;
constexpr Ticks kMaxTicks = 9'000'000'000'000'000'000;
constexpr Ticks kNoTicks = std::numeric_limits<Ticks>::max();  // never

Ticks ticks_of(double seconds);  // of checked numbers; to the nearest
inline double seconds_of(Ticks ticks) { return static_cast<double>(ticks) / kTicksPerSecond; }

// The model in ticks.
struct StepCosts {
  Ticks step = 0;
  Ticks sequence = 0;
  Ticks kv_token = 0;
  Ticks prefill_token = 0;

  explicit StepCosts(const EngineModel& model);
  // Of `steps` steps of `batch` sequences that hold `kv` tokens before the first, and one more each
  // after each step. At most kMaxTicks. O(1).
  Ticks decode(std::int64_t steps, std::int64_t batch, std::int64_t kv) const;
};

// A lease's way through the engine.
struct Sequence {
  Lease lease = kNoLease;
  std::int64_t context = 0;  // tokens of prompt and output when the lease began
  std::int64_t goal = 0;     // new tokens after which it ends
  EndReason ends = EndReason::kNone;
  std::int64_t trajectory = 0;  // index into the lots' lengths
  Ticks start = 0;              // when the lease began
  std::int64_t version = kNoVersion;

  std::int64_t made = 0;      // new tokens
  std::int64_t reported = 0;  // of those
  bool pausing = false;
  bool aborted = false;
  bool preempted = false;  // its KV was computed before, and thrown away
};

// What the engine says of a sequence: `tokens` since its last word, and, if it ended, why.
struct Word {
  Sequence sequence;
  std::int64_t tokens = 0;
  EndReason reason = EndReason::kNone;  // kNone: it goes on
};

class SimulatedEngine {
 public:
  // report_interval: ticks between two words of a sequence, on a grid that starts at 0; 0: its end
  // alone.
  SimulatedEngine(const EngineModel& model, Ticks report_interval);

  // Commands, at any time of the present. Those that come within a step wait for its end; those
  // that come at the moment of its end do not. Unknown leases are ignored.
  void start(const Sequence& sequence, Ticks now);
  void pause(Lease lease, Ticks now);
  void abort(Lease lease, Ticks now);
  // Everything that is there is lost, and appended to `lost`.
  void fail(Ticks now, std::vector<Sequence>& lost);

  // The end of the step after which something can happen; kNoTicks: idle.
  Ticks boundary() const { return boundary_; }
  // At boundary(): the steps are done.
  void settle();
  // Between steps: what there is to say, appended; those that ended are gone. Aborted ones are
  // appended with kFailed, and are nobody's business but the picture's.
  void say(std::vector<Word>& words);
  bool has_news() const { return news_; }
  // Between steps, when nothing more can come at this moment: preempts, admits, and plans how many
  // steps to take.
  void begin(Ticks now);

  bool between_steps() const { return boundary_ == kNoTicks; }
  bool empty() const { return running_.empty() && waiting_.empty(); }

  std::int64_t decoded() const { return decoded_; }
  std::int64_t prefilled() const { return prefilled_; }
  std::int64_t preempted() const { return preempted_; }
  Ticks busy() const { return busy_; }

 private:
  void truncate(Ticks now);  // the planned steps end with the one that runs at `now`
  std::int64_t steps_until(Ticks elapsed) const;
  Ticks duration(std::int64_t steps) const;
  void preempt();
  void admit();
  void plan(Ticks now);
  Sequence* find(Lease lease);

  StepCosts costs_;
  std::int64_t kv_capacity_;
  std::size_t max_sequences_;
  Ticks report_interval_;

  std::vector<Sequence> running_;  // in the order of admission
  std::deque<Sequence> waiting_;
  std::int64_t kv_ = 0;  // tokens that the running hold

  Ticks began_ = 0;            // of the planned steps
  Ticks boundary_ = kNoTicks;  // their end
  std::int64_t steps_ = 0;     // planned
  std::int64_t prefill_ = 0;   // tokens in the first of them
  bool report_ = false;        // a report is due
  bool news_ = false;

  std::int64_t decoded_ = 0;
  std::int64_t prefilled_ = 0;
  std::int64_t preempted_ = 0;
  Ticks busy_ = 0;
};

}  // namespace kimisys::rollout
