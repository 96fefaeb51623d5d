// Memory of this process in MB of 10^6 bytes; 0 where the system does not tell. As runtime/metrics.py.
#pragma once

#include <algorithm>
#include <fstream>
#include <string>

#include <sys/resource.h>

namespace stillgraph {

constexpr double KIB = 1024 / 1e6;

// The largest resident set size so far.
inline double peak_rss_mb() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_maxrss) * KIB;
}

// The proportional set size now: a page that several processes map is divided among them. It walks every page,
// so it is read at moments that matter and never between two tokens.
inline double pss_mb() {
    std::ifstream stream("/proc/self/smaps_rollup");
    for (std::string word; stream >> word;) {
        if (word != "Pss:") continue;
        double kib = 0;
        stream >> kib;
        return kib * KIB;
    }
    return 0;
}

class PeakPss {
public:
    void sample() { mb_ = std::max(mb_, pss_mb()); }
    double mb() const { return mb_; }

private:
    double mb_ = 0;
};

}  // namespace stillgraph
