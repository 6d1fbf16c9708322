#include "execute.h"

#include <algorithm>

namespace resnet_fast::cpu {
namespace {

// Runs call(item, scratch) for all items; whatever it refers to outlives the run.
template <typename Call>
void over(Team& team, Index items, Index scratch, const Call& call) {
  team.run(
      items, scratch,
      [](const void* context, Index item, float* memory) { (*static_cast<const Call*>(context))(item, memory); },
      &call);
}

}  // namespace

void execute(Team& team, const Kernels& kernels, const Direct& layer, Index scratch) {
  over(team, layer.items, scratch, [&](Index item, float* memory) { kernels.direct(layer, item, memory); });
}

void execute(Team& team, const Kernels& kernels, const Winograd& layer, Index scratch) {
  if (layer.shared) {
    over(team, layer.transform_items, 0,
         [&](Index item, float* memory) { kernels.winograd_transform(layer, item, memory); });
  }
  over(team, layer.items, scratch, [&](Index item, float* memory) { kernels.winograd(layer, item, memory); });
}

void execute(Team& team, const Kernels& kernels, const Pool& layer) {
  over(team, layer.items, 0, [&](Index item, float*) { kernels.max_pool(layer, item); });
}

void execute_average(Team& team, const Kernels& kernels, const void* x, const Map& in, void* out) {
  over(team, in.n, 0, [&](Index item, float*) { kernels.average(x, in, out, item); });
}

void execute_add(Team& team, const Kernels& kernels, const void* a, const void* b, void* out, Index count, bool relu) {
  constexpr Index each = 1 << 14;
  over(team, (count + each - 1) / each, 0, [&](Index item, float*) {
    const Index first = item * each;
    kernels.add(a, b, out, first, std::min(first + each, count), relu);
  });
}

void execute(Team& team, const Kernels& kernels, const Conversion& conversion) {
  constexpr Index each = 8;
  const Index rows = conversion.n * conversion.h;
  over(team, (rows + each - 1) / each, 0, [&](Index item, float*) {
    for (Index row = item * each; row < std::min((item + 1) * each, rows); ++row) {
      kernels.convert(conversion, row);
    }
  });
}

void limit(Epilogue& epilogue) {
  if (epilogue.relu) {
    epilogue.steps.low = 0;
  }
}

bool execute(const Convolution& layer, Algorithm algorithm, const void* x, Index n, Index h, Index w, Epilogue epilogue,
             void* out, int threads) {
  const Kernels& kernels = *layer.machine().kernels;
  const Map in{n, h, w, layer.channels(), layer.channels()};
  if (algorithm == Algorithm::automatic) {
    algorithm = layer.choose(h, w);
  }
  bool infinite = false;
  const auto fill = [&](Direct& direct) {
    direct.epilogue.residual = epilogue.residual;
    direct.epilogue.residual_pixel = layer.out_channels();
    direct.epilogue.relu = epilogue.relu;
    direct.epilogue.residual_after_relu = epilogue.residual_after_relu;
    direct.epilogue.steps.infinite = &infinite;
    limit(direct.epilogue);
    direct.x = x;
    direct.out = out;
  };
  Team team(threads);
  if (algorithm == Algorithm::direct) {
    Direct direct = layer.direct(in, threads);
    fill(direct);
    execute(team, kernels, direct, direct_scratch(direct, kernels));
    return !infinite;
  }
  Winograd winograd = layer.winograd(algorithm == Algorithm::winograd4 ? 4 : 2, in, threads);
  fill(winograd.direct);
  thread_local Floats transformed;
  if (winograd.shared) {
    const Index floats = winograd_transformed(winograd);
    if (transformed.size() < floats) {
      transformed = Floats(floats);
    }
    winograd.transformed = transformed.data();
  }
  execute(team, kernels, winograd, winograd_scratch(winograd, kernels));
  return true;
}

}  // namespace resnet_fast::cpu
