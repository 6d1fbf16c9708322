// What is compiled for the instruction set "avx512".
namespace resnet_fast::cpu::avx512 {}
