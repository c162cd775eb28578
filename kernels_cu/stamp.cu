// When a step starts and ends, on the device's own clock: the host's clock cannot see into graphs.
#include "device.cuh"

// stamp_step: note this moment as the start or the end of the current step, in a ring of steps
// grid 1, block 32, no shared memory
// ring     uint64 [1 + 3 * N]: how many steps have ended; then for each of the last N, the step k
//          at place k % N: start and end in nanoseconds, kind
// N        steps that the ring holds, 1 or more
// kind     what the step is, for those who read the ring
// is_end   0: start; 1: end, after which the next step is the current one
// The start comes before anything of the step has begun, the end when all of it has ended: in
// stream order, and by waiting for the kernel before where launches overlap.
// REF: cuda.step_stamps.StepStamps.read
// COST: 24 bytes
extern "C" __global__ void __launch_bounds__(32) stamp_step(
    uint64_t* ring, uint32_t N, uint32_t kind, uint32_t is_end) {
    grid_dependency_launch();
    grid_dependency_wait();
    if (threadIdx.x != 0) return;
    const uint64_t step = ring[0];
    uint64_t* place = ring + 1 + 3 * (step % N);
    place[is_end ? 1 : 0] = globaltimer_ns();
    if (is_end) {
        place[2] = kind;
        ring[0] = step + 1;
    }
}
