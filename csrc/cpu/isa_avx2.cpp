// What is compiled for the instruction set "avx2".
namespace resnet_fast::cpu::avx2 {}
