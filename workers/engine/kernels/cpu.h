// What the processor offers, and the threads that torch's operations already use.
#pragma once

#include <cstdint>

namespace strata {

// Whether the kernels can run: AVX-512 with bf16, and AMX tiles that the kernel of the system lets this process use.
bool has_amx_bf16();

// Runs `body(context, thread, num_threads)` on every thread of the caller's OpenMP team: torch's own one, since a second
// team on the same cores would take turns with it. Without it, on the calling thread alone.
void run_on_team(int num_threads, void (*body)(void*, int, int), void* context);

// Waits for the other threads of the team; within `run_on_team` only.
void team_barrier();

}  // namespace strata
