// What the sources of each instruction set implement: convolutions, pooling and sums on channels_last float32, bfloat16
// or uint8. Sums are float32 for the first two and int32 for uint8, exact there; they are rounded once when stored.
//
// A layer is described once, with its blocking; its work is cut into items that threads take in any order. An item
// gives the same bits whoever computes it, with which others, and in whatever batch: each output is one sum, taken in
// the order of filter rows, columns and channels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resnet_fast::cpu {

using Index = std::ptrdiff_t;

// What images and outputs hold. uint8 stands for real numbers: scale * (stored - zero point).
enum class Element { float32, bfloat16, uint8 };

// The upper half of a float.
struct Bfloat16 {
  std::uint16_t bits;
};

struct Uint8 {
  std::uint8_t bits;
};

// Words of a transformed tile that lie next to each other, and the distance from one tile's to the next one's: no
// multiple of a page, so that rows do not fall on the same lines of the cache; also the words that are multiplied
// between two looks at how many were. A word is 4 bytes: a float, two neighbouring bfloat16 if the instruction set
// multiplies such pairs, or four uint8.
constexpr int chunk = 64;
constexpr int chunk_stride = 80;

constexpr int largest_block = 16;  // tiles of an item
constexpr int tile_side = 16;      // rows of a matrix tile, and words of a row

// Channels whose products are added up in registers before their sum is added to the total, if Winograd's output
// transform is to enlarge its rounding error.
constexpr int winograd_partial_sum = 32;

// An image batch [n, h, w, c] in memory: `pixel` elements from one pixel to the next, rows and images dense.
struct Map {
  Index n, h, w, c;
  Index pixel;
};

// From sums to what is stored, if images or outputs are uint8: sum * scale[k] + bias[k], with a residual of uint8 times
// its scale, is the real value in steps of the output, where its zero point is not added yet. (The zero points of image
// and residual are in the bias.)
struct Steps {
  const float* scale;     // [k]; null if neither is uint8
  float residual_scale;   // of a residual in uint8
  float low, high;        // that can be stored
  int zero;               // the output's zero point
  bool short_sums;        // of integers below 2^22, which begin at steps_start
  bool bounded;           // no real value is 2^31 steps or more
  std::uint32_t padding;  // a word of what images have outside
  bool* infinite;         // set if a float32 image gave what is not a number that can be stored
};

// 1.5 * 2^23: an integer below 2^22 in magnitude, added to its bits, makes the bits of a float that is as much larger,
// so that no conversion is needed; the bias takes it away again.
constexpr float steps_start = 12582912;

// What happens to a sum before it is stored.
struct Epilogue {
  const float* bias;         // [k]
  const void* residual;      // pixels of k elements, or null; they may lie where the outputs are stored
  Index residual_pixel;      // elements from one pixel of the residual to the next
  Element residual_element;  // the output's, or uint8
  bool relu;
  bool residual_after_relu;
  Steps steps;
};

struct Window {
  Index r, s;
  Index stride_h, stride_w;
  Index pad_h, pad_w;
  Index dilation_h, dilation_w;
};

// Where products find the pixels under a filter's window: in the image, which is so for 1x1; in copies of its lines
// with their padding; or in a copy of each window, if those are less to copy, as with large dilations.
enum class Reading { image, lines, windows };

// A convolution as products of pixels and packed weights.
struct Direct {
  const void* x;
  Map in;
  Window window;
  Index groups;
  Index p, q, k;         // output height, width and channels
  const float* weights;  // as Convolution packs them
  Epilogue epilogue;
  void* out;
  Index out_pixel;
  bool narrow_groups;  // of 1, 2, 4 or 8 channels, fewer than a vector has: a vector holds several groups
  Index run_words;     // Kernels'
  // blocking
  bool merged;  // a filter row's pixels are one run of words
  Reading reading;
  bool by_rows;           // an item's pixels are part of one or two rows: of each, only the columns needed are copied
  Index line_pixel;       // of copied lines, elements from one pixel to the next
  Index line_distance;    // and from one line to the next
  Index window_distance;  // of copied windows, words from one to the next
  Index copied_floats;    // that the copies of an item take
  // Whether a run of bfloat16 ends within a word, so that infinity or NaN behind it, times a weight of 0, would be NaN:
  // outputs that are no finite numbers are computed again, each from a copy of its window.
  bool checked;
  Index tiles;  // of tile_rows pixels each, the last ones evenly
  Index tiles_per_block, blocks;
  Index panels;  // of panel_width output channels in a group
  Index panels_per_item, splits;
  Index items;
  // With matrix tiles, instead of tiles and tiles_per_block.
  Index blocks_y, blocks_x;  // of each image; if it is read as it is, a block is a run of pixels of all images
  Index row_pixels;          // from a row of a block's outputs to the next, in steps from one output to the next
  Index plane_distance;      // elements from one plane of copied lines to the next
};

// A 3x3 convolution of stride 1 by Winograd's minimal filtering F(m x m, 3 x 3).
struct Winograd {
  int m;                 // 2 or 4
  Direct direct;         // the same layer, for tiles with infinities or NaN
  const float* filters;  // [panels][(m + 2)^2][c][panel_width]
  Index tiles_y, tiles_x, tiles;
  Index tiles_per_block, blocks;
  Index panels, panels_per_item, splits;
  bool shared;         // transformed images are made in a step of their own, for all items
  float* transformed;  // then here: [blocks][(m + 2)^2][chunks][tiles_per_block][chunk_stride]
  Index transform_items, items;
};

struct Pool {
  const void* x;
  Map in;
  Window window;
  Index p, q;
  void* out;
  Index out_pixel;
  Index items;  // rows of the output
};

// A value [n, h, w, c] in any strides, channels last: a copy, or another kind of element, of which real = scale *
// (stored - zero).
struct Conversion {
  const void* x = nullptr;
  Index n = 0, h = 0, w = 0, c = 0;
  Index stride_n = 0, stride_h = 0, stride_w = 0, stride_c = 0;
  void* out = nullptr;
  Index out_pixel = 0;
  float scale = 1;
  int zero = 0, largest = 255;
  bool* infinite = nullptr;
};

// Functions of one instruction set for images of one kind of element and outputs of another; all but `direct` and
// `convert` are there only if both are the same, and not for uint8 if null. `scratch` is the calling thread's, of as
// many floats as the layer asked for.
struct Kernels {
  Element element, out_element;
  int word_elements;  // of the gathered pixels and packed weights of `direct`: 2 if pairs of bfloat16 are multiplied
  int lanes;
  int tile_rows;
  int panel_width;  // 2 * lanes
  int run_words;    // a run's packed words are a multiple of it
  bool tiles;       // `direct` multiplies matrix tiles of tile_side rows and run_words words
  void (*direct)(const Direct&, Index item, float* scratch);
  void (*winograd_transform)(const Winograd&, Index item, float* scratch);
  void (*winograd)(const Winograd&, Index item, float* scratch);
  void (*max_pool)(const Pool&, Index item);
  // [n, h, w, c] to the mean of each image's pixels, [n, c]; an item is an image.
  void (*average)(const void* x, const Map& in, void* out, Index item);
  // out = relu(a + b), or a + b; dense, elements [first, last).
  void (*add)(const void* a, const void* b, void* out, Index first, Index last, bool relu);
  // An item is a row of pixels.
  void (*convert)(const Conversion&, Index item);
};

constexpr Index bytes_of(Element element) {
  return element == Element::float32 ? 4 : element == Element::bfloat16 ? 2 : 1;
}

inline constexpr const char* element_names[] = {"float32", "bfloat16", "uint8"};
constexpr const char* name_of(Element element) { return element_names[static_cast<int>(element)]; }

// By element. Which of them there are, cpu.h's compiled() says.
extern const Kernels kernels_portable[2];
extern const Kernels kernels_avx2[2];
extern const Kernels kernels_avx512[2];
// Images of uint8, outputs of uint8 and of float32; images of float32, outputs of uint8.
extern const Kernels kernels_avx512_vnni[3];
// Images of bfloat16; images of float32, rounded to bfloat16, and outputs of uint8. The rest is as before.
extern const Kernels kernels_avx512_bf16[2];
// The same two, and images of uint8 with outputs of uint8 and of float32.
extern const Kernels kernels_amx[4];

// Those of the instruction set that isa() says; null if it has none for such images and outputs.
const Kernels* kernels_for(Element in, Element out);

// Of scratch, for pointers to as many windows.
constexpr Index window_floats(Index windows) { return (windows * Index{sizeof(char*) / sizeof(float)} + 15) / 16 * 16; }

// Of a copy of one window, as Convolution packs its weights.
Index window_words(const Direct& layer, const Kernels& kernels);

Index direct_scratch(const Direct& layer, const Kernels& kernels);
Index tiles_scratch(const Direct& layer, const Kernels& kernels);
Index winograd_scratch(const Winograd& layer, const Kernels& kernels);

}  // namespace resnet_fast::cpu
