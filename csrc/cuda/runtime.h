// What the bindings ask of the CUDA runtime, which they do not include.
#pragma once

namespace fastattn::cuda {

// The text of an error code of a launch.
const char* error_text(int error);

// The newest CUDA that the driver runs, as 13000 for 13.0; 0 without a driver. Starts nothing on a device.
int driver_version();

// Of a device: 90 for compute capability 9.0, and its multiprocessors.
int capability(int device);
int multiprocessors(int device);

}  // namespace fastattn::cuda
