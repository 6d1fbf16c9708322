// Layers on a team of threads.
#pragma once

#include "layers.h"
#include "threads.h"

namespace resnet_fast::cpu {

void execute(Team& team, const Kernels& kernels, const Direct& layer, Index scratch);
void execute(Team& team, const Kernels& kernels, const Winograd& layer, Index scratch);
void execute(Team& team, const Kernels& kernels, const Pool& layer);
void execute_average(Team& team, const Kernels& kernels, const void* x, const Map& in, void* out);
void execute_add(Team& team, const Kernels& kernels, const void* a, const void* b, void* out, Index count, bool relu);

// One convolution by itself: x [n, h, w, c] and the output dense, `epilogue` without the bias.
void execute(const Convolution& layer, Algorithm algorithm, const void* x, Index n, Index h, Index w, Epilogue epilogue,
             void* out, int threads);

}  // namespace resnet_fast::cpu
