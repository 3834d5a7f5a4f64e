// Work shared out over threads.
//
// On torch's own OpenMP runtime where one was handed over, so that no second set of threads competes for the same
// cores; otherwise, and in a forked child, where the runtime's threads no longer exist and it would wait for them for
// ever, on a small pool whose threads sleep while there is nothing to do.

#pragma once

#include <cstdint>
#include <functional>

namespace halfbyte {

// GOMP_parallel of libgomp and of the runtimes compatible with it: run body(data) on `threads` threads and wait.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Use this runtime from now on; null: the pool.
void use_openmp(OpenMP parallel);

// Call body(first, last) for ranges that cover [0, count), each beginning at a multiple of `grain` and at most that
// long, on up to `threads` threads, the calling one among them; at once and whole on the calling thread where there is
// no more than one grain or one thread. The body must not throw.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace halfbyte
