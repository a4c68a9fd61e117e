# Everything of the Python-free CUDA library; paths relative to cuda/. No globbing: a file that is not listed is not built.
set(JAX_FLASHKDA_HOST_SOURCES  # plain host C++ that links without CUDA: checks, sizes, the compiled table
  dispatch/check.cc
  dispatch/check_short_conv.cc)
set(JAX_FLASHKDA_CUDA_SOURCES
  ${JAX_FLASHKDA_HOST_SOURCES}
  dispatch/dispatch.cc
  sm90/segment_table/launch.cu
  sm90/short_segments/launch.cu
  sm90/chunk_prepare/launch.cu
  sm90/chunk_state_output/launch.cu
  sm90/chunk_state_pieces/launch.cu
  sm90/chunk_state_gradient/launch.cu
  sm90/chunk_gradient/launch.cu
  sm90/decode_step/launch.cu
  sm90/short_conv/launch.cu
  sm90/initialize.cu)
