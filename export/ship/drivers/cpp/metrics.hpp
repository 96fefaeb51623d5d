// Memory of this process in MB of 10^6 bytes; 0 where the system does not tell. As runtime/metrics.py.
#pragma once

#include <algorithm>
#include <fstream>
#include <string>

namespace stillgraph {

constexpr double KIB = 1024 / 1e6;

// A line of a file of /proc in KiB, as MB; 0 without.
inline double line_of(const char* path, const char* name) {
    std::ifstream stream(path);
    for (std::string word; stream >> word;) {
        if (word != name) continue;
        double kib = 0;
        stream >> kib;
        return kib * KIB;
    }
    return 0;
}

// The largest resident set size so far. Not getrusage's: a process begins with the peak of the one that started it.
inline double peak_rss_mb() { return line_of("/proc/self/status", "VmHWM:"); }

// The proportional set size now: a page that several processes map is divided among them. It walks every page,
// so it is read at moments that matter and never between two tokens.
inline double pss_mb() { return line_of("/proc/self/smaps_rollup", "Pss:"); }

class PeakPss {
public:
    void sample() { mb_ = std::max(mb_, pss_mb()); }
    double mb() const { return mb_; }

private:
    double mb_ = 0;
};

}  // namespace stillgraph
