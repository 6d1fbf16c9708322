// What is compiled for the instruction set "portable".
namespace resnet_fast::cpu::portable {}
