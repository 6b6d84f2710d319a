# Which GPU platforms are built. Sets QUARK_CUDA_STATE and QUARK_HIP_STATE: what is compiled, or "none: " and why.
include(CheckLanguage)

# Sets QUARK_<platform>_STATE. `devices` are files that a driver makes.
function(quark_choose_platform platform devices)
  set(wanted ${QUARK_${platform}})
  if(wanted STREQUAL "OFF")
    set(state "none: built with QUARK_${platform}=OFF")
  elseif(wanted STREQUAL "AUTO" AND NOT EXISTS ${devices})
    set(state "none: built with QUARK_${platform}=AUTO on a machine without such a device")
  elseif(wanted STREQUAL "AUTO" OR wanted STREQUAL "ON")
    check_language(${platform})
    if(CMAKE_${platform}_COMPILER)
      list(JOIN QUARK_${platform}_ARCHITECTURES " " names)
      set(state "compiled for ${names}")
    elseif(wanted STREQUAL "ON")
      message(FATAL_ERROR "QUARK_${platform}=ON, but CMake finds no ${platform} compiler; set CMAKE_${platform}_COMPILER, "
                          "or use AUTO or OFF")
    else()
      set(state "none: built with QUARK_${platform}=AUTO, without a ${platform} compiler")
    endif()
  else()
    message(FATAL_ERROR "QUARK_${platform} is '${wanted}'; allowed: AUTO, ON, OFF")
  endif()
  message(STATUS "quark-kernels: ${platform}: ${state}")
  set(QUARK_${platform}_STATE "${state}" PARENT_SCOPE)
endfunction()

quark_choose_platform(CUDA /dev/nvidiactl)
quark_choose_platform(HIP /dev/kfd)
foreach(platform CUDA HIP)
  if(NOT QUARK_${platform}_STATE MATCHES "^none")
    enable_language(${platform})
  endif()
endforeach()
if(NOT QUARK_CUDA_STATE MATCHES "^none" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  if(NOT QUARK_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "QUARK_CUDA=ON needs nvcc 12 or newer, for C++20; ${CMAKE_CUDA_COMPILER} is "
                        "${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  set(QUARK_CUDA_STATE "none: built with QUARK_CUDA=AUTO and nvcc ${CMAKE_CUDA_COMPILER_VERSION}, which is older than 12")
  message(STATUS "quark-kernels: CUDA: ${QUARK_CUDA_STATE}")
endif()
if(CMAKE_CUDA_COMPILER AND NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # which CMake before 3.26 doesn't know of nvcc
endif()

# kernels.cu as one object library: only a platform's own compiler sees it.
function(quark_add_platform platform namespace)
  if(QUARK_${platform}_STATE MATCHES "^none")
    return()
  endif()
  set(target quark_${namespace})
  # A copy of its own: one source can have one language.
  set(source ${CMAKE_BINARY_DIR}/kernels.${namespace}.cu)
  file(GENERATE OUTPUT ${source} CONTENT "#include \"${PROJECT_SOURCE_DIR}/cpp/gpu/kernels.cu\"\n")
  add_library(${target} OBJECT ${source})
  set_source_files_properties(${source} PROPERTIES LANGUAGE ${platform})
  set_target_properties(${target} PROPERTIES
    ${platform}_ARCHITECTURES "${QUARK_${platform}_ARCHITECTURES}" ${platform}_STANDARD 20
    ${platform}_STANDARD_REQUIRED ON ${platform}_EXTENSIONS OFF ${platform}_VISIBILITY_PRESET hidden)
  target_compile_definitions(${target} PRIVATE QUARK_LEVEL=${namespace})
  target_compile_options(${target} PRIVATE ${ARGN})
  target_sources(quark_core PRIVATE $<TARGET_OBJECTS:${target}>)
  target_compile_definitions(quark_core PRIVATE QUARK_WITH_${platform})
endfunction()

function(quark_add_gpu_kernels)
  # One result everywhere: no contraction into fma, and the defaults of division and subnormals, which are IEEE's.
  # 2810: nvcc takes the assignment of a [[nodiscard]] class for a call whose result is dropped.
  # Lambdas are constexpr, and with_order calls them from the host as well as from the device.
  quark_add_platform(CUDA cuda -fmad=false --expt-relaxed-constexpr --diag-suppress=2810 -Xcompiler=-ffp-contract=off)
  quark_add_platform(HIP hip -ffp-contract=off)
endfunction()
