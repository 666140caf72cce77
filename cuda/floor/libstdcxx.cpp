// Defines what newer releases of g++ take from newer libraries, so that a module loads beside the
// libstdc++ of GCC 8 and glibc 2.28 (manylinux_2_28, the floor of torch's own wheels). The library
// is still the shared one: exceptions and streams cross the border to torch.

#include <new>
#include <sstream>
#include <string>

#if defined(__GLIBCXX__) && defined(__GLIBC__)

// g++ 9 and newer leave these to the library, where an older one has them inline.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#if __cplusplus > 201703L && __GNUC__ >= 11
template std::string std::basic_stringbuf<char>::str() const&;
#endif

extern "C" {

// Whether the process has one thread, by which libstdc++ counts references without atomics: false
// is always right. In glibc from 2.32 on.
__attribute__((visibility("hidden"))) extern char m3i_single_threaded __asm__(
    "__libc_single_threaded");
char m3i_single_threaded = 0;

// std::__throw_bad_array_new_length, of libstdc++ from GCC 11 on.
[[noreturn]] __attribute__((visibility("hidden"))) void m3i_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void m3i_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// What <cstdlib> of glibc 2.38 and newer calls strtoul and strtoull: they also read binary numbers
// with the prefix 0b, which nothing here has.
unsigned long m3i_strtoul(const char*, char**, int) __asm__("strtoul");
unsigned long long m3i_strtoull(const char*, char**, int) __asm__("strtoull");
__attribute__((visibility("hidden"))) unsigned long m3i_isoc23_strtoul(
    const char* text, char** end, int base) __asm__("__isoc23_strtoul");
__attribute__((visibility("hidden"))) unsigned long long m3i_isoc23_strtoull(
    const char* text, char** end, int base) __asm__("__isoc23_strtoull");

unsigned long m3i_isoc23_strtoul(const char* text, char** end, int base) {
  return m3i_strtoul(text, end, base);
}
unsigned long long m3i_isoc23_strtoull(const char* text, char** end, int base) {
  return m3i_strtoull(text, end, base);
}
}

#endif
