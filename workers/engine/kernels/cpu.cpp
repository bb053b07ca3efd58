#include "cpu.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace strata {
namespace {

constexpr int kArchReqXcompPerm = 0x1023;
constexpr int kXfeatureTileData = 18;

#if defined(__x86_64__)
bool find_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
  const bool has_amx = (d >> 22 & 1) && (d >> 24 & 1);                                       // BF16, TILE
  if (!has_avx512 || !has_amx) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512_BF16
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}
#else
bool find_amx_bf16() { return false; }
#endif

// libgomp's entry points, as its ABI has them.
struct Team {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*barrier)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

int find_gomp(dl_phdr_info* info, size_t, void* found) {
  if (strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
  *static_cast<const char**>(found) = info->dlpi_name;
  return 1;
}

Team find_team() {
  Team team;
  const char* path = nullptr;
  dl_iterate_phdr(find_gomp, &path);
  void* const library = path != nullptr ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  if (library == nullptr) return team;
  team.barrier = reinterpret_cast<decltype(team.barrier)>(dlsym(library, "GOMP_barrier"));
  team.thread_num = reinterpret_cast<decltype(team.thread_num)>(dlsym(library, "omp_get_thread_num"));
  team.num_threads = reinterpret_cast<decltype(team.num_threads)>(dlsym(library, "omp_get_num_threads"));
  if (team.barrier != nullptr && team.thread_num != nullptr && team.num_threads != nullptr) {
    team.parallel = reinterpret_cast<decltype(team.parallel)>(dlsym(library, "GOMP_parallel"));
  }
  return team;
}

const Team& team() {
  static const Team found = find_team();
  return found;
}

struct Call {
  void (*body)(void*, int, int);
  void* context;
};

void enter(void* argument) {
  const auto& call = *static_cast<Call*>(argument);
  call.body(call.context, team().thread_num(), team().num_threads());
}

thread_local bool is_alone = false;

}  // namespace

bool has_amx_bf16() {
  static const bool found = find_amx_bf16();
  return found;
}

void run_on_team(int num_threads, void (*body)(void*, int, int), void* context) {
  if (num_threads <= 1 || team().parallel == nullptr) {
    is_alone = true;
    body(context, 0, 1);
    is_alone = false;
    return;
  }
  Call call{body, context};
  team().parallel(enter, &call, static_cast<unsigned>(num_threads), 0);
}

void team_barrier() {
  if (!is_alone) team().barrier();
}

}  // namespace strata
