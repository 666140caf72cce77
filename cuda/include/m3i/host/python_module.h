// An importable module with the Python functions of a PyMethodDef table. For the operators' modules
// that is nullptr: importing them runs the registrations of their kernels.
#pragma once

#include <Python.h>

#define M3I_PYTHON_MODULE(name, methods)                                                         \
  PyMODINIT_FUNC PyInit_##name() {                                                               \
    static PyModuleDef module = {                                                                \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module);                                                             \
  }
