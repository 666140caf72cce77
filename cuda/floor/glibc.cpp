// Binds functions to the version that they had in the oldest glibc of x86-64, which every later
// glibc still has: a module asks for the newest version of what the machine that builds it has, and
// an older machine could not load it. glibc 2.34 gave dlopen and its like a new version when it
// moved them into libc, 2.29 exp when it stopped calling a user's matherr; what they return is the
// same.
//
// CMakeLists.txt gives M3I_OLD_FUNCTIONS, such as M3I_BIND(exp, 2.2.5) M3I_BIND(dlmopen, 2.3.4),
// and links with --wrap=exp: every call of exp then goes to __wrap_exp, which jumps on.

#define M3I_BIND(name, version)                                                    \
  __asm__(".symver m3i_old_" #name "," #name "@GLIBC_" #version                    \
          "\n"                                                                     \
          ".pushsection .text\n"                                                   \
          ".hidden __wrap_" #name "\n.globl __wrap_" #name "\n.type __wrap_" #name \
          ",@function\n"                                                           \
          "__wrap_" #name ":\n  jmp m3i_old_" #name                                \
          "@PLT\n"                                                                 \
          ".size __wrap_" #name ",.-__wrap_" #name "\n.popsection");

M3I_OLD_FUNCTIONS
