#include "parallel.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace halfbyte {
namespace {

// The ranges are handed out one after the other, so any number of threads that come finish the work.
class Job {
  public:
    Job(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)
        : count_(count), grain_(grain), body_(body) {}

    void work() {
        for (;;) {
            const int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (first >= count_) return;
            body_(first, std::min(first + grain_, count_));
        }
    }

  private:
    const int64_t count_, grain_;
    const std::function<void(int64_t, int64_t)>& body_;
    std::atomic<int64_t> next_{0};
};

class Pool {
  public:
    // One job at a time; who comes meanwhile, from another thread, works alone.
    void run(Job& job, int threads) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return job.work();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            job_ = &job;
            wanted_ = threads - 1;
        }
        start_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;
        done_.wait(lock, [this] { return working_ == 0; });
    }

  private:
    void grow(int workers) {
        try {
            for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
        }
    }

    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++working_;
            Job& job = *job_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    Job* job_ = nullptr;
    int workers_ = 0, wanted_ = 0, working_ = 0;
};

std::atomic<OpenMP> openmp{nullptr};
std::atomic<Pool*> pool{nullptr};  // never destroyed: its threads sleep in it until the process ends

void after_fork() {
    openmp = nullptr;
    pool = nullptr;
}

constexpr int kSpins = 10000;  // some 50 us or more

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Of the calling thread.
int64_t processor_time() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);

Pool& current_pool() {
    if (Pool* existing = pool) return *existing;
    Pool* created = new Pool;
    Pool* existing = nullptr;
    if (pool.compare_exchange_strong(existing, created)) return *created;
    delete created;
    return *existing;
}

}  // namespace

void use_openmp(OpenMP parallel) { openmp = parallel; }

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= grain || threads <= 1) return body(0, count);
    Job job(count, grain, body);
    if (const OpenMP parallel = openmp) {
        // Always as many, whatever the work: libgomp ends those that a smaller team leaves over.
        parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        const int64_t ranges = (count + grain - 1) / grain;
        current_pool().run(job, static_cast<int>(std::min<int64_t>(threads, ranges)));
    }
}

void Phases::run(int threads, PhaseTime* times) {
    times_ = times;
    const size_t phases = items().size();
    if (phases > phases_) {
        counts_.reset(new Count[phases]);
        phases_ = phases;
    }
    for (size_t i = 0; i < phases; ++i) counts_[i].next = counts_[i].done = 0;
    // As many ranges as threads: each is one thread's stay.
    parallel_for(threads, 1, threads, [this](int64_t, int64_t) { join(); });
}

void Phases::join() {
    const std::vector<int64_t>& all = items();
    for (size_t phase = 0; phase < all.size(); ++phase) {
        Count& count = counts_[phase];
        const int64_t wanted = all[phase], begun = times_ ? processor_time() : 0;
        int64_t mine = 0;
        for (int64_t item; (item = count.next.fetch_add(1, std::memory_order_relaxed)) < wanted; ++mine) {
            work(static_cast<int64_t>(phase), item);
        }
        if (mine) count.done.fetch_add(mine, std::memory_order_release);
        const int64_t worked = times_ ? processor_time() : 0;
        for (int turns = 0; count.done.load(std::memory_order_acquire) < wanted; ++turns) {
            if (turns < kSpins) {
                pause();
            } else {
                std::this_thread::yield();  // somebody else has the core of the thread that works
            }
        }
        if (times_) {
            times_[phase].working.fetch_add(worked - begun, std::memory_order_relaxed);
            times_[phase].waiting.fetch_add(processor_time() - worked, std::memory_order_relaxed);
        }
    }
}

}  // namespace halfbyte
