// Checks the kernels without Python: every tier of this build that the chip supports, on random shapes and values.
//
//     check [--seed S] [--cases N | --seconds T] [--tier NAME] [--group NAME]
//
// Case i of a group is made from the seed S + i alone, N cases a group or as many as fit into T seconds. A failure is
// described with the options that repeat it.
//
// Quantizing, dequantizing and AdamW must give the bytes of the tier `scalar`, which is held against the formulas in
// double; products must lie within a bound of the product of the dequantized weight in double, attention and the
// kernels over rows within a bound of their formulas in double; products and attention must be the same bytes for every
// number of threads.

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "amx_emulation.h"
#include "case.h"
#include "dispatch.h"
#include "parallel.h"

namespace halfbyte {
namespace {

// The tiers to check. `scalar` comes last.
std::vector<const Tier*> tiers() {
    std::vector<const Tier*> tiers = available_tiers();
#if defined(__x86_64__)
    if (emulated_amx.supported()) tiers.insert(tiers.begin(), &emulated_amx);
#endif
    return tiers;
}

// Several threads call at once: each index is worked on once, in ranges as promised.
void parallel(Case& c) {
    const int64_t count = c.note("count", c.random.below(3000)), grain = c.note("grain", 1 + c.random.below(400));
    const int threads = c.note("threads", 1 + static_cast<int>(c.random.below(4)));
    std::vector<std::vector<int>> visits(static_cast<size_t>(c.note("callers", 1 + c.random.below(3))),
                                         std::vector<int>(static_cast<size_t>(count)));
    std::atomic<bool> right{true};
    const auto call = [&](std::vector<int>& mine) {
        parallel_for(count, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) ++mine[static_cast<size_t>(i)];
            if (first % grain || (last - first > grain && threads > 1 && count > grain)) right = false;
        });
    };
    std::vector<std::thread> callers;
    for (auto& mine : visits) callers.emplace_back(call, std::ref(mine));
    for (auto& caller : callers) caller.join();
    for (const auto& mine : visits) right = right && mine == std::vector<int>(mine.size(), 1);
    c.require(right, "an index was not visited exactly once, or in a range that was not promised");
}

bool every(const Tier&) { return true; }
bool multiplies(const Tier& tier) { return tier.matmul; }
bool attends(const Tier& tier) { return tier.attention; }
bool baseline(const Tier& tier) { return &tier == &scalar; }

struct Group {
    const char* name;
    void (*check)(Case&);
    bool (*concerns)(const Tier&);
};

const Group groups[] = {
    {"quantize_4bit", quantize_4bit, every},
    {"quantize_8bit", quantize_8bit, every},
    {"dequantize_4bit", dequantize_4bit, every},
    {"dequantize_8bit", dequantize_8bit, every},
    {"matmul", matmul, multiplies},
    {"few", few, multiplies},
    {"multiply", multiply, multiplies},
    {"attention", attention, attends},
    {"decode", decode, multiplies},
    {"elementary", elementary, every},
    {"rms_norm", rms_norm, every},
    {"gated", gated, every},
    {"rotary", rotary, every},
    {"fold_softmax", fold_softmax, every},
    {"adamw_32bit", adamw_32bit, every},
    {"adamw_8bit", adamw_8bit, every},
    {"parallel", parallel, baseline},
};

struct Options {
    uint64_t seed = 1;
    int64_t cases = 150;
    double seconds = 0;  // for each group; 0: count the cases
    std::string tier, group;
};

const char* running_group = "";
uint64_t running_seed = 0;
const Case* running = nullptr;

void tell_failure(const char* what) {
    if (!running) return;
    std::fprintf(stderr, "FAILED: --tier '%s' --group %s --seed %" PRIu64 " --cases 1:%s: %s\n", running->tier.name,
                 running_group, running_seed, running->description.str().c_str(), what);
}

bool run(const Tier& tier, const Group& group, const Options& options) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(options.seconds);
    int64_t i = 0;
    for (; options.seconds > 0 ? Clock::now() < end : i < options.cases; ++i) {
        Case c{tier, Random(options.seed + static_cast<uint64_t>(i)), {}};
        running = &c;
        running_group = group.name;
        running_seed = options.seed + static_cast<uint64_t>(i);
        try {
            group.check(c);
        } catch (const std::runtime_error& failure) {
            tell_failure(failure.what());
            return false;
        }
        running = nullptr;
    }
    std::printf("%-13s %-16s %6" PRId64 " cases\n", tier.name, group.name, i);
    std::fflush(stdout);
    return true;
}

int main(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; i += 2) {
        const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
        if (name == "--seed") options.seed = std::strtoull(value.c_str(), nullptr, 10);
        else if (name == "--cases") options.cases = std::atoll(value.c_str());
        else if (name == "--seconds") options.seconds = std::atof(value.c_str());
        else if (name == "--tier") options.tier = value;
        else if (name == "--group") options.group = value;
        else return std::fprintf(stderr, "Unknown option %s\n", name.c_str()), 2;
    }
    int ran = 0;
    for (const Tier* tier : tiers()) {
        for (const Group& group : groups) {
            if (!options.tier.empty() && options.tier != tier->name) continue;
            if (!options.group.empty() && options.group != group.name) continue;
            if (!group.concerns(*tier)) continue;
            if (!run(*tier, group, options)) return 1;
            ++ran;
        }
    }
    return ran ? 0 : (std::fprintf(stderr, "No such tier here, or no such group.\n"), 2);
}

}  // namespace
}  // namespace halfbyte

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

int main(int count, char** arguments) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback([] { halfbyte::tell_failure("a sanitizer's report, above"); });
#endif
    return halfbyte::main(count, arguments);
}
