// An importable module without Python functions: importing it runs the registrations of its op
// kernels.
#pragma once

#include <Python.h>

#define M3I_PYTHON_MODULE(name)                                                                  \
  PyMODINIT_FUNC PyInit_##name() {                                                               \
    static PyModuleDef module = {                                                                \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module);                                                             \
  }
