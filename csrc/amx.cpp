// The AMX tier: bf16 products in tiles (amx_matmul.h), everything else as the AVX-512 tier does it.

#if defined(__x86_64__)

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "contract.h"
#include "matmul.h"

namespace halfbyte {
namespace {

// Linux gives a process, and what it forks, the state of the tiles only when asked.
bool permitted() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}

bool supported() {
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    unsigned eax, ebx, ecx, edx;
    return avx512.supported() && __builtin_cpu_supports("avx512bf16") &&
           __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & amx_bf16) && (edx & amx_tile) && permitted();
}

Tier with_tiles(Tier tier) {
    tier.name = "amx";
    tier.supported = supported;
    tier.matmul = amx_matmul;
    return tier;
}

}  // namespace

const Tier amx = with_tiles(avx512);  // whose members are constants, and so there before this runs

}  // namespace halfbyte

#endif
