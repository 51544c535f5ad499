# The target lagkv::torch: the torch of Python_EXECUTABLE, by path. find_package(Torch) fails, or picks architectures of
# its own, with pip's CUDA builds. Where that is a CUDA build, lagkv::torch_cuda
# too; LAGKV_TORCH is its folder.
if(TARGET lagkv::torch)
  return()
endif()
if(NOT Python_EXECUTABLE)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
endif()
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE LAGKV_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT LAGKV_TORCH)
  message(FATAL_ERROR "lagkv: ${Python_EXECUTABLE} has no torch; set Python_EXECUTABLE to one that has")
endif()
file(STRINGS "${LAGKV_TORCH}/version.py" _cuda_line REGEX "^cuda")

add_library(lagkv_torch INTERFACE)
add_library(lagkv::torch ALIAS lagkv_torch)
target_include_directories(lagkv_torch SYSTEM INTERFACE
  "${LAGKV_TORCH}/include" "${LAGKV_TORCH}/include/torch/csrc/api/include")
# By full path, so that CMake adds the folder to the run path.
foreach(_library torch torch_cpu c10)
  target_link_libraries(lagkv_torch INTERFACE "${LAGKV_TORCH}/lib/lib${_library}.so")
endforeach()
if(_cuda_line MATCHES "[0-9]+\\.[0-9]+")
  add_library(lagkv_torch_cuda INTERFACE)
  add_library(lagkv::torch_cuda ALIAS lagkv_torch_cuda)
  foreach(_library torch_cuda c10_cuda)
    target_link_libraries(lagkv_torch_cuda INTERFACE "${LAGKV_TORCH}/lib/lib${_library}.so")
  endforeach()
  target_link_libraries(lagkv_torch_cuda INTERFACE lagkv_torch)
endif()
