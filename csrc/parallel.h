// Work shared out over threads.
//
// On torch's own OpenMP runtime where one was handed over, so that no second set of threads competes for the same
// cores; otherwise, and in a forked child, where the runtime's threads no longer exist and it would wait for them for
// ever, on a small pool whose threads sleep while there is nothing to do.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace halfbyte {

// GOMP_parallel of libgomp and of the runtimes compatible with it: run body(data) on `threads` threads and wait.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Use this runtime from now on; null: the pool.
void use_openmp(OpenMP parallel);

// Call body(first, last) for ranges that cover [0, count), each beginning at a multiple of `grain` and at most that
// long, on up to `threads` threads, the calling one among them; at once and whole on the calling thread where there is
// no more than one grain or one thread. The body must not throw.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

// The processor time of all threads in the phases of some work, in nanoseconds: in its items, and in waiting for those
// of others.
struct PhaseTime {
    std::atomic<int64_t> working{0}, waiting{0};
};

// Work in phases, each of which begins when all items of the one before are done: one parallel region for all of them.
// Whoever of the threads comes, and when, takes items of the phase at hand.
class Phases {
  public:
    virtual ~Phases() = default;

    // Do all phases on up to `threads` threads, the calling one among them. `times`: null, or one of each phase, to be
    // added to.
    void run(int threads, PhaseTime* times = nullptr);

  protected:
    // For each phase how many items it has.
    virtual const std::vector<int64_t>& items() const = 0;
    virtual void work(int64_t phase, int64_t item) = 0;

  private:
    struct alignas(64) Count {  // of items begun, and of those done
        std::atomic<int64_t> next{0};
        alignas(64) std::atomic<int64_t> done{0};
    };
    void join();

    std::unique_ptr<Count[]> counts_;
    size_t phases_ = 0;
    PhaseTime* times_ = nullptr;
};

}  // namespace halfbyte
