// conv_bn_act on Hopper (compute capability 9.0, machine code for sm_90a): CUTLASS's collectives with an epilogue of
// our own. One kernel per .cu file of the name conv_bn_act_sm90_*; each is a few lines and registers itself. Not a
// kernel written by hand: copies, barriers and matrix products are CUTLASS's.
//
// Floor: x, weight and residual read once and out written once, or 2 n p q k r s c operations.
// Tile: pixels by output channels. In CUTLASS's terms M = n p q, N = k, K = r s c, so that a channel is a column of the
// tile and scale and shift are rows broadcast along M.
//   cutlass_conv: x comes by im2col copies of BLOCK_M pixels times BLOCK_K channels, one (r, s) at a time; zeros arrive
//     outside the image and beyond c. One warp copies, one warpgroup multiplies; a block computes one tile.
//   cutlass_gemm: 1x1, stride 1, no padding, where x is a matrix [n h w, c]. Persistent: two warpgroups take turns, one
//     multiplies while the other is in its epilogue.
// Traps: the residual's tensor map must be valid even where there is no residual (a warp prefetches it), so it then
// describes `out`, and nothing is read through it. CUTLASS's ReLU functors disagree about NaN; relu() of numeric.cuh
// keeps it. In cutlass_conv, CUTLASS walks over (c, s, r) with an iterator that holds a reference to a temporary: the
// compiler keeps the value in registers, but host code that does the same, unoptimised, reads garbage.
#pragma once

#include "kernels/conv_bn_act_sm90_tensor_map.h"

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "cute/tensor.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"
#include "kernels/conv_bn_act.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fast::sm90 {

template <Precision PRECISION>
struct Types;
template <>
struct Types<Precision::fp16> {
  using Element = cutlass::half_t;
  static constexpr const char* name = "fp16";
};
template <>
struct Types<Precision::bf16> {
  using Element = cutlass::bfloat16_t;
  static constexpr const char* name = "bf16";
};
// Stored as float; the copy engine converts to tf32 on the way into shared memory.
template <>
struct Types<Precision::tf32> {
  using Element = float;
  static constexpr const char* name = "tf32";
};

// ---- The epilogue: a tree of CUTLASS's visitors whose root is BnAct -------------------------------------------------

// What every node of the tree has to say, for one with plain arguments, no shared memory and no copies of its own.
template <typename Plain>
struct PlainNode {
  struct SharedStorage {};
  using Arguments = Plain;
  using Params = Plain;

  template <typename ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <typename ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <typename ProblemShape>
  static std::size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <typename ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PlainNode() {}
  CUTLASS_HOST_DEVICE PlainNode(const Params& given, const SharedStorage&) : params(given) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <typename... Parts>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Parts...>&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  Params params{};
};

struct ResidualArguments {
  bool present = false;
};

// The residual's tile, which the copying warp fetches only if there is a residual. CUTLASS's node for it fetches always
// and leaves the choice to a factor beta.
struct Residual : PlainNode<ResidualArguments> {
  using PlainNode<ResidualArguments>::PlainNode;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.present; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.present; }

  template <typename Tile>
  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(const Tile& tile) : registers(tile) {}

    const Tile& registers;

    template <typename Accumulator, int SIZE>
    CUTLASS_DEVICE cutlass::Array<typename Tile::value_type, SIZE> visit(const cutlass::Array<Accumulator, SIZE>&,
                                                                         int part, int, int) {
      return cute::recast<cutlass::Array<typename Tile::value_type, SIZE>>(registers)(part);
    }
  };

  template <bool REFERENCE_SOURCE, typename... Parts>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Parts...>& arguments) {
    if (!params.present) cute::clear(arguments.tCrC);  // else nothing ever writes these registers
    return ConsumerStoreCallbacks<std::remove_cvref_t<decltype(arguments.tCrC)>>(arguments.tCrC);
  }
};

struct BnActArguments {
  bool relu = false;
  bool add_before = false;  // the residual, before the activation
  bool add_after = false;   // or behind it; neither if there is none
};

// act(accumulator * scale + shift + residual) or act(accumulator * scale + shift) + residual, in float, rounded to
// Element at the end. What to do is asked at run time, alike by all threads, so that one kernel serves every case.
template <typename Element>
struct BnAct : PlainNode<BnActArguments> {
  using PlainNode<BnActArguments>::PlainNode;

  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(const BnActArguments& given) : todo(given) {}

    BnActArguments todo;

    template <typename Stored, int SIZE>
    CUTLASS_DEVICE cutlass::Array<Element, SIZE> visit(const cutlass::Array<float, SIZE>& accumulator, int, int, int,
                                                       const cutlass::Array<float, SIZE>& scale,
                                                       const cutlass::Array<float, SIZE>& shift,
                                                       const cutlass::Array<Stored, SIZE>& stored) {
      const cutlass::Array<float, SIZE> residual = cutlass::NumericArrayConverter<float, Stored, SIZE>{}(stored);
      cutlass::Array<float, SIZE> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < SIZE; ++i) {
        float value = fmaf(accumulator[i], scale[i], shift[i]);
        // Not `+ 0` where there is no residual: that would turn -0 into 0.
        if (todo.add_before) value += residual[i];
        if (todo.relu) value = relu(value);
        if (todo.add_after) value += residual[i];
        y[i] = value;
      }
      return cutlass::NumericArrayConverter<Element, float, SIZE>{}(y);
    }
  };

  template <bool REFERENCE_SOURCE, typename... Parts>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Parts...>&) {
    return ConsumerStoreCallbacks(params);
  }
};

template <typename Element, typename Tile>
using Epilogue =
    cutlass::epilogue::fusion::Sm90EVT<BnAct<Element>,                                               //
                                       cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>,  // scale
                                       cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>,  // shift
                                       Residual>;

template <typename EpilogueArguments>
EpilogueArguments epilogue_arguments(const ConvBnAct& problem) {
  const bool residual = problem.residual != nullptr;
  EpilogueArguments arguments{};
  arguments.op_0.ptr_row = problem.scale;
  arguments.op_1.ptr_row = problem.shift;
  arguments.op_2.present = residual;
  arguments.op_3.relu = problem.relu;
  arguments.op_3.add_before = residual && !problem.residual_after_activation;
  arguments.op_3.add_after = residual && problem.residual_after_activation;
  return arguments;
}

// ---- The two kernels ------------------------------------------------------------------------------------------------

// Clusters of that many blocks with the same output channels, which share each tile of the weights: it comes once.
template <int CLUSTER>
using ClusterShape = cute::Shape<cute::Int<CLUSTER>, cute::_1, cute::_1>;

// BLOCKS: that many blocks are to fit on a multiprocessor, by registers; STAGES says the same for shared memory.
template <Precision PRECISION, int BLOCK_M, int BLOCK_N, int BLOCK_K, int CLUSTER, int STAGES, int BLOCKS>
struct Conv {
  static constexpr Precision precision = PRECISION;
  static constexpr const char* kind = "conv";
  static constexpr const char* algorithm = "cutlass_conv";
  static constexpr int block_m = BLOCK_M, block_n = BLOCK_N, block_k = BLOCK_K, cluster = CLUSTER;

  using Element = typename Types<PRECISION>::Element;
  using Layout = cutlass::layout::TensorNHWC;
  using Cluster = ClusterShape<CLUSTER>;
  using Tile = cute::Shape<cute::Int<BLOCK_M>, cute::Int<BLOCK_N>, cute::Shape<cute::Int<BLOCK_K>>>;
  static constexpr int alignment = 16 / sizeof(Element);

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Layout, alignment, Element, Layout,
      alignment, cutlass::epilogue::TmaWarpSpecialized, Epilogue<Element, Tile>>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Element, Layout, alignment,
      Element, Layout, alignment, float, Tile, Cluster, cutlass::conv::collective::StageCount<STAGES>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

  struct Kernel : cutlass::conv::kernel::ConvUniversal<Problem, CollectiveMainloop, CollectiveEpilogue> {
    static constexpr std::uint32_t MinBlocksPerMultiprocessor = BLOCKS;
  };
  static constexpr int stages = CollectiveMainloop::DispatchPolicy::Stages;

  static std::string unsupported(const ConvBnAct& problem) {
    if (problem.stride_h > 8 || problem.stride_w > 8) return "stride above 8";
    // Offsets inside the image are 8 bits each: signed for the corners of the box of pixels, unsigned for the tap.
    if (problem.pad_h > 128 || problem.pad_w > 128) return "padding above 128";
    const std::int64_t reach_h = static_cast<std::int64_t>(problem.r - 1) * problem.dilation_h;
    const std::int64_t reach_w = static_cast<std::int64_t>(problem.s - 1) * problem.dilation_w;
    if (reach_h >= 255 || reach_w >= 255 || reach_h - problem.pad_h > 128 || reach_w - problem.pad_w > 128) {
      return "a filter that reaches too far";
    }
    return "";
  }

  static typename Kernel::Arguments arguments(const ConvBnAct& problem, int /*multiprocessors*/) {
    const Problem shape(cutlass::conv::Mode::kCrossCorrelation, {problem.n, problem.h, problem.w, problem.c},
                        {problem.k, problem.r, problem.s, problem.c}, {problem.pad_h, problem.pad_w},
                        {problem.pad_h, problem.pad_w}, {problem.stride_h, problem.stride_w},
                        {problem.dilation_h, problem.dilation_w}, 1);
    typename Kernel::StrideD stride{};  // ((q, p, n), k, 1), the reverse of [n, p, q, k]
    cute::get<0, 0>(stride) = shape.stride_C[2];
    cute::get<0, 1>(stride) = shape.stride_C[1];
    cute::get<0, 2>(stride) = shape.stride_C[0];
    Element* const out = static_cast<Element*>(problem.out);
    const Element* const residual = problem.residual != nullptr ? static_cast<const Element*>(problem.residual) : out;
    return {shape,
            {static_cast<const Element*>(problem.x), static_cast<const Element*>(problem.weight)},
            {epilogue_arguments<typename CollectiveEpilogue::FusionCallbacks::Arguments>(problem), residual, stride,
             out, stride}};
  }
};

// As many stages as shared memory holds: persistent, so one block on a multiprocessor.
template <Precision PRECISION, int BLOCK_M, int BLOCK_N, int BLOCK_K, int CLUSTER>
struct Gemm {
  static constexpr Precision precision = PRECISION;
  static constexpr const char* kind = "gemm";
  static constexpr const char* algorithm = "cutlass_gemm";
  static constexpr int block_m = BLOCK_M, block_n = BLOCK_N, block_k = BLOCK_K, cluster = CLUSTER;

  using Element = typename Types<PRECISION>::Element;
  using Cluster = ClusterShape<CLUSTER>;
  using Tile = cute::Shape<cute::Int<BLOCK_M>, cute::Int<BLOCK_N>, cute::Int<BLOCK_K>>;
  static constexpr int alignment = 16 / sizeof(Element);

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, cutlass::layout::RowMajor, alignment,
      Element, cutlass::layout::RowMajor, alignment, cutlass::epilogue::TmaWarpSpecialized,
      Epilogue<Element, Tile>>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, alignment, Element,
      cutlass::layout::ColumnMajor, alignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Problem = cute::Shape<int, int, int, int>;  // M, N, K and the batch, which is 1

  struct Kernel : cutlass::gemm::kernel::GemmUniversal<Problem, CollectiveMainloop, CollectiveEpilogue> {};
  static constexpr int stages = CollectiveMainloop::DispatchPolicy::Stages;

  static std::string unsupported(const ConvBnAct& problem) {
    const bool product = problem.r == 1 && problem.s == 1 && problem.stride_h == 1 && problem.stride_w == 1 &&
                         problem.pad_h == 0 && problem.pad_w == 0;
    return product ? "" : "other than 1x1 with stride 1 and no padding";
  }

  static typename Kernel::Arguments arguments(const ConvBnAct& problem, int multiprocessors) {
    const int m = static_cast<int>(static_cast<std::int64_t>(problem.n) * problem.h * problem.w);
    const auto stride_x = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, problem.c, 1});
    const auto stride_weight = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {problem.k, problem.c, 1});
    const auto stride = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, problem.k, 1});
    Element* const out = static_cast<Element*>(problem.out);
    const Element* const residual = problem.residual != nullptr ? static_cast<const Element*>(problem.residual) : out;
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = multiprocessors;
    return {
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, problem.k, problem.c, 1},
        {static_cast<const Element*>(problem.x), stride_x, static_cast<const Element*>(problem.weight), stride_weight},
        {epilogue_arguments<typename CollectiveEpilogue::FusionCallbacks::Arguments>(problem), residual, stride, out,
         stride},
        hardware};
  }
};

// ---- What ConvBnActKernel asks for ----------------------------------------------------------------------------------

inline bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// The output's extent for one side of the image, as torch counts it.
inline std::int64_t extent(std::int64_t image, std::int64_t filter, std::int64_t pad, std::int64_t stride,
                           std::int64_t dilation) {
  const std::int64_t room = image + 2 * pad - dilation * (filter - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

template <typename Form>
std::string unsupported(const ConvBnAct& problem) {
  const ConvBnAct& p = problem;
  if (p.precision != Form::precision) return std::string("precision other than ") + Types<Form::precision>::name;
  if (p.groups != 1) return "groups";
  if (p.n <= 0 || p.h <= 0 || p.w <= 0 || p.c <= 0 || p.k <= 0 || p.p <= 0 || p.q <= 0) return "empty tensors";
  if (p.r <= 0 || p.s <= 0 || p.stride_h <= 0 || p.stride_w <= 0 || p.pad_h < 0 || p.pad_w < 0 || p.dilation_h <= 0 ||
      p.dilation_w <= 0) {
    return "a filter, stride, padding or dilation out of range";
  }
  if (p.c % Form::alignment != 0) return "c other than a multiple of " + std::to_string(Form::alignment);
  if (p.k % Form::alignment != 0) return "k other than a multiple of " + std::to_string(Form::alignment);
  if (!aligned(p.x, 16) || !aligned(p.weight, 16) || !aligned(p.residual, 16) || !aligned(p.out, 16)) {
    return "tensors not aligned to 16 bytes";
  }
  if (!aligned(p.scale, sizeof(float)) || !aligned(p.shift, sizeof(float))) return "scale or shift not aligned";
  std::string reason = Form::unsupported(p);
  if (!reason.empty()) return reason;
  if (p.p != extent(p.h, p.r, p.pad_h, p.stride_h, p.dilation_h) ||
      p.q != extent(p.w, p.s, p.pad_w, p.stride_w, p.dilation_w)) {
    return "p and q other than those of this image, filter, stride, padding and dilation";
  }
  // CUTLASS counts pixels, and the tiles of the grid, in 32 bits.
  const std::int64_t pixels = static_cast<std::int64_t>(p.n) * p.p * p.q;
  const std::int64_t columns = ceil_div(p.k, Form::block_n);
  const std::int64_t rows = ceil_div(pixels, Form::block_m * Form::cluster) * Form::cluster;
  if (rows * Form::block_m > INT32_MAX || columns > 65535 || rows * columns > INT32_MAX) {
    return "more than 2^31 pixels or tiles";
  }
  if (!Form::Kernel::can_implement(Form::arguments(p, 1))) return "what CUTLASS refuses";
  return "";
}

template <typename Form>
std::size_t workspace(const ConvBnAct& problem) {
  return Form::Kernel::get_workspace_size(Form::arguments(problem, 1));
}

template <typename Form>
cudaError_t launch_kernel(const ConvBnAct& problem, cudaStream_t stream) {
  using Kernel = typename Form::Kernel;
  if (!unsupported<Form>(problem).empty()) return cudaErrorInvalidValue;
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  // The runtime answers from its own memory.
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Kernel::SharedStorageSize);
  }
  if (error == cudaSuccess) {
    tensor_map_error = CUDA_SUCCESS;
    const auto params = Kernel::to_underlying_arguments(Form::arguments(problem, multiprocessors), problem.workspace);
    if (tensor_map_error != CUDA_SUCCESS) {
      return tensor_map_error == CUDA_ERROR_NOT_FOUND ? cudaErrorCallRequiresNewerDriver : cudaErrorInvalidValue;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = Form::cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, cutlass::device_kernel<Kernel>, params);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is reported here; the next launch is not to find it
  return error;
}

template <typename Form>
std::string kernel_name() {
  return std::string("sm90_") + Types<Form::precision>::name + "_" + Form::kind + "_" + std::to_string(Form::block_m) +
         "x" + std::to_string(Form::block_n) + "x" + std::to_string(Form::block_k);
}

template <typename Form>
ConvBnActKernel kernel() {
  ConvBnActKernel described;
  described.name = kernel_name<Form>();
  described.algorithm = Form::algorithm;
  described.least_capability = 90;
  described.most_capability = 90;
  described.precision = Form::precision;
  described.block_m = Form::block_m;
  described.block_n = Form::block_n;
  described.block_k = Form::block_k;
  described.stages = Form::stages;
  described.threads = Form::Kernel::MaxThreadsPerBlock;
  described.shared_bytes = Form::Kernel::SharedStorageSize;
  described.unsupported = unsupported<Form>;
  described.workspace = workspace<Form>;
  described.launch = launch_kernel<Form>;
  return described;
}

}  // namespace resnet_fast::sm90
