// Layers on a team of threads.
#pragma once

#include "layers.h"
#include "threads.h"

namespace resnet_fast::cpu {

void execute(Team& team, const Kernels& kernels, const Direct& layer, Index scratch);
void execute(Team& team, const Kernels& kernels, const Winograd& layer, Index scratch);
void execute(Team& team, const Kernels& kernels, const Pool& layer);
void execute_average(Team& team, const Kernels& kernels, const void* x, const Map& in, void* out);
void execute(Team& team, const Kernels& kernels, const Conversion& conversion);
void execute_add(Team& team, const Kernels& kernels, const void* a, const void* b, void* out, Index count, bool relu);

// One convolution by itself: x [n, h, w, c] and the output dense, `epilogue` without what the layer has. False if there
// was a number that uint8 cannot hold.
bool execute(const Convolution& layer, Algorithm algorithm, const void* x, Index n, Index h, Index w, Epilogue epilogue,
             void* out, int threads);

// What a layer's ReLU, which the layer does not know, does to what it stores.
void limit(Epilogue& epilogue);

}  // namespace resnet_fast::cpu
