# find_package(lagkv_ext) for the installed Python package: cmake -DCMAKE_PREFIX_PATH=... with what
# `python -c "import lagkv_ext; print(lagkv_ext.cmake_prefix_path)"` prints, and -DPython_EXECUTABLE=... for its torch.
#
# lagkv::lagkv   lagkv/operators.h, torch and the operator libraries; linked even where no symbol of theirs is named
# lagkv::torch   torch alone
include("${CMAKE_CURRENT_LIST_DIR}/lagkv-torch.cmake")
get_filename_component(_lagkv_folder "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
if(NOT EXISTS "${_lagkv_folder}/_C.abi3.so")
  set(lagkv_ext_FOUND FALSE)
  set(lagkv_ext_NOT_FOUND_MESSAGE "${_lagkv_folder} has no _C.abi3.so: lagkv_ext was not built there; run 'pip install .' in its sources")
  return()
endif()

if(NOT TARGET lagkv::lagkv)
  add_library(lagkv::lagkv INTERFACE IMPORTED)
  target_include_directories(lagkv::lagkv INTERFACE "${_lagkv_folder}/include")
  target_compile_features(lagkv::lagkv INTERFACE cxx_std_20)  # torch's headers
  target_link_options(lagkv::lagkv INTERFACE "LINKER:--no-as-needed")  # a program names no symbol of theirs
  foreach(_lagkv_library _C _cuda)
    if(_lagkv_library STREQUAL _C OR (TARGET lagkv::torch_cuda AND EXISTS "${_lagkv_folder}/${_lagkv_library}.abi3.so"))
      add_library(lagkv::${_lagkv_library} SHARED IMPORTED)
      set_target_properties(lagkv::${_lagkv_library} PROPERTIES
        IMPORTED_LOCATION "${_lagkv_folder}/${_lagkv_library}.abi3.so" IMPORTED_SONAME "${_lagkv_library}.abi3.so")
      target_link_libraries(lagkv::lagkv INTERFACE lagkv::${_lagkv_library})
    endif()
  endforeach()
  target_link_libraries(lagkv::lagkv INTERFACE lagkv::torch)
  if(TARGET lagkv::_cuda)
    target_link_libraries(lagkv::lagkv INTERFACE lagkv::torch_cuda)
  endif()
endif()
