// Warp collectives: shuffles, votes, matches, reductions, __syncwarp.
#include <algorithm>
#include <cstring>

#include "executor.h"

namespace simt {

namespace {

const char* collective_name(Collective what) {
  switch (what) {
    case Collective::kBarrier: return "__syncwarp";
    case Collective::kShuffle: return "__shfl_sync";
    case Collective::kShuffleUp: return "__shfl_up_sync";
    case Collective::kShuffleDown: return "__shfl_down_sync";
    case Collective::kShuffleXor: return "__shfl_xor_sync";
    case Collective::kBallot: return "__ballot_sync";
    case Collective::kAny: return "__any_sync";
    case Collective::kAll: return "__all_sync";
    case Collective::kMatchAny: return "__match_any_sync";
    case Collective::kMatchAll: return "__match_all_sync";
    default: return "__reduce_*_sync";
  }
}

bool is_shuffle(Collective what) { return what >= Collective::kShuffle && what <= Collective::kShuffleXor; }

std::string mask_text(uint32_t mask) {
  char digits[11];
  std::snprintf(digits, sizeof(digits), "0x%08x", mask);
  return digits;
}

uint32_t first_lane(uint32_t mask) { return static_cast<uint32_t>(__builtin_ctz(mask)); }

template <class F>
void for_each_lane(uint32_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(first_lane(mask));
}

uint64_t reduce(Collective what, uint64_t a, uint64_t b) {
  const auto x = static_cast<uint32_t>(a);
  const auto y = static_cast<uint32_t>(b);
  switch (what) {
    case Collective::kReduceAdd: return x + y;
    case Collective::kReduceAnd: return x & y;
    case Collective::kReduceOr: return x | y;
    case Collective::kReduceXor: return x ^ y;
    case Collective::kReduceMin: return std::min(x, y);
    case Collective::kReduceMax: return std::max(x, y);
    case Collective::kReduceMinSigned:
      return static_cast<uint32_t>(std::min<int32_t>(static_cast<int32_t>(x), static_cast<int32_t>(y)));
    default:
      return static_cast<uint32_t>(std::max<int32_t>(static_cast<int32_t>(x), static_cast<int32_t>(y)));
  }
}

}  // namespace

void Executor::check_not_awaited(const char* doing, const Site& site) const {
  const Thread& me = *static_cast<const Thread*>(self);
  for (const Meeting& meeting : me.warp->meetings) {
    if ((meeting.mask >> me.lane & 1) == 0) continue;
    fail("bad-mask", site,
         text("a thread ", doing, " while lane ", first_lane(meeting.arrived), " waits for it at ",
              collective_name(meeting.what), " with mask ", mask_text(meeting.mask), " at ",
              site_text(meeting.site)));
  }
}

uint64_t Executor::collective(Collective what, uint32_t mask, uint64_t value, int bytes, uint32_t operand,
                              int width, const Site& site) {
  Thread& me = *static_cast<Thread*>(self);
  Warp& warp = *me.warp;
  me.site = site;
  const uint32_t bit = 1u << me.lane;
  const auto bad = [&](const std::string& why) {
    fail("bad-mask", site, text(collective_name(what), " with mask ", mask_text(mask), ": ", why));
  };
  if ((mask & bit) == 0) bad(text("the calling lane ", me.lane, " is not in it"));
  if (is_shuffle(what) && (width < 1 || width > 32 || (width & (width - 1)) != 0)) {
    bad(text("the width must be a power of two up to 32, got ", width));
  }
  // Lanes may wait with overlapping masks: a lane that is named elsewhere may come there later. Not where two
  // wait for each other; longer circles end as a deadlock.
  Meeting* meeting = nullptr;
  for (Meeting& open : warp.meetings) {
    if (open.mask == mask && open.what == what && same_site(open.site, site)) {
      meeting = &open;
    } else if ((open.mask & bit) != 0 && (open.arrived & mask) != 0) {
      bad(text("it waits for lane ", first_lane(open.arrived & mask), ", which waits for this one at ",
               collective_name(open.what), " with mask ", mask_text(open.mask), " at ",
               site_text(open.site)));
    }
  }
  if (meeting == nullptr) {
    if ((mask & ~warp.lanes) != 0)
      bad(text("lane ", first_lane(mask & ~warp.lanes), " does not exist in this block"));
    if ((mask & warp.exited) != 0) bad(text("lane ", first_lane(mask & warp.exited), " has exited"));
    for_each_lane(mask, [&](uint32_t lane) {
      const Thread& other = threads_[warp.index * 32 + lane];
      if (other.state == Thread::State::kAtBarrier) {
        bad(text("lane ", lane, " waits at __syncthreads at ", site_text(other.site)));
      }
    });
    warp.meetings.push_back({what, mask, 0, site});
    meeting = &warp.meetings.back();
  }
  warp.value[me.lane] = value;
  warp.operand[me.lane] = operand;
  warp.width[me.lane] = width;
  warp.bytes[me.lane] = bytes;
  meeting->arrived |= bit;
  if (meeting->arrived != mask) {
    me.state = Thread::State::kAtCollective;
    clear_runnable(warp, me.lane);
    suspend();
    return me.result;
  }
  const Meeting complete_meeting = *meeting;
  warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
  complete(warp, complete_meeting);
  return me.result;
}

uint64_t Executor::shuffle_result(const Warp& warp, const Meeting& meeting, uint32_t lane) const {
  // As PTX defines shfl.sync.
  const auto width = static_cast<uint32_t>(warp.width[lane]);
  const uint32_t segment = ~(width - 1) & 31;
  const uint32_t first = lane & segment;
  const uint32_t last = first | (~segment & 31);
  const uint32_t b = warp.operand[lane] & 31;
  uint32_t source = lane;
  switch (meeting.what) {
    case Collective::kShuffle: source = first | (b & ~segment); break;
    case Collective::kShuffleUp: source = lane >= first + b ? lane - b : lane; break;
    case Collective::kShuffleDown: source = lane + b <= last ? lane + b : lane; break;
    default: source = (lane ^ b) <= last ? lane ^ b : lane; break;
  }
  if ((meeting.mask >> source & 1) == 0) {
    fail("bad-mask", meeting.site,
         text(collective_name(meeting.what), " with mask ", mask_text(meeting.mask), ": lane ", lane,
              " takes the value of lane ", source, ", which is not in it"));
  }
  return warp.value[source];
}

void Executor::complete(Warp& warp, const Meeting& meeting) {
  Thread* const lanes = &threads_[warp.index * 32];
  const uint32_t mask = meeting.mask;
  const Collective what = meeting.what;
  if (is_shuffle(what)) {
    for_each_lane(mask, [&](uint32_t lane) { lanes[lane].result = shuffle_result(warp, meeting, lane); });
    counts_->shuffles += (static_cast<uint64_t>(warp.bytes[first_lane(mask)]) + 3) / 4;
  } else if (what == Collective::kBarrier) {
    merge_clocks(warp, mask);
    ++counts_->warp_barriers;
  } else if (what == Collective::kMatchAny) {
    for_each_lane(mask, [&](uint32_t lane) {
      uint64_t same = 0;
      for_each_lane(
          mask, [&](uint32_t other) { same |= uint64_t{warp.value[other] == warp.value[lane]} << other; });
      lanes[lane].result = same;
    });
    ++counts_->votes;
  } else {
    uint64_t result = 0;
    uint32_t votes = 0;
    bool equal = true;
    const uint64_t first = warp.value[first_lane(mask)];
    for_each_lane(mask, [&](uint32_t lane) {
      votes |= uint32_t{warp.value[lane] != 0} << lane;
      equal = equal && warp.value[lane] == first;
      result = lane == first_lane(mask) ? warp.value[lane] : reduce(what, result, warp.value[lane]);
    });
    if (what == Collective::kBallot) result = votes;
    if (what == Collective::kAny) result = votes != 0;
    if (what == Collective::kAll) result = votes == mask;
    if (what == Collective::kMatchAll) result = equal ? mask : 0;
    for_each_lane(mask, [&](uint32_t lane) { lanes[lane].result = result; });
    ++counts_->votes;
  }
  for_each_lane(mask, [&](uint32_t lane) { lanes[lane].state = Thread::State::kRunnable; });
  set_runnable(warp, mask);
  if (mask == (warp.lanes & ~warp.exited)) warp.log.flush(*counts_);
}

/// After a __syncwarp every lane of the mask knows what each of them knew. Shuffles and votes order no memory
/// accesses.
void Executor::merge_clocks(Warp& warp, uint32_t mask) {
  Thread* const lanes = &threads_[warp.index * 32];
  uint32_t merged[32] = {};
  for_each_lane(mask, [&](uint32_t lane) { tick(lanes[lane]); });
  if (mask != ~0u) {
    for_each_lane(mask, [&](uint32_t lane) {
      for (int i = 0; i < 32; ++i) merged[i] = std::max(merged[i], warp.seen[lane][i]);
    });
  }
  for_each_lane(mask, [&](uint32_t lane) { merged[lane] = static_cast<uint32_t>(lanes[lane].clock); });
  for_each_lane(mask, [&](uint32_t lane) { std::memcpy(warp.seen[lane], merged, sizeof(merged)); });
}

}  // namespace simt
