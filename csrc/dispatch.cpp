// The tiers that this build and this chip have.

#include "dispatch.h"

namespace halfbyte {

std::vector<const Tier*> available_tiers() {
    std::vector<const Tier*> available;
    for (const Tier* tier : {
#if defined(__x86_64__)
             &avx512, &avx2,
#elif defined(__aarch64__)
             &neon,
#endif
             &scalar}) {
        if (tier->supported()) available.push_back(tier);
    }
    return available;
}

}  // namespace halfbyte
