# Read by the build of llama-cpp-python through CMAKE_PROJECT_llama.cpp_INCLUDE.
# Its CMakeLists forces llama.cpp's command line support library on; we use only the libraries themselves.
set(LLAMA_BUILD_COMMON OFF)
