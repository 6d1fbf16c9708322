// A libcuda.so.1 for machines without a GPU: as much of the driver as Triton's loader, launcher and tensor-map encoder
// call, for one GPU of capability 9.0. It computes nothing. It refuses what the CUDA driver API documents as wrong, and
// says which value was wrong and what would be right, in the words of the real error followed by a sentence. It refuses
// one race, too: a kernel that may start before the one before it is over, and does not wait for it.
#include "cuda.h"

#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  CAPABILITY = 90,
  MULTIPROCESSORS = 132,
  SHARED_WITHOUT_OPT_IN = 48 * 1024,
  SHARED_OPT_IN = 227 * 1024,
  SHARED_OF_MULTIPROCESSOR = 228 * 1024,
  REGISTERS_OF_BLOCK = 65536,
  REGISTERS_UNIT = 256,  // registers are handed out to warps in units of these
  THREADS_OF_BLOCK = 1024,
  PARAMETER_BYTES = 32764,
  PARAMETERS = 256,
  MEMORIES = 256,
  TENSOR_MAP_ALIGNMENT = 64,
  INSTRUCTION_BYTES = 16,
  ACQBULK = 0x02e,  // the lowest nine bits of the instruction that griddepcontrol.wait becomes
};

typedef struct {
  unsigned offset, size;
  int global;  // a pointer to global memory, as the compiler says
} Parameter;

typedef struct {
  char name[256];
  const char* image;
  int registers, local, threads_required, shared_allowed, parameters;
  int waits;                                 // for the kernel before (griddepcontrol.wait)
  unsigned parameter_bytes, parameter_bank;  // where in the constant bank parameters begin
  Parameter parameter[PARAMETERS];
} Function;

// What a tensor map of this driver holds. Triton clears bit 21 of the second word for old drivers: nothing is there.
typedef struct {
  char magic[8];
  uint8_t type, rank, swizzle, fill;
  uint32_t box[5];
  uint64_t address, dim[5], stride[4];
} Map;
_Static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static const char MAGIC[8] = "tensormp";

static char message[768];
static long launches, early, maps;
static struct {
  uintptr_t begin, end;
} memory[MEMORIES];
static int memories, shared_opt_in = SHARED_OPT_IN;
static char refused[256];
static CUresult refused_with;
static char* recorded;
static size_t recorded_bytes, recorded_most;
static int recording, context;

// --- for tests

// Declares memory of the device. As long as there is none, every address counts as the device's.
void fake_memory(const void* begin, size_t bytes) {
  if (memories == MEMORIES) abort();
  memory[memories].begin = (uintptr_t)begin;
  memory[memories++].end = (uintptr_t)begin + bytes;
}

void fake_forget_memory(void) { memories = 0; }

// The shared memory that a block may opt in to; 0: what the GPU has.
void fake_shared_memory(int bytes) { shared_opt_in = bytes ? bytes : SHARED_OPT_IN; }

// Every launch of the kernel with this name fails with this error, in the driver's words for it; "": none does.
void fake_refuse(const char* kernel, int error) {
  snprintf(refused, sizeof refused, "%s", kernel);
  refused_with = (CUresult)error;
}

long fake_launches(void) { return launches; }
long fake_early(void) { return early; }
long fake_tensor_maps(void) { return maps; }

// From now on the launches are written down, as bytes that are equal for equal launches.
void fake_record(int on) {
  recording = on;
  recorded_bytes = 0;
}

const char* fake_recorded(size_t* bytes) {
  *bytes = recorded_bytes;
  return recorded;
}

// --- errors

static const char* words(CUresult code) {
  switch (code) {
    case CUDA_SUCCESS:
      return "no error";
    case CUDA_ERROR_INVALID_VALUE:
      return "invalid argument";
    case CUDA_ERROR_OUT_OF_MEMORY:
      return "out of memory";
    case CUDA_ERROR_INVALID_IMAGE:
      return "device kernel image is invalid";
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
      return "no kernel image is available for execution on the device";
    case CUDA_ERROR_INVALID_PTX:
      return "a PTX JIT compilation failed";
    case CUDA_ERROR_NOT_FOUND:
      return "named symbol not found";
    case CUDA_ERROR_ILLEGAL_ADDRESS:
      return "an illegal memory access was encountered";
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
      return "too many resources requested for launch";
    default:
      return "unknown error";
  }
}

static CUresult refuse(CUresult code, const char* sentence, ...) {
  size_t used = snprintf(message, sizeof message, "%s: ", words(code));
  va_list values;
  va_start(values, sentence);
  vsnprintf(message + used, sizeof message - used, sentence, values);
  va_end(values);
  return code;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = message[0] ? message : words(code);
  return CUDA_SUCCESS;
}

// --- device and context

#undef cuCtxGetCurrent
#undef cuCtxSetCurrent
#undef cuCtxGetLimit
#undef cuCtxSetLimit
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice device) { return *c = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = shared_opt_in;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = SHARED_OF_MULTIPROCESSOR;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = REGISTERS_OF_BLOCK;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = MULTIPROCESSORS;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 1;
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, "this driver knows nothing of device attribute %d", attribute);
  }
  return CUDA_SUCCESS;
}

static int on_device(uintptr_t begin, uint64_t bytes) {
  for (int i = 0; i < memories; i++)
    if (begin >= memory[i].begin && begin + bytes <= memory[i].end) return 1;
  return memories == 0;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (!on_device(pointer, 1))
    return refuse(CUDA_ERROR_INVALID_VALUE, "address 0x%llx is not in memory of the device", (long long)pointer);
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

// --- modules: cubins are 64-bit ELF files, of which each kernel has a section .nv.info with attributes

enum { NO_VALUE = 1, BYTE_VALUE, HALF_VALUE, SIZED };
enum {
  PARAMETER_INFO = 0x17,
  PARAMETER_SIZE = 0x19,
  PARAMETER_BANK = 0x0a,
  REGISTERS = 0x2f,
  FRAME = 0x11,
  THREADS = 0x10
};

static void read_attributes(Function* f, const char* at, const char* end) {
  while (at + 4 <= end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t value;
    uint32_t word[3] = {0};
    memcpy(&value, at + 2, 2);
    at += 4;
    if (format == SIZED) {
      memcpy(word, at, value < sizeof word ? value : sizeof word);
      at += value;
    }
    if (attribute == REGISTERS) f->registers = word[1];
    if (attribute == FRAME) f->local = word[1];
    if (attribute == THREADS) f->threads_required = word[0] * word[1] * word[2];
    if (attribute == PARAMETER_SIZE) f->parameter_bytes = value;
    if (attribute == PARAMETER_BANK) f->parameter_bank = word[1] & 0xffff;
    if (attribute == PARAMETER_INFO) {
      unsigned index = word[1] & 0xffff;
      if (index >= PARAMETERS) abort();
      f->parameter[index] = (Parameter){word[1] >> 16, word[2] >> 18, (word[2] >> 8 & 15) == 4};
      if ((int)index >= f->parameters) f->parameters = index + 1;
    }
  }
}

static const Elf64_Shdr* section(const char* image, const char* name) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++)
    if (!strcmp(names + sections[i].sh_name, name)) return sections + i;
  return NULL;
}

static int waits(const char* image, const char* kernel) {
  char called[300];
  snprintf(called, sizeof called, ".text.%s", kernel);
  const Elf64_Shdr* code = section(image, called);
  for (uint64_t at = 0; code && at < code->sh_size; at += INSTRUCTION_BYTES) {
    uint64_t instruction;
    memcpy(&instruction, image + code->sh_offset + at, sizeof instruction);
    if ((instruction & 0x1ff) == ACQBULK) return 1;
  }
  return 0;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* header = image;
  if (memcmp(image, ELFMAG, SELFMAG) || header->e_machine != EM_CUDA)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "the module is no cubin");
  unsigned capability = header->e_ident[EI_ABIVERSION] > 7 ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  if (capability != CAPABILITY)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "the cubin is of capability %u, the GPU of %d", capability, CAPABILITY);
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  char called[300];
  snprintf(called, sizeof called, ".nv.info.%s", name);
  const Elf64_Shdr *all = section(image, ".nv.info"), *own = section(image, called);
  if (!own) return refuse(CUDA_ERROR_NOT_FOUND, "the cubin has no kernel %s", name);
  Function* f = calloc(1, sizeof *f);
  snprintf(f->name, sizeof f->name, "%s", name);
  f->image = image;
  f->shared_allowed = SHARED_WITHOUT_OPT_IN;
  f->waits = waits(image, name);
  if (all) read_attributes(f, image + all->sh_offset, image + all->sh_offset + all->sh_size);
  read_attributes(f, image + own->sh_offset, image + own->sh_offset + own->sh_size);
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

static int registers_of(const Function* f, int threads) {
  int of_warp = (f->registers * 32 + REGISTERS_UNIT - 1) / REGISTERS_UNIT * REGISTERS_UNIT;
  return of_warp * ((threads + 31) / 32);
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const Function* f = (const Function*)function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = f->registers;
      break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = f->local;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = 0;
      break;  // Triton's kernels have dynamic memory alone
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      for (*value = THREADS_OF_BLOCK; registers_of(f, *value) > REGISTERS_OF_BLOCK;) *value -= 32;
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, "this driver knows nothing of function attribute %d", attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || value > shared_opt_in)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of dynamic shared memory are opted in to, the GPU has %d", value,
                  shared_opt_in);
  ((Function*)function)->shared_allowed = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return *clusters = 1, CUDA_SUCCESS;
}

// --- tensor maps: the rules of cuTensorMapEncodeTiled in the driver API's documentation

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dim, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widths[] = {0, 32, 64, 128};  // bytes of an inner box, by swizzle
  const CUresult wrong = CUDA_ERROR_INVALID_VALUE;
  typedef unsigned long long Wide;
  maps++;
  if ((uintptr_t)map % TENSOR_MAP_ALIGNMENT)
    return refuse(wrong, "the tensor map lies at %p, it must lie at a multiple of %d", map, TENSOR_MAP_ALIGNMENT);
  if ((unsigned)type >= sizeof sizes / sizeof *sizes)
    return refuse(wrong, "a tensor map's data type is %d, there are 0 to %zu", type, sizeof sizes / sizeof *sizes - 1);
  if (rank < 1 || rank > 5) return refuse(wrong, "a tensor map's rank is %u, it must be 1 to 5", rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return refuse(wrong, "a tensor map's interleave is %d, this driver knows 0 alone", interleave);
  if ((uintptr_t)address % 16)
    return refuse(wrong, "a tensor map's global address %p is no multiple of 16 bytes", address);
  unsigned item = sizes[type];
  uint64_t extent = item;  // bytes from the first element to the end of the last
  for (unsigned i = 0; i < rank; i++) {
    if (dim[i] == 0 || dim[i] > 1ull << 32)
      return refuse(wrong, "dimension %u of a tensor map has %llu elements, it must have 1 to 2^32", i, (Wide)dim[i]);
    if (box[i] == 0 || box[i] > 256)
      return refuse(wrong, "the box of a tensor map has %u elements in dimension %u, it must have 1 to 256", box[i], i);
    if (step[i] == 0 || step[i] > 8)
      return refuse(wrong, "element stride %u of a tensor map is %u, it must be 1 to 8", i, step[i]);
    if (i + 1 < rank && (stride[i] == 0 || stride[i] % 16 || stride[i] >= 1ull << 40))
      return refuse(wrong, "stride %u of a tensor map is %llu bytes, it must be a multiple of 16 below 2^40", i,
                    (Wide)stride[i]);
    if (i && i + 1 < rank && (stride[i] % stride[i - 1] || stride[i] / stride[i - 1] < dim[i]))
      return refuse(wrong, "stride %u of a tensor map is %llu bytes, it must be %llu or more of the %llu before", i,
                    (Wide)stride[i], (Wide)dim[i], (Wide)stride[i - 1]);
    extent += (dim[i] - 1) * (i ? stride[i - 1] : item);
  }
  unsigned inner = box[0] * item;
  if (inner % 16) return refuse(wrong, "the inner box of a tensor map has %u bytes, no multiple of 16", inner);
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return refuse(wrong, "this driver knows no swizzle %d", swizzle);
  if (swizzle && inner > widths[swizzle])
    return refuse(wrong, "the inner box of a tensor map has %u bytes, its swizzle at most %u", inner, widths[swizzle]);
  if (fill && type <= CU_TENSOR_MAP_DATA_TYPE_INT64)
    return refuse(wrong, "a tensor map of whole numbers, type %d, is to be filled with NaN", type);
  if (!on_device((uintptr_t)address, extent))
    return refuse(wrong, "a tensor map covers %llu bytes from %p on, and no memory of the device does", (Wide)extent,
                  address);
  Map made = {.type = type, .rank = rank, .swizzle = swizzle, .fill = fill, .address = (uintptr_t)address};
  memcpy(made.magic, MAGIC, sizeof MAGIC);
  memcpy(made.dim, dim, rank * sizeof *dim);
  memcpy(made.stride, stride, (rank - 1) * sizeof *stride);
  memcpy(made.box, box, rank * sizeof *box);
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

// --- launches

static void write_down(const void* bytes, size_t size) {
  if (recorded_bytes + size > recorded_most) {
    recorded_most = 2 * (recorded_bytes + size);
    recorded = realloc(recorded, recorded_most);
    if (!recorded) abort();
  }
  memcpy(recorded + recorded_bytes, bytes, size);
  recorded_bytes += size;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  const Function* f = (const Function*)function;
  const CUresult wrong = CUDA_ERROR_INVALID_VALUE;
  if (!strcmp(f->name, refused)) {
    message[0] = 0;
    return refused_with;
  }
  launches++;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 0x7fffffff || c->gridDimY > 65535 ||
      c->gridDimZ > 65535)
    return refuse(wrong, "%s: the grid is %u x %u x %u, at most 2^31 - 1 x 65535 x 65535 are allowed", f->name,
                  c->gridDimX, c->gridDimY, c->gridDimZ);
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  if (threads == 0 || threads > THREADS_OF_BLOCK)
    return refuse(wrong, "%s: a block has %u threads, it must have 1 to %d", f->name, threads, THREADS_OF_BLOCK);
  if (f->threads_required && (int)threads != f->threads_required)
    return refuse(wrong, "%s: a block has %u threads, the kernel is compiled for %d", f->name, threads,
                  f->threads_required);
  if (registers_of(f, threads) > REGISTERS_OF_BLOCK)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u threads of %d registers take %d, a block has %d", f->name,
                  threads, f->registers, registers_of(f, threads), REGISTERS_OF_BLOCK);
  if ((int)c->sharedMemBytes > f->shared_allowed)
    return refuse(wrong, "%s: %u bytes of dynamic shared memory, opted in were %d", f->name, c->sharedMemBytes,
                  f->shared_allowed);
  if (f->parameter_bytes > PARAMETER_BYTES)
    return refuse(wrong, "%s: %u bytes of parameters, at most %d are allowed", f->name, f->parameter_bytes,
                  PARAMETER_BYTES);
  for (int i = 0; i < f->parameters; i++) {
    const Parameter* p = f->parameter + i;
    if (p->offset + p->size > f->parameter_bytes)
      return refuse(wrong, "%s: parameter %d ends at %u of %u bytes", f->name, i, p->offset + p->size,
                    f->parameter_bytes);
    if (p->size == sizeof(CUtensorMap)) {
      const Map* map = parameters[i];
      if ((f->parameter_bank + p->offset) % TENSOR_MAP_ALIGNMENT)
        return refuse(wrong, "%s: parameter %d is a tensor map at 0x%x of the constant bank, no multiple of %d",
                      f->name, i, f->parameter_bank + p->offset, TENSOR_MAP_ALIGNMENT);
      if (memcmp(map->magic, MAGIC, sizeof MAGIC))
        return refuse(wrong, "%s: parameter %d is no tensor map of cuTensorMapEncodeTiled", f->name, i);
      if (!on_device(map->address, 1))
        return refuse(wrong, "%s: parameter %d is a tensor map of 0x%llx, no memory of the device", f->name, i,
                      (unsigned long long)map->address);
    }
    if (p->global) {
      uint64_t pointer;
      memcpy(&pointer, parameters[i], sizeof pointer);
      if (pointer && !on_device(pointer, 1))
        return refuse(wrong, "%s: parameter %d points to 0x%llx, no memory of the device", f->name, i,
                      (unsigned long long)pointer);
    }
  }
  int started_early = 0;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      started_early = c->attrs[i].value.programmaticStreamSerializationAllowed;
  if (started_early && !f->waits)
    return refuse(wrong, "%s: it may start before the kernel before it is over, and never waits for it", f->name);
  early += started_early;
  if (recording) {
    unsigned shape[] = {c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes, c->numAttrs, started_early};
    write_down(&f->image, sizeof f->image);
    write_down(shape, sizeof shape);
    write_down(&c->hStream, sizeof c->hStream);
    for (int i = 0; i < f->parameters; i++) write_down(parameters[i], f->parameter[i].size);
  }
  return CUDA_SUCCESS;
}
